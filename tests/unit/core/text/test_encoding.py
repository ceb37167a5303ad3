"""Which tokens a row becomes, and which of them are learned."""

import json
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.core.storage.schemas import MESSAGES
from s2l_ray.core.text import encoding
from s2l_ray.core.text.batching import pad, token_batches
from s2l_ray.core.text.byte_tokenizer import BYTE_END, BYTE_PAD, byte_tokenizer
from s2l_ray.core.text.encoding import (
    NO_LEARNED_TOKEN,
    Encoded,
    Encoder,
    check_some_learned,
    some_end,
)
from s2l_ray.core.text.turns import prompt_and_answer
from s2l_ray.errors import UserError

SPECIALS = ["<s>", "</s>", "<|end|>", "<|pad|>"]
texts = st.text(st.characters(codec="utf-8"), max_size=15)
tricky = st.lists(
    st.one_of(texts, st.sampled_from([*SPECIALS, "answer", "\n", " the ", "é", "🎉"])), max_size=4
).map("".join)


def rows(*triples: tuple[str, str | None, str]) -> pa.Table:
    """Conversations of one instruction, its input and the output."""
    return conversations(
        *(
            [
                {"role": "user", "content": instruction, "input": input},
                {"role": "assistant", "content": output},
            ]
            for instruction, input, output in triples
        )
    )


def conversations(
    *messages: list[dict[str, Any]], tools: list[str | None] | None = None
) -> pa.Table:
    return pa.table(
        {
            "example_id": pa.array(range(len(messages)), pa.int64()),
            "messages": pa.array(messages, MESSAGES),
            "tools": pa.array(tools or [None] * len(messages), pa.string()),
        }
    )


@cache
def bytes_encoder(prompt: str = "plain", max_length: int = 1000) -> Encoder:
    return Encoder(byte_tokenizer(), prompt, max_length)


@cache
def bpe_tokenizer(add_bos: bool = False) -> Any:
    """A small byte-level BPE whose merges cross line ends and spaces.

    So they also cross the border of prompt and answer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["copy\nanswer", "Response:answer", "sum\n the 12", "say\nanswer"] * 20, trainer
    )
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def symbols() -> dict[str, int]:
    """Symbol of the byte-level alphabet -> byte."""
    return {symbol: byte for symbol, byte in byte_tokenizer().get_vocab().items() if byte < 256}


def spelled(tokenizer: Any, ids: Any) -> bytes:
    """The bytes that ordinary tokens stand for; a KeyError where one is special."""
    tokens = tokenizer.convert_ids_to_tokens([int(one) for one in ids])
    return bytes(symbols()[symbol] for token in tokens for symbol in token)


def prompt_text(style: str, instruction: str, input: str | None) -> str:
    """The masked text of a row in the paper's prompt or as bare columns, written out here."""
    if style == "plain":
        return f"{instruction}\n{input}\n" if input else f"{instruction}\n"
    head = "Below is an instruction that describes a task"
    write = (
        "Write a response that appropriately completes the request.\n\n### Instruction:\n"
        + instruction
    )
    if input:
        return (
            f"{head}, paired with an input that provides further context. {write}\n\n"
            f"### Input:\n{input}\n\n### Response:"
        )
    return f"{head}. {write}\n\n### Response:"


# ---- prompts


def text_of(encoder: Encoder, table: pa.Table) -> list[str]:
    return [bytes(ids).decode() for ids in encoder.prompts(table)]


def test_the_papers_prompt_with_and_without_input() -> None:
    head = "Below is an instruction that describes a task"
    write = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    table = rows(("Add.", "", "3"), ("Add.", None, "3"), ("Add.", "1 2", "3"))
    without = f"{head}. {write}Add.\n\n### Response:"
    with_input = (
        f"{head}, paired with an input that provides further context. {write}Add.\n\n"
        "### Input:\n1 2\n\n### Response:"
    )
    assert text_of(bytes_encoder("alpaca"), table) == [without, without, with_input]
    assert text_of(bytes_encoder("plain"), table) == ["Add.\n", "Add.\n", "Add.\n1 2\n"]


@pytest.mark.parametrize(
    "instruction", ["use {input} and {instruction}", "{", "{}", "{0}", "{{x}}", "%s"]
)
def test_braces_in_a_row_are_text(instruction: str) -> None:
    with_input, without = text_of(
        bytes_encoder("alpaca"), rows((instruction, "{instruction}", "x"), (instruction, None, "x"))
    )
    assert f"### Instruction:\n{instruction}\n\n### Input:\n{{instruction}}\n" in with_input
    assert f"### Instruction:\n{instruction}\n\n### Response:" in without


# ---- what is learned


def test_bytes_span_by_span() -> None:
    (short, accent) = bytes_encoder().examples(rows(("ab", None, "cd"), ("é", "x", "ñ\n")))
    assert short.input_ids.tolist() == [*b"ab\ncd", BYTE_END]
    assert short.learned.tolist() == [False] * 3 + [True] * 3
    assert accent.input_ids.tolist() == [*"é\nx\nñ\n".encode(), BYTE_END]
    assert accent.learned.tolist() == [False] * 5 + [True] * 4
    assert (short.example_id, accent.example_id) == (0, 1)
    assert (short.input_ids.dtype, short.learned.dtype) == (np.int32, bool)


@pytest.mark.parametrize("input", [None, "", "an input\n"])
def test_alpaca_span_by_span(input: str | None) -> None:
    (made,) = bytes_encoder("alpaca").examples(rows(("Add.", input, "3")))
    prompt = prompt_text("alpaca", "Add.", input).encode()
    assert made.input_ids.tolist() == [*prompt, *b"3", BYTE_END]
    assert made.learned.tolist() == [False] * len(prompt) + [True, True]


def test_reference_bug_15_a_prompt_tokenised_alone_would_shift_the_mask() -> None:
    tokenizer = bpe_tokenizer()
    (made,) = Encoder(tokenizer, "plain", 100).examples(rows(("please copy", None, "answer")))
    across = [
        n
        for n, token in enumerate(tokenizer.convert_ids_to_tokens(made.input_ids.tolist()))
        if "Ċ" in token and "a" in token
    ]
    assert across, "the trained merges were to cross the line end"
    first = across[0]
    assert made.learned.tolist() == [False] * first + [True] * (len(made.learned) - first)
    assert b"\na" in spelled(tokenizer, made.input_ids[first : first + 1])
    assert spelled(tokenizer, made.input_ids[:first]).startswith(b"please")


@settings(max_examples=200, deadline=None)
@given(
    instruction=tricky,
    input=st.none() | tricky,
    output=tricky,
    kind=st.sampled_from(["bytes", "bpe", "bos"]),
    style=st.sampled_from(["plain", "alpaca"]),
)
def test_learned_is_every_token_with_a_byte_of_the_answer_and_the_end(
    instruction: str, input: str | None, output: str, kind: str, style: str
) -> None:
    tokenizer = byte_tokenizer() if kind == "bytes" else bpe_tokenizer(kind == "bos")
    encoder = Encoder(tokenizer, style, 10_000)
    (made,) = encoder.examples(rows((instruction, input, output)))
    ids, learned = made.input_ids.tolist(), made.learned.tolist()
    start = [tokenizer.bos_token_id] if kind == "bos" else []
    assert ids[: len(start)] == start
    assert ids[-1] == encoder.end
    body = ids[len(start) : -1]
    prompt = prompt_text(style, instruction, input).encode()
    assert spelled(tokenizer, body) == prompt + output.encode()
    reached, expected = 0, [False] * len(start)
    for token in body:
        reached += len(spelled(tokenizer, [token]))
        expected.append(reached > len(prompt))
    expected.append(True)
    expected[0] = False
    assert learned == expected


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_name_of_a_special_token_in_a_row_ends_nothing(special: str, kind: str) -> None:
    tokenizer = byte_tokenizer() if kind == "bytes" else bpe_tokenizer()
    encoder = Encoder(tokenizer, "plain", 1000)
    table = rows((f"say {special}", f"{special}", f"a{special}b{special}"))
    (made,) = encoder.examples(table)
    assert made.input_ids.tolist().count(encoder.end) == 1
    assert made.input_ids[-1] == encoder.end
    assert not set(made.input_ids[:-1].tolist()) & set(tokenizer.all_special_ids)
    (prompt,) = encoder.prompts(table)
    assert not set(prompt) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(
        made.input_ids[made.learned].tolist(), skip_special_tokens=True
    ).endswith(f"a{special}b{special}")


# ---- several turns


CALLS = [{"function": {"arguments": {"ü": 1}, "name": "f"}}]
CALLS_TEXT = '[{"function": {"arguments": {"ü": 1}, "name": "f"}}]'
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One", "input": "Two"},
    {
        "role": "assistant",
        "content": "Three",
        "extra": json.dumps({"tool_calls": CALLS, "name": "x"}),
    },
    {"role": "tool", "content": "Four"},
    {"role": "assistant", "content": "", "extra": json.dumps({"tool_calls": CALLS})},
    {"role": "assistant", "content": "Five"},
    {"role": "user", "content": "Six"},
]
# masked and learned text in turn; an end token follows each learned one
TALK_TEXTS = {
    "plain": [
        "Be kind.\n[tools]\nOne\nTwo\n",
        f"Three\n{CALLS_TEXT}",
        "Four\n",
        CALLS_TEXT,
        "",
        "Five",
        "Six\n",
    ],
    "alpaca": [
        "Be kind.\n\n### Tools:\n[tools]\n\n### Instruction:\nOne\n\n"
        "### Input:\nTwo\n\n### Response:",
        f"Three\n{CALLS_TEXT}",
        "\n\n### Tool:\nFour\n\n### Response:",
        CALLS_TEXT,
        "\n\n### Response:",
        "Five",
        "\n\n### Instruction:\nSix",
    ],
}


@pytest.mark.parametrize("learn", ["all", "last", "everything"])
@pytest.mark.parametrize("style", ["plain", "alpaca"])
def test_conversations_span_by_span(style: str, learn: str) -> None:
    encoder = Encoder(byte_tokenizer(), style, 10_000, learn)
    (made,) = encoder.examples(conversations(TALK, tools=["[tools]"]))
    ids, learned = [], []
    for number, text in enumerate(TALK_TEXTS[style]):
        answer = number % 2 == 1
        tokens = [*text.encode(), *([BYTE_END] if answer else [])]
        ids += tokens
        learned += [learn == "everything" or (answer and (learn == "all" or number == 5))] * len(
            tokens
        )
    assert made.input_ids.tolist() == ids
    assert made.learned.tolist() == [False, *learned[1:]]
    (prompt,) = encoder.prompts(conversations(TALK, tools=["[tools]"]))
    assert prompt == ids[: len(prompt)]
    assert bytes(ids[len(prompt) : len(prompt) + 4]) == b"Five"


@pytest.mark.parametrize("learn", ["all", "last", "everything"])
@pytest.mark.parametrize("style", ["plain", "alpaca"])
def test_an_answer_that_is_marked_is_not_learned_and_changes_no_token(
    style: str, learn: str
) -> None:
    encoder = Encoder(byte_tokenizer(), style, 10_000, learn)
    marked = [{**turn, "masked": turn["content"] == "Three"} for turn in TALK]
    (made,), (plain,) = (encoder.examples(conversations(talk)) for talk in (marked, TALK))
    assert made.input_ids.tolist() == plain.input_ids.tolist()
    answer = f"Three\n{CALLS_TEXT}".encode()
    first = bytes(min(token, 255) for token in plain.input_ids.tolist()).index(answer)
    expected = plain.learned.copy()
    expected[first : first + len(answer) + 1] = False
    assert made.learned.tolist() == expected.tolist()
    assert (made.learned.sum() < plain.learned.sum()) == (learn != "last")


@pytest.mark.parametrize("learn", ["all", "last", "everything"])
def test_a_row_whose_answers_are_all_marked_says_so(learn: str) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "masked": True}]
    (made,) = Encoder(byte_tokenizer(), "plain", 100, learn).examples(conversations(talk))
    assert made.reason == "the conversation marks its answers as not to be learned"


@pytest.mark.parametrize("style", ["plain", "alpaca"])
def test_further_turns_are_told_apart_as_the_first_is(style: str) -> None:
    """The first question has the text of the first row; later ones have no opening."""
    triples = [("a", "b", "c"), ("d", None, "e"), ("f", "g", "h")]
    talk = [
        turn
        for instruction, input, output in triples
        for turn in (
            {"role": "user", "content": instruction, "input": input},
            {"role": "assistant", "content": output},
        )
    ]
    encoder = Encoder(byte_tokenizer(), style, 10_000)
    (together,) = encoder.examples(conversations(talk))
    pieces, at = [], 0
    for alone in encoder.examples(rows(*triples)):
        (turn,) = np.flatnonzero(alone.input_ids == BYTE_END)
        text = bytes(alone.input_ids[:turn].tolist())
        pieces.append(
            text if not pieces or style == "plain" else text[text.index(b"\n\n### Instruction") :]
        )
        span = together.input_ids[at : at + len(pieces[-1]) + 1].tolist()
        assert span == [*pieces[-1], BYTE_END]
        at += len(span)
    assert at == len(together.input_ids)
    assert together.learned.sum() == 6


def test_an_empty_system_turn_says_nothing() -> None:
    talk = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    for style in ("plain", "alpaca"):
        encoder = bytes_encoder(style)
        (empty,), (none,) = (
            encoder.examples(conversations(talk)),
            encoder.examples(rows(("a", None, "b"))),
        )
        assert empty.input_ids.tolist() == none.input_ids.tolist()


def test_a_start_token_comes_once_and_end_tokens_after_every_answer() -> None:
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant") * 3]
    encoder = Encoder(bpe_tokenizer(True), "plain", 100)
    (made,) = encoder.examples(conversations(talk))
    assert made.input_ids.tolist().count(0) == 1
    assert made.input_ids[0] == 0
    assert made.learned[made.input_ids == encoder.end].tolist() == [True] * 3


def test_what_a_row_asks_and_answers_for_people() -> None:
    turns = [{"input": None, "extra": None, **turn} for turn in TALK]
    assert prompt_and_answer(turns[1:3]) == ("One\nTwo", f"Three\n{CALLS_TEXT}")
    asked, answered = prompt_and_answer(turns)
    assert asked == "system: Be kind.\nuser: One\nTwo\nassistant: Three\ntool: Four\nassistant: "
    assert answered == "Five"


# ---- what cannot be learned


def test_rows_of_which_nothing_is_learned_say_why() -> None:
    silent = [{"role": "user", "content": "abc"}]
    long = [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y"}]
    made = Encoder(byte_tokenizer(), "plain", 20).examples(conversations(silent, long))
    assert [example.reason for example in made] == [
        "the conversation has no assistant turn",
        NO_LEARNED_TOKEN,
    ]
    assert [example.example_id for example in made] == [0, 1]
    assert [len(example.input_ids) for example in made] == [2, 20]
    assert not any(example.learned.any() for example in made)
    (left,) = Encoder(byte_tokenizer(), "plain", 20, truncation="left").examples(
        conversations(long)
    )
    assert left.reason is None


def test_rows_of_which_not_one_is_learned_are_told_before_training() -> None:
    talks = [
        [{"role": "user", "content": "a"}],
        *([{"role": "user", "content": "x" * 9}, TALK[2]] for _ in range(2)),
    ]
    encoder = Encoder(byte_tokenizer(), "plain", 8)
    with pytest.raises(UserError) as refused:
        check_some_learned(encoder.examples(conversations(*talks)), "proxy")
    assert (
        "preparing the proxy: of the first 3 rows not one has a token to learn "
        "(2 x no learned token within max_length; 1 x the conversation has no assistant turn; "
        "the row with example_id 0 first). Change proxy.prompt"
    ) in str(refused.value)
    check_some_learned(encoder.examples(conversations(*talks, TALK[5:6])), "proxy")


@pytest.mark.parametrize("prompt", ["plain", "alpaca"])
def test_a_thought_in_a_field_of_its_own_is_learned_before_the_answer(prompt: str) -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "extra": '{"reasoning_content":" hm "}'},
    ]
    (made,) = Encoder(byte_tokenizer(), prompt, 1000).examples(conversations(talk))
    learned = made.input_ids[made.learned].tolist()
    assert learned == [*b"<think>\nhm\n</think>\n\nb", BYTE_END]


def test_answers_that_learn_no_end_are_seen() -> None:
    tokenizer = byte_tokenizer()
    table = rows(("a", None, "b"), ("c", None, "d" * 50))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for encoder, ends in (
        (Encoder(tokenizer, "plain", 30), True),
        (Encoder(tokenizer, "chat", 30, template=template), False),
        (Encoder(tokenizer, "chat", 30, template=template + "{{ eos_token }}"), True),
    ):
        encoded = encoder.examples(table)
        assert some_end(encoded, encoder) == ends
        # Rows that are cut lose their end, and say nothing.
        assert some_end(encoded[1:], encoder)


# ---- cut


@pytest.mark.parametrize("truncation", ["right", "left"])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("learn", ["all", "last", "everything"])
def test_longer_rows_are_cut_on_one_side(truncation: str, start: bool, learn: str) -> None:
    """By brute force: all tokens of a row, then those that stay."""
    talk = [{"role": role, "content": f"{role} copy\nanswer"} for role in ("user", "assistant") * 2]
    table = conversations(talk, TALK)
    for number, whole in enumerate(
        Encoder(bpe_tokenizer(start), "plain", 10_000, learn).examples(table)
    ):
        pairs = list(zip(whole.input_ids.tolist(), whole.learned.tolist(), strict=True))
        for length in range(2, len(pairs) + 2):
            cut = Encoder(bpe_tokenizer(start), "plain", length, learn, truncation).examples(table)[
                number
            ]
            kept = pairs[:length]
            if truncation == "left" and length < len(pairs):
                kept = [*pairs[: int(start)], *pairs[int(start) + len(pairs) - length :]]
            assert cut.input_ids.tolist() == [token for token, _ in kept]
            assert cut.learned.tolist() == [False, *(learned for _, learned in kept[1:])]
            assert (cut.reason == NO_LEARNED_TOKEN) == (not cut.learned.any())


@pytest.mark.parametrize("side", ["left", "right"])
def test_where_a_tokenizer_cuts_by_its_own_files_does_not_matter(side: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.truncation_side = side
    tokenizer.backend_tokenizer.enable_truncation(3, direction=side)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    (cut,) = Encoder(tokenizer, "plain", 4).examples(rows(("ab", None, "cde")))
    assert cut.input_ids.tolist() == [*b"ab\nc"]
    assert cut.learned.tolist() == [False, False, False, True]


def test_cutting_leaves_prompts_whole() -> None:
    encoder = Encoder(byte_tokenizer(), "plain", 4)
    table = rows(("abcdef", None, "x"))
    before = encoder.prompts(table)
    encoder.examples(table)
    assert encoder.prompts(table) == before == [[*b"abcdef\n"]]


def test_more_rows_than_are_tokenised_at_once() -> None:
    made = bytes_encoder().examples(rows(*((str(n), None, "x") for n in range(1100))))
    assert [example.example_id for example in made] == list(range(1100))
    assert made[1050].input_ids.tolist() == [*b"1050\nx", BYTE_END]


def test_the_first_token_is_never_learned() -> None:
    (made,) = Encoder(bpe_tokenizer(), "plain", 100).examples(rows(("copy", None, "answer")))
    assert len(made.input_ids) == 2, "the whole row was to be one token"
    assert made.learned.tolist() == [False, True]


def test_a_start_token_comes_first_only_where_the_tokenizer_sets_one() -> None:
    table = rows(("ab", None, "cd"))
    assert Encoder(bpe_tokenizer(True), "plain", 100).start == [0]
    assert Encoder(bpe_tokenizer(False), "plain", 100).start == []
    with_start, without = (Encoder(bpe_tokenizer(bos), "plain", 100) for bos in (True, False))
    (a,), (b,) = with_start.examples(table), without.examples(table)
    assert a.input_ids.tolist() == [0, *b.input_ids.tolist()]
    assert a.learned.tolist() == [False, *b.learned.tolist()]
    assert with_start.prompts(table) == [[0, *without.prompts(table)[0]]]


def test_prompts_are_the_masked_text_alone() -> None:
    assert bytes_encoder().prompts(rows(("ab", "x", "cd"), ("é", None, "d"))) == [
        [*b"ab\nx\n"],
        [*"é\n".encode()],
    ]


def test_no_rows_give_nothing() -> None:
    assert bytes_encoder().examples(rows()) == []
    assert bytes_encoder().prompts(rows()) == []


@pytest.mark.parametrize("characters", [1, 50, 10_000])
def test_rows_do_not_influence_each_other(characters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in any order, with other neighbours, in slices, chunks and tokenizer batches."""
    talks = [
        [
            {"role": "user", "content": "a" * n},
            {"role": "assistant", "content": "copy\nanswer" * (5 - n % 5)},
        ]
        for n in range(1, 20)
    ]
    talks[7] = talks[7][:1]
    talks[11] = TALK
    encoder = Encoder(bpe_tokenizer(), "plain", 12)
    table = conversations(*talks)
    expected = {n: encoder.examples(table.slice(n, 1))[0] for n in range(table.num_rows)}
    monkeypatch.setattr(encoding, "CHARACTERS_AT_ONCE", characters)
    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(table.num_rows)
    chunked = pa.concat_tables([table.slice(5), table.slice(0, 2), table.slice(2, 3)])
    for other in (table, table.take(pa.array(shuffled)), table.slice(3, 9), chunked):
        made = encoder.examples(other)
        assert [example.example_id for example in made] == other["example_id"].to_pylist()
        for example in made:
            alone = expected[example.example_id]
            assert example.input_ids.tolist() == alone.input_ids.tolist()
            assert example.learned.tolist() == alone.learned.tolist()
            assert example.reason == alone.reason


def test_every_byte_is_its_own_token_and_comes_back() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 258
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (BYTE_END, BYTE_PAD)
    text = "".join(map(chr, range(0x250))) + "🎉\ufffe"
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_unfit_tokenizers_are_refused() -> None:
    encoder = bytes_encoder()
    encoder.check_vocabulary(258, "x")
    with pytest.raises(
        UserError, match=r"the tokenizer has 258 tokens, but the model only 257 embeddings"
    ):
        encoder.check_vocabulary(257, "x")
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        Encoder(endless, "plain", 10)
    with pytest.raises(UserError, match=r"expected a fast one \(tokenizer.json\)"):
        Encoder(object(), "plain", 10)


# ---- batches


def example(length: int, learned: int = 1) -> Encoded:
    return Encoded(0, np.arange(length, dtype=np.int32), np.arange(length) >= length - learned)


def test_padding_is_on_the_right_and_never_learned() -> None:
    ids_BL, learned_BL = pad([example(2), example(4, 2), example(3)], 99)
    assert ids_BL.tolist() == [[0, 1, 99, 99], [0, 1, 2, 3], [0, 1, 2, 99]]
    assert learned_BL.tolist() == [
        [False, True, False, False],
        [False, False, True, True],
        [False, False, True, False],
    ]
    assert (ids_BL.dtype, learned_BL.dtype) == (np.int64, bool)
    nothing, unlearned = pad([], 7)
    assert nothing.tolist() == [[7, 7]]
    assert not unlearned.any()


@given(lengths=st.lists(st.integers(0, 50), max_size=60), limit=st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_limit(lengths: list[int], limit: int) -> None:
    batches = token_batches(lengths, limit)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        assert padded <= limit or len(batch) == 1
    order = [lengths[row] for batch in batches for row in batch]
    assert order == sorted(order, reverse=True)
    for batch, following in zip(batches, batches[1:], strict=False):
        longest = max(lengths[row] for row in batch)
        assert (len(batch) + 1) * max(1, longest) > limit, "one more row would have fitted"
        assert following
