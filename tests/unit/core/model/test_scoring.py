"""Scoring of examples: batches, the answer alone, labels in messages, and what refuses to pass."""

import copy

import numpy as np
import pytest
import torch

from s2l_ray.config import ModelWorkers
from s2l_ray.core.model.cost import scoring_flops
from s2l_ray.core.model.scoring import (
    answers,
    checkpoint_labels,
    compute_in_batches,
    device_of,
    reason_of,
    score,
    score_statistics,
)
from s2l_ray.core.text.batching import dense_batches, token_batches
from s2l_ray.core.text.byte_tokenizer import byte_tokenizer
from s2l_ray.core.text.encoding import NO_LEARNED_TOKEN, Encoded, Encoder
from s2l_ray.errors import UserError
from tests.families import examples, model, reference

CPU = torch.device("cpu")


class Marks:
    """As much of an encoder as scoring looks at."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos, self.end, self.pad = bos, 2, 0


@pytest.mark.parametrize("tokens_per_batch", [1, 70, 10_000])
def test_every_model_scores_every_example_in_its_place(tokens_per_batch: int) -> None:
    models, rows = [model("llama"), model("gpt_neox")], examples(1)
    found = score(models, rows, 0, tokens_per_batch, CPU)
    expected = [[reference(one, row) for one in models] for row in rows]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    assert score(models, [], 0, tokens_per_batch, CPU).shape == (0, 2)


def test_the_loss_of_an_answer_is_that_of_its_tokens_without_the_prompt() -> None:
    made, rows = model("gpt_neox"), examples(2)
    for row in rows[::2]:
        row.input_ids[0] = 1
    found = score_statistics([made], rows, ["answer_loss", "el2n"], Marks(bos=1), 100, CPU)  # type: ignore[arg-type]
    assert list(found) == ["loss", "el2n", "answer_loss"]
    for number, (row, value) in enumerate(zip(rows, found["answer_loss"][:, 0], strict=True)):
        ids = torch.tensor([2 if number % 2 else 1, *row.input_ids[row.learned]])[None].long()
        with torch.inference_mode():
            expected = made(input_ids=ids, labels=ids).loss.item()
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-5)
    np.testing.assert_allclose(
        found["loss"][:, 0], [reference(made, row) for row in rows], rtol=1e-6, atol=1e-5
    )


def test_answers_predict_exactly_the_learned_tokens() -> None:
    rows = examples(3)
    for row, alone in zip(rows, answers(rows, None, 7), strict=True):
        assert alone.example_id == row.example_id
        assert alone.input_ids.dtype == np.int32
        assert alone.input_ids[~alone.learned].tolist() == [7]
        assert alone.input_ids[alone.learned].tolist() == row.input_ids[row.learned].tolist()


def test_an_encoders_answers_begin_at_its_end_token_where_it_has_no_start_token() -> None:
    encoder = Encoder(byte_tokenizer(), "plain", 40)
    assert encoder.bos is None
    made = copy.deepcopy(model("llama"))
    made.resize_token_embeddings(260)
    row = Encoded(0, np.array([65, 66, 67], np.int32), np.array([False, True, True]))
    found = score_statistics([made], [row], ["answer_loss"], encoder, 100, CPU)["answer_loss"]
    with torch.inference_mode():
        ids = torch.tensor([[encoder.end, 66, 67]])
        assert found.item() == pytest.approx(made(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


@pytest.mark.parametrize("names", [[], ["grand", "el2n"], ["answer_loss"]])
def test_a_value_that_is_not_finite_is_told_with_its_example_and_step(names: list[str]) -> None:
    broken, rows = copy.deepcopy(model("llama")), examples(4)
    with torch.no_grad():
        broken.get_input_embeddings().weight[96] = torch.nan
    for row in rows:
        row.input_ids[row.input_ids == 96] = 95
    rows[5].input_ids[0] = 96
    (labels,) = checkpoint_labels([[0, 40]])
    with pytest.raises(
        UserError, match=r"loss of example_id 5 under the proxy at step 40 is nan.*learning_rate"
    ):
        score_statistics([model("llama"), broken], rows, names, Marks(), 100, CPU, labels)  # type: ignore[arg-type]


def test_labels_name_the_proxy_where_there_are_several() -> None:
    assert checkpoint_labels([[0, 3]]) == [["the proxy at step 0", "the proxy at step 3"]]
    assert checkpoint_labels([[0], [0, 5]]) == [
        ["proxy 0 at step 0"],
        ["proxy 1 at step 0", "proxy 1 at step 5"],
    ]


def test_an_example_is_left_out_as_soon_as_one_proxy_learns_nothing_of_it() -> None:
    ids, yes, no = np.arange(3, dtype=np.int32), np.array([False, True, True]), np.zeros(3, bool)
    assert reason_of([Encoded(0, ids, yes), Encoded(0, ids, yes)]) is None
    assert reason_of([Encoded(0, ids, yes), Encoded(0, ids, no)]) == NO_LEARNED_TOKEN


def test_batches_of_a_small_part_are_cut_smaller_until_little_is_padding() -> None:
    lengths = np.random.default_rng(0).integers(40, 513, 300).tolist()

    def padded_tokens(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    cut = {limit: dense_batches(lengths, limit) for limit in (1_000, 2_048, 16_384, 10**6)}
    padded = {limit: padded_tokens(batches) for limit, batches in cut.items()}
    assert padded[16_384] <= 1.03 * sum(lengths) < padded_tokens(token_batches(lengths, 16_384))
    assert cut[1_000] == token_batches(lengths, 1_000), (
        "what is smaller from the start stays as it is"
    )
    for batches in cut.values():
        assert sorted(row for batch in batches for row in batch) == list(range(300))
    same = [100] * 300
    assert dense_batches(same, 10**6) == [list(range(300))]
    assert dense_batches([], 16_384) == []


def test_flops_count_each_pass_and_the_gram_matrices() -> None:
    lengths, learned = [10, 30], [4, 20]
    assert (
        scoring_flops(1000, (50, 8), lengths, learned, ["el2n", "min_probability"]) == 2 * 1000 * 40
    )
    assert scoring_flops(1000, (50, 8), lengths, learned, ["answer_loss"]) == 2 * 1000 * (
        40 + 24 + 2
    )
    # the second is longer than the layer is wide
    grams = 2 * (4 * 4 + 20 * 8) * 58
    assert scoring_flops(1000, (50, 8), lengths, learned, ["grand"]) == 2 * 1000 * 40 + grams


def test_where_memory_runs_out_batches_are_halved_and_no_row_is_lost() -> None:
    computed: list[int] = []
    tried: list[int] = []

    def compute(rows: list[int]) -> None:
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        computed.extend(rows)

    compute_in_batches([10, 7, 9, 10, 8] * 4, 160, compute)
    assert sorted(computed) == list(range(20))
    assert tried[0] > 8
    assert tried.count(max(tried)) == 1


def test_a_row_that_does_not_fit_alone_is_told() -> None:
    def compute(rows: list[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(UserError, match=r"scoring a row of 4,096 tokens.*Lower max_length"):
        compute_in_batches([4_096, 7], 16_384, compute)


def test_a_gpu_that_was_asked_for_and_is_not_there_is_an_error() -> None:
    assert device_of(ModelWorkers(gpus=0)).type == "cpu"
    with pytest.raises(UserError, match=r"scaling asks for 0.5 GPUs .*torch .* can use none"):
        device_of(ModelWorkers(gpus=0.5))
