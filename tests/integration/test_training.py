"""The training loop on real processes over gloo: against plain torch, over ZeRO stages and workers,
dying and resuming.

Starting processes is what costs, so three teams of workers run all trainings, one after the other,
and the tests look at what came.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from s2l_ray.config import Model, Training, TrainingWorkers
from s2l_ray.core.model.checkpoint import checkpoint_files
from s2l_ray.core.model.losses import token_losses
from s2l_ray.core.model.schedule import TrainingSetup, learning_rate_at
from s2l_ray.core.model.training import train
from s2l_ray.core.model.workers import Worker
from s2l_ray.core.text.encoding import Encoded

VOCABULARY = 97
SECTION = Training(
    # each job builds its own
    model=Model(config={"model_type": "llama"}),
    tokenizer="bytes",
    steps=3,
    global_batch=8,
    learning_rate=3e-3,
    warmup_ratio=0.1,
    weight_decay=0.1,
    gradient_clipping=0.0,
    dtype="fp32",
    seed=5,
)
WORKERS = TrainingWorkers(micro_batch=2)
SHORT = TrainingSetup(SECTION, total_steps=3, checkpoint_steps=(0, 3), scaling=WORKERS)


def changed(setup: TrainingSetup, **fields: Any) -> TrainingSetup:
    """The same setup with other values in its section."""
    return replace(setup, section=setup.section.model_copy(update=fields))


# Steps that change no weight, and a state after the first of them.
UNMOVED = {"dtype": "bf16", "learning_rate": 1e-30, "weight_decay": 0.0, "state_every": 1}
LONG = replace(changed(SHORT, state_every=3), total_steps=6, checkpoint_steps=(2, 6))


class Folder:
    """Files of an artifact in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, data: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def list(self, folder: str) -> list[str]:
        return (
            [path.name for path in (self.root / folder).iterdir()]
            if (self.root / folder).is_dir()
            else []
        )

    def delete(self, folder: str) -> None:
        shutil.rmtree(self.root / folder)


@dataclass(frozen=True)
class Job:
    """One training: its folder and setup; `dies_after` steps; weights from a safetensors file; a
    tied or wider model."""

    name: str
    setup: TrainingSetup
    dies_after: int | None = None
    weights: str | None = None
    tied: bool = False
    dropout: float = 0.0
    # 11 per head pair and odd vocabulary: tensors that two workers cannot halve.
    hidden_size: int = 22


def build_model(tied: bool = False, hidden_size: int = 22, dropout: float = 0.0) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_examples() -> list[Encoded]:
    """19 examples of 3 to 19 tokens, two without a learned token; example 4 alone holds the last
    token of the vocabulary."""
    numbers = np.random.default_rng(0)
    examples = []
    for example_id in range(19):
        length = int(numbers.integers(3, 20))
        learned = numbers.random(length) < 0.5
        learned[1], learned[0] = True, False
        if example_id in (6, 17):
            learned[:] = False
        ids = numbers.integers(1, VOCABULARY - 1, length).astype(np.int32)
        if example_id == 4:
            ids[0] = VOCABULARY - 1
        examples.append(Encoded(example_id, ids, learned))
    return examples


def global_batch(step: int, size: int) -> list[Encoded]:
    """Batches of an epoch in order; the third and last of each is cut short to 3 examples."""
    first = step % 3 * size
    return make_examples()[first : first + size]


def batches_of(job: Job, rank: int, world_size: int) -> Callable[[int], Iterator[list[Encoded]]]:
    def batches(start: int) -> Iterator[list[Encoded]]:
        for step in range(start, job.setup.total_steps):
            if step == job.dies_after:
                raise InterruptedError("the machine is gone")
            yield global_batch(step, job.setup.section.global_batch)[rank::world_size]

    return batches


def run_job(job: Job, root: Path, rank: int, world_size: int) -> None:
    weights = load_file(root / job.weights) if job.weights else None
    metrics: list[dict[str, float]] = []
    outcome = "done"
    try:
        train(
            lambda: build_model(job.tied, job.hidden_size, job.dropout),
            weights.__getitem__ if weights else None,
            job.setup,
            batches_of(job, rank, world_size),
            Folder(root / job.name),
            Worker(rank, world_size, torch.device("cpu")),
            metrics.append,
        )
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    if rank == 0:
        (root / job.name).mkdir(exist_ok=True)
        (root / job.name / "metrics.json").write_text(json.dumps(metrics))
    (root / job.name / f"outcome-{rank}.txt").write_text(outcome)


def run_worker(rank: int, world_size: int, jobs: list[Job], root: Path, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    for job in jobs:
        run_job(job, root, rank, world_size)
        torch.distributed.barrier()
    # Now and then torch's threads abort a process that ends as usual on a busy machine.
    os._exit(0)


def run_team(world_size: int, jobs: list[Job], root: Path) -> None:
    rendezvous = root / f"rendezvous-{jobs[0].name}"
    torch.multiprocessing.spawn(
        run_worker, (world_size, jobs, root, str(rendezvous)), nprocs=world_size
    )


def copy_state(root: Path, source: str, target: str) -> Path:
    return (
        Path(shutil.copytree(root / source / "state", root / target / "state")) / "step-000000003"
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    torch.manual_seed(1)
    given = {name: tensor.clone() for name, tensor in build_model().state_dict().items()}
    from safetensors.torch import save_file

    save_file(given, root / "given.safetensors")
    given["model.embed_tokens.weight"][VOCABULARY - 1] = math.nan
    save_file(given, root / "poisoned.safetensors")
    stages = {stage: changed(SHORT, deepspeed=f"zero{stage}") for stage in (1, 2, 3)}
    long = {
        (stage, dtype): changed(LONG, deepspeed=f"zero{stage}", dtype=dtype)
        for stage in (1, 2, 3)
        for dtype in ("fp32", "bf16")
    }
    resumed = [(stage, dtype) for stage, dtype in long if dtype == "fp32" or stage != 2]

    def living_and_dying(workers: int) -> list[Job]:
        setup = long[3, "bf16"]
        jobs = [
            Job(f"whole-{workers}-3-given", setup, weights="given.safetensors"),
            Job(f"died-{workers}-3-given", setup, weights="given.safetensors", dies_after=5),
        ]
        for stage, dtype in resumed:
            setup = long[stage, dtype]
            jobs += [
                Job(f"whole-{workers}-{stage}-{dtype}", setup),
                Job(f"died-{workers}-{stage}-{dtype}", setup, dies_after=5),
            ]
        return [*jobs, *(replace(job, dies_after=None) for job in jobs if job.dies_after)]

    run_team(
        2,
        [
            *(Job(f"plain-2-{stage}", setup) for stage, setup in stages.items()),
            *(
                Job(f"given-{stage}", setup, weights="given.safetensors")
                for stage, setup in stages.items()
            ),
            *(
                Job(
                    f"given-bf16-{stage}",
                    changed(setup, dtype="bf16"),
                    weights="given.safetensors",
                )
                for stage, setup in list(stages.items())[1:]
            ),
            *(
                Job(f"clipped-{stage}", changed(setup, gradient_clipping=0.5))
                for stage, setup in stages.items()
            ),
            *(
                Job(f"tied-{stage}", setup, tied=True)
                for stage, setup in stages.items()
                if stage != 2
            ),
            *(
                Job(
                    f"masters-{stage}-{name}",
                    changed(setup, **UNMOVED),
                    None,
                    name,
                )
                for stage, setup in stages.items()
                for name in ("given.safetensors", None)
            ),
            Job("dropped-2", changed(SHORT, dropout=True), dropout=0.5),
            Job("poisoned", stages[1], weights="poisoned.safetensors"),
            Job("two-then-one", long[3, "fp32"], dies_after=5),
            *living_and_dying(2),
        ],
        root,
    )
    copy_state(root, "two-then-one", "one-then-two")
    damaged = copy_state(root, "two-then-one", "damaged") / "00000-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    short = copy_state(root, "two-then-one", "short") / "00001-00000.safetensors"
    short.write_bytes(short.read_bytes()[:-9])
    (copy_state(root, "two-then-one", "absent") / "00001-00000.safetensors").unlink()
    copy_state(root, "two-then-one", "other-model")
    incomplete = copy_state(root, "two-then-one", "incomplete")
    shutil.copytree(incomplete, incomplete.with_name("step-000000004"))
    (incomplete.with_name("step-000000004") / "part-00001-of-00002.json").unlink()
    run_team(
        1,
        [
            *(Job(f"plain-1-{stage}", setup) for stage, setup in stages.items()),
            Job("one-pass", replace(SHORT, scaling=TrainingWorkers(micro_batch=8))),
            Job(
                "dropped-1",
                replace(changed(SHORT, dropout=True), scaling=TrainingWorkers(micro_batch=4)),
                dropout=0.5,
            ),
            Job("two-then-one", long[1, "fp32"]),
            *(Job(name, long[1, "fp32"]) for name in ("damaged", "short", "absent", "incomplete")),
            Job("other-model", long[1, "fp32"], hidden_size=24),
            Job("whole-1-1-fp32", long[1, "fp32"]),
            Job("whole-1-1-fp32", long[1, "fp32"]),
            Job("uneven", replace(SHORT, scaling=TrainingWorkers(micro_batch=3))),
        ],
        root,
    )
    run_team(2, [Job("one-then-two", long[2, "fp32"])], root)
    return root


def outcome(root: Path, name: str, rank: int = 0) -> str:
    return (root / name / f"outcome-{rank}.txt").read_text()


def metrics(root: Path, name: str) -> list[dict[str, float]]:
    return json.loads((root / name / "metrics.json").read_text())


def weights(root: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    folder = root / name / "checkpoint" / f"step-{step:06d}"
    assert outcome(root, name) == "done"
    return {
        key: tensor
        for path in folder.glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


def plain_torch(
    setup: TrainingSetup, tied: bool = False
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training with nothing but torch: the mean over the learned tokens of the batch,
    AdamW.
    """
    section = setup.section
    torch.manual_seed(section.seed)
    model = build_model(tied)
    layers = (torch.nn.Linear, torch.nn.Embedding)
    decayed = {module.weight for module in model.modules() if isinstance(module, layers)}
    groups = [
        {"params": [p for p in model.parameters() if (p in decayed) == decays], "weight_decay": w}
        for decays, w in ((True, section.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    losses = []
    for step in range(setup.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, setup)
        useful = [e for e in global_batch(step, section.global_batch) if e.learned.any()]
        parts = [
            token_losses(
                model,
                torch.from_numpy(e.input_ids[None].astype(np.int64)),
                torch.from_numpy(e.learned[None]),
            )
            for e in useful
        ]
        loss = torch.cat(parts).mean()
        loss.backward()
        if section.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), section.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


def assert_close(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6
) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name],
            tensor,
            rtol=0,
            atol=tolerance,
            msg=lambda words, name=name: f"{name}: {words}",
        )


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def whole_weights(state: Path) -> dict[str, torch.Tensor]:
    """The master weights of a state, joined from the parts that the workers wrote."""
    lists = [json.loads(path.read_text()) for path in state.glob("part-*.json")]
    shapes = {name: shape for each in lists for name, shape in each["shapes"].items()}
    joined = {name: torch.full((math.prod(shape),), math.nan) for name, shape in shapes.items()}
    for path in state.glob("*.safetensors"):
        for key, values in load_file(path).items():
            kind, start, name = key.split("@")
            if kind == "weight":
                joined[name][int(start) : int(start) + len(values)] = values
    return {name: values.reshape(shapes[name]) for name, values in joined.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_stage_and_number_of_workers_equals_plain_torch(
    root: Path, workers: int, stage: int
) -> None:
    expected, losses = plain_torch(SHORT)
    name = f"plain-{workers}-{stage}"
    assert_close(weights(root, name, 3), expected)
    assert [line["loss"] for line in metrics(root, name)] == pytest.approx(losses, abs=1e-5)


def test_one_pass_of_eight_equals_four_passes_of_two(root: Path) -> None:
    assert_close(weights(root, "one-pass", 3), weights(root, "plain-1-1", 3))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_is_that_of_torch(root: Path, stage: int) -> None:
    expected, _ = plain_torch(changed(SHORT, gradient_clipping=0.5))
    assert max(line["grad_norm"] for line in metrics(root, f"clipped-{stage}")) > 0.5
    # the norm itself is rounded
    assert_close(weights(root, f"clipped-{stage}", 3), expected, 3e-6)


def test_metrics_count_the_global_batch(root: Path) -> None:
    last = metrics(root, "plain-2-1")[-1]
    rows = global_batch(2, 8)
    assert (last["step"], last["examples"]) == (3, 3)
    assert last["tokens"] == sum(len(e.input_ids) for e in rows)
    assert last["learned_tokens"] == sum(e.learned.sum() for e in rows)
    assert last["learning_rate"] == learning_rate_at(2, SHORT)
    assert 0 < last["wait_seconds"] < last["seconds"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_given_weights_are_the_checkpoint_of_step_0(root: Path, stage: int) -> None:
    given = load_file(root / "given.safetensors")
    assert_same_bits(weights(root, f"given-{stage}", 0), given)
    if stage > 1:
        halves = {name: tensor.bfloat16() for name, tensor in given.items()}
        assert_same_bits(weights(root, f"given-bf16-{stage}", 0), halves)


def test_bf16_learns_the_same_under_zero_2_and_3(root: Path) -> None:
    """Rotary frequencies that a stage had rounded to bf16 would show in the losses."""
    losses = [[line["loss"] for line in metrics(root, f"given-bf16-{stage}")] for stage in (2, 3)]
    exact = [line["loss"] for line in metrics(root, "given-1")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] == pytest.approx(exact, abs=2e-2)


@pytest.mark.parametrize("name", ["given.safetensors", None])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_of_bf16_start_from_the_fp32_weights(
    root: Path, stage: int, name: str | None
) -> None:
    torch.manual_seed(SECTION.seed)
    expected = load_file(root / name) if name else dict(build_model().named_parameters())
    folder = root / f"masters-{stage}-{name}"
    assert outcome(root, folder.name) == "done"
    state = min((folder / "state").iterdir())
    masters = whole_weights(state)
    assert_same_bits(masters, {k: v.detach() for k, v in expected.items()})
    halves = {k: v.detach().bfloat16() for k, v in expected.items()}
    assert_same_bits(weights(root, folder.name, 3), halves)


def test_dropout_depends_neither_on_workers_nor_on_micro_batches(root: Path) -> None:
    one, two = (weights(root, f"dropped-{workers}", 3) for workers in (1, 2))
    assert_close(two, one)
    plain = weights(root, "plain-1-1", 3)
    assert max((one[name] - plain[name]).abs().max() for name in plain) > 1e-3


@pytest.mark.parametrize("name", ["plain-1-1", "plain-2-3", "tied-1", "tied-3", "given-bf16-3"])
def test_a_checkpoint_loads_in_transformers(root: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = root / name / "checkpoint" / "step-000003"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert_same_bits(
        {key: value.detach() for key, value in model.named_parameters()}, weights(root, name, 3)
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_tied_weights_are_stored_once_and_train_as_in_torch(root: Path, stage: int) -> None:
    expected, _ = plain_torch(SHORT, tied=True)
    assert "lm_head.weight" not in expected
    assert_close(weights(root, f"tied-{stage}", 3), expected)


def test_files_json_lists_every_file_with_its_size(root: Path) -> None:
    records = checkpoint_files(Folder(root / "plain-2-3"), 3)
    folder = root / "plain-2-3" / "checkpoint" / "step-000003"
    assert {record["name"] for record in records} == {path.name for path in folder.iterdir()} - {
        "files.json"
    }
    assert all((folder / record["name"]).stat().st_size == record["bytes"] for record in records)
    assert checkpoint_files(Folder(root / "plain-2-3"), 2) is None


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16"), (3, "given")],
)
def test_a_run_that_died_ends_with_the_same_bits(root: Path, stage: int, dtype: str) -> None:
    name = f"died-2-{stage}-{dtype}"
    # The second attempt, from the state of step 3.
    assert [line["step"] for line in metrics(root, name)] == [4, 5, 6]
    assert_same_bits(weights(root, name, 6), weights(root, f"whole-2-{stage}-{dtype}", 6))


def test_the_number_of_workers_and_the_stage_may_change_on_resume(root: Path) -> None:
    expected = weights(root, "whole-2-1-fp32", 6)
    for name in ("two-then-one", "one-then-two"):
        assert [line["step"] for line in metrics(root, name)] == [4, 5, 6]
        assert_close(weights(root, name, 6), expected)


def test_a_state_without_the_list_of_a_worker_is_passed_over(root: Path) -> None:
    assert [line["step"] for line in metrics(root, "incomplete")] == [4, 5, 6]
    assert_same_bits(weights(root, "incomplete", 6), weights(root, "two-then-one", 6))


def test_only_the_newest_state_stays(root: Path) -> None:
    # The last step has its checkpoint, and no state.
    assert LONG.total_steps // LONG.section.state_every == 2
    assert Folder(root / "whole-2-1-fp32").list("state") == ["step-000000003"]


def test_a_finished_training_trains_no_more(root: Path) -> None:
    assert outcome(root, "whole-1-1-fp32") == "done"
    assert metrics(root, "whole-1-1-fp32") == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("damaged", "its content changed"),
        ("short", "bytes were written"),
        ("absent", "it is missing"),
        ("other-model", "this model has shape"),
    ],
)
def test_a_broken_state_is_refused_in_words(root: Path, name: str, words: str) -> None:
    said = outcome(root, name)
    assert said.startswith("UserError: Resuming the training: state/step-000000003")
    assert words in said
    assert "Delete the folder state/step-000000003" in said


def test_a_loss_that_is_not_finite_names_step_and_examples_on_every_worker(root: Path) -> None:
    said = outcome(root, "poisoned", 0)
    assert said == outcome(root, "poisoned", 1)
    assert said.startswith("UserError: Training step 1: a finite loss was expected and nan came")
    named = said.split("example_id ")[1].split(".")[0].split(", ")
    assert "4" in named
    assert len(named) <= SHORT.scaling.micro_batch


def test_sizes_that_do_not_divide_are_refused(root: Path) -> None:
    assert outcome(root, "uneven").startswith(
        "UserError: Preparing a training: a global batch of 8"
    )
