"""Chat templates of real families: the learned spans of a conversation, and refusals."""

# ruff: noqa: RUF001 - some families write their special tokens with a wide bar

import importlib.resources
import importlib.util
import itertools
import json
import re
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.core.storage.schemas import MESSAGES
from s2l_ray.core.text.byte_tokenizer import byte_tokenizer
from s2l_ray.core.text.chat_template import FIXED_DATE, ChatRenderer
from s2l_ray.core.text.encoding import NO_LEARNED_TOKEN, Encoded, Encoder
from s2l_ray.core.text.rendering import Piece
from s2l_ray.core.text.turns import Refused, Turn
from s2l_ray.errors import UserError

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="trl, which ships the templates, is not installed",
)

SPECIAL = re.compile(
    r"<[|｜](?:(?!['+ ])[^<>|｜\n])+[|｜]>|</?(?:start|end)_of_(?:turn|image)>|\[gMASK\]|<sop>"
)
END = "<|endoftext|>"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
        },
    },
}


def user(content: str, **extra: Any) -> Turn:
    return turn("user", content, **extra)


def assistant(content: str, **extra: Any) -> Turn:
    return turn("assistant", content, **extra)


def turn(role: str, content: str, **extra: Any) -> Turn:
    return Turn(role, content, None, json.dumps(extra) if extra else None)


CASES: dict[str, tuple[list[Turn], str | None]] = {
    "single": ([user("Hi?"), assistant("Hello.")], None),
    "multi": ([user("Hi?"), assistant("Hello."), user("More?"), assistant("Fine.")], None),
    "system": ([turn("system", "Be brief."), user("Hi?"), assistant("Hello.")], None),
    "tools": (
        [
            user("Rain?"),
            assistant("", tool_calls=[CALL]),
            turn("tool", "dry", name="weather"),
            assistant("No rain."),
        ],
        json.dumps([SCHEMA]),
    ),
}


@cache
def shipped(name: str) -> str:
    return (importlib.resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def tokenizer_for(template: str | None) -> Any:
    """A byte-level tokenizer with a template, and the template's own tokens as special tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": END, "bos_token": "<s>"})
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted(set(SPECIAL.findall(template or "")))}
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def encoder_for(template: str, learn: str = "all") -> Encoder:
    return Encoder(tokenizer_for(template), "chat", 100_000, learn)


def table(turns: list[Turn], tools: str | None = None) -> pa.Table:
    return pa.table(
        {
            "example_id": [0],
            "messages": pa.array([[t._asdict() for t in turns]], MESSAGES),
            "tools": pa.array([tools], pa.string()),
        }
    )


def encoded(
    template: str, turns: list[Turn], tools: str | None = None, learn: str = "all"
) -> Encoded:
    (made,) = encoder_for(template, learn).examples(table(turns, tools))
    assert (made.reason is None) == bool(made.learned.any())
    return made


def learned_texts(
    template: str, turns: list[Turn], tools: str | None = None, learn: str = "all"
) -> Any:
    """The text of each run of learned tokens, or the reason why there is none."""
    made = encoded(template, turns, tools, learn)
    if made.reason is not None:
        return made.reason
    tokenizer = encoder_for(template, learn).tokenizer
    runs = itertools.groupby(
        zip(made.input_ids.tolist(), made.learned.tolist(), strict=True), lambda t: t[1]
    )
    return [tokenizer.decode([token for token, _ in run]) for learned, run in runs if learned]


def as_given(turns: list[Turn]) -> list[dict[str, Any]]:
    """The conversation as transformers takes it."""
    return [
        {"role": t.role, "content": t.content, **(json.loads(t.extra) if t.extra else {})}
        for t in turns
    ]


def by_transformers(template: str, turns: list[Turn], tools: str | None, **options: bool) -> Any:
    """The tokens as transformers makes them, on the day that we give to every template."""
    return encoder_for(template).tokenizer.apply_chat_template(
        as_given(turns),
        tools=json.loads(tools) if tools else None,
        chat_template=FIXED_DATE + template if "strftime_now" in template else template,
        **options,
    )


# ---- span by span


def spans(end: str, start: str = "") -> dict[str, Any]:
    """Expected learned texts of a family whose answers all look alike."""
    return {
        "single": [f"{start}Hello.{end}"],
        "multi": [f"{start}Hello.{end}", f"{start}Fine.{end}"],
        "system": [f"{start}Hello.{end}"],
    }


JSON_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
GLM_CALL = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n</tool_call>"
ALTERNATE = "the chat template refuses the conversation: Conversation roles must alternate"
UNSTABLE = "rendered differently once the conversation goes on"
UNLIKE_PROMPT = "does not begin with the generation prompt"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
EXPECTED: dict[str, dict[str, Any]] = {
    "qwen2_5": {
        **spans("<|im_end|>\n"),
        "tools": [f"{JSON_CALL}<|im_end|>\n", "No rain.<|im_end|>\n"],
    },
    "qwen3": {**spans("<|im_end|>\n", EMPTY_THOUGHT), "multi": UNSTABLE, "tools": UNSTABLE},
    "qwen3_instruct_2507": {
        **spans("<|im_end|>\n"),
        "tools": [f"{JSON_CALL}<|im_end|>\n", "No rain.<|im_end|>\n"],
    },
    "llama3": {
        **spans("<|eot_id|>"),
        "tools": "the chat template leaves out what a turn of the role assistant says",
    },
    "llama3_1": {
        **spans("<|eot_id|>"),
        "tools": [
            '{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>',
            "No rain.<|eot_id|>",
        ],
    },
    "gemma": {
        **spans("<end_of_turn>\n"),
        "system": "refuses the conversation: System role not supported",
        "tools": ALTERNATE,
    },
    "gemma3": {**spans("<end_of_turn>\n"), "tools": ALTERNATE},
    "phi3": {
        "single": [f"Hello.<|end|>\n{END}"],
        "multi": ["Hello.<|end|>\n", f"Fine.<|end|>\n{END}"],
        "system": [f"Hello.<|end|>\n{END}"],
        "tools": "the chat template leaves out what a turn of the role assistant says",
    },
    "cohere": {**spans("<|END_OF_TURN_TOKEN|>"), "tools": ALTERNATE},
    "cohere2": {**spans("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"), "tools": ALTERNATE},
    "deepseekv3": {
        **dict.fromkeys(("single", "multi", "system"), UNLIKE_PROMPT),
        "tools": "the chat template refuses the conversation: TypeError: can only concatenate str",
    },
    "deepseekv3_training": {
        **spans("<｜end▁of▁sentence｜>", "<｜Assistant｜>"),
        "tools": "the chat template leaves out the tools",
    },
    "glm4moe": {
        **spans("", "\n<think></think>\n"),
        "tools": [f"\n<think></think>\n{GLM_CALL}", "\n<think></think>\nNo rain."],
    },
    "lfm2_v2": {
        **spans("<|im_end|>\n"),
        "tools": [
            "<|tool_call_start|>[weather(city='Bern')]<|tool_call_end|><|im_end|>\n",
            "No rain.<|im_end|>\n",
        ],
    },
    "gptoss": {
        "single": ["<|channel|>final<|message|>Hello.<|return|>"],
        "multi": UNSTABLE,
        "system": ["<|channel|>final<|message|>Hello.<|return|>"],
        "tools": [
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Bern"}<|call|>',
            "<|channel|>final<|message|>No rain.<|return|>",
        ],
    },
}
# What the last answer alone is, where it is not the last of the texts above.
EXPECTED_LAST = {
    ("qwen3", "multi"): [f"{EMPTY_THOUGHT}Fine.<|im_end|>\n"],
    ("qwen3", "tools"): [f"{EMPTY_THOUGHT}No rain.<|im_end|>\n"],
    ("gptoss", "multi"): ["<|channel|>final<|message|>Fine.<|return|>"],
}


@needs_trl
@pytest.mark.parametrize("learn", ["all", "last"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", EXPECTED)
def test_every_family_span_by_span(family: str, case: str, learn: str) -> None:
    expected = EXPECTED[family][case]
    if learn == "last":
        expected = EXPECTED_LAST.get(
            (family, case), expected if isinstance(expected, str) else expected[-1:]
        )
    found = learned_texts(shipped(family), *CASES[case], learn=learn)
    if isinstance(expected, str):
        assert expected in found
    else:
        assert found == expected


@needs_trl
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", EXPECTED)
def test_tokens_are_those_of_transformers(family: str, case: str) -> None:
    turns, tools = CASES[case]
    made = encoded(shipped(family), turns, tools, learn="everything")
    if made.reason is not None:
        assert re.search(r"refuses the conversation|leaves out", made.reason)
        return
    ids = by_transformers(shipped(family), turns, tools)["input_ids"]
    assert made.input_ids.tolist() == ids
    assert made.learned.tolist() == [False] + [True] * (len(ids) - 1)


@needs_trl
@pytest.mark.parametrize("family", ["llama3", "gemma", "cohere2", "lfm2"])
def test_a_start_token_that_the_template_writes_is_not_added_again(family: str) -> None:
    encoder = encoder_for(shipped(family))
    made = encoded(shipped(family), *CASES["multi"])
    assert made.input_ids.tolist().count(encoder.tokenizer.bos_token_id) == 1
    assert made.input_ids[0] == encoder.tokenizer.bos_token_id
    assert encoder.start == []


# ---- generation marks


PAIRS = [
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "llama3",
    "gemma",
    "gemma3",
    "phi3",
    "phi3_5",
    "cohere",
    "cohere2",
    "deepseekv3",
    "glm4moe",
    "lfm2",
    "lfm2_v2",
    "gptoss",
    "nemotron_3_nano",
    "qwen3_6",
]


def without(text: str) -> Any:
    return lambda spans: [span.removeprefix(text) for span in spans]


# How to turn the learned text of X_training (generation marks) into that of X (prefixes).
DIFFERENCES = {
    # the line end after the role is inside the marks
    "qwen2_5": without("\n"),
    # The next turn's role is the token that ends an answer: inside the marks, but X writes it for
    # the next turn only.
    "glm4moe": lambda spans: [re.sub(r"<\|(user|observation)\|>$", "", span) for span in spans],
    # the header is inside the marks
    "gptoss": without("<|start|>assistant"),
    # the generation prompt of X opens the thought
    "qwen3_6": without("<think>\n"),
}
REFUSED_BY_PREFIXES = {
    # drops the empty thought of earlier answers
    ("qwen3", "multi"),
    ("qwen3", "tools"),
    # ends the last answer with another token
    ("gptoss", "multi"),
    ("qwen3_6", "multi"),
    # Their generation prompt opens a thought.
    *itertools.product(["deepseekv3"], ["single", "multi", "system"]),
    *itertools.product(["nemotron_3_nano"], CASES),
}


@needs_trl
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", PAIRS)
def test_prefixes_and_generation_marks_learn_the_same(family: str, case: str) -> None:
    by_prefixes = learned_texts(shipped(family), *CASES[case])
    by_marks = learned_texts(shipped(f"{family}_training"), *CASES[case])
    if (family, case) in REFUSED_BY_PREFIXES:
        assert re.search("not prefix-stable|can only concatenate", by_prefixes)
        assert isinstance(by_marks, list)
    elif isinstance(by_prefixes, str):
        assert isinstance(by_marks, str), "what the one cannot render, the other cannot either"
    else:
        assert DIFFERENCES.get(family, without(""))(by_marks) == by_prefixes


@needs_trl
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", PAIRS)
def test_generation_marks_are_learned_as_transformers_reads_them(family: str, case: str) -> None:
    template, (turns, tools) = shipped(f"{family}_training"), CASES[case]
    made = encoded(template, turns, tools)
    if made.reason is not None:
        assert re.search(r"refuses the conversation|leaves out|do not hold", made.reason)
        return
    theirs = by_transformers(template, turns, tools, return_assistant_tokens_mask=True)
    assert made.input_ids.tolist() == theirs["input_ids"]
    assert made.learned.tolist() == [bool(one) for one in theirs["assistant_masks"]]


@needs_trl
@pytest.mark.parametrize("family", ["qwen2_5", "phi3", "glm4moe", "deepseekv3", "llama3"])
def test_the_last_answers_marks_are_the_last_ones(family: str) -> None:
    template = shipped(f"{family}_training")
    every, last = (
        learned_texts(template, *CASES["multi"], learn=learn) for learn in ("all", "last")
    )
    assert last == every[-1:]
    assert "Fine." in last[0]


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "A:{% generation %}BODY{% endgeneration %}{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", ["llama3", "llama3_training"])
@needs_trl
def test_an_answer_that_is_marked_is_not_learned(template: str) -> None:
    def learned(place: int, learn: str) -> Any:
        turns = [t._replace(masked=n == place) for n, t in enumerate(CASES["multi"][0])]
        return learned_texts(shipped(template), turns, learn=learn)

    first, last = learned(3, "all"), learned(1, "all")
    assert [*first, *last] == learned_texts(shipped(template), *CASES["multi"])
    assert learned(1, "last") == last
    assert learned(3, "last") == "the conversation marks its answers as not to be learned"
    before, after = learned(1, "everything")
    assert "Hi?" in before
    assert "Hello." not in before + after
    assert after.endswith(last[0])


def test_marks_that_do_not_hold_an_answer_are_refused() -> None:
    assert learned_texts(MARKED.replace("BODY", "{{ m.content }}<|e|>"), *CASES["single"]) == [
        "Hello.<|e|>"
    ]
    outside = MARKED.replace("BODY", "").replace("A:", "A:{{ m.content }}")
    assert "generation marks do not hold the text of an answer" in learned_texts(
        outside, *CASES["single"]
    )


@needs_trl
def test_marks_around_nothing_learn_no_token_that_runs_over_them() -> None:
    template = (
        "{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}"
    )
    tokenizer = merging_encoder("qwen2_5").tokenizer
    encoder = Encoder(tokenizer, "chat", 100, template=template)
    (made,) = encoder.examples(table([user("zassistant\n"), assistant(""), user("assistant")]))
    assert tokenizer.convert_ids_to_tokens(made.input_ids.tolist()) == ["z", "assistantĊassistant"]
    assert made.reason == NO_LEARNED_TOKEN


def test_the_last_answers_marks_cannot_be_told_where_earlier_ones_move() -> None:
    moving = MARKED.replace("BODY", "{{ m.content }}{{ messages | length }}")
    assert learned_texts(moving, *CASES["multi"]) == ["Hello.4", "Fine.4"]
    assert "an answer's own generation marks cannot be told" in learned_texts(
        moving, *CASES["multi"], learn="last"
    )


# ---- what prefixes cannot tell

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_all_that_a_template_writes_for_an_answer_is_learned() -> None:
    turns = [user("a"), assistant(" b \n"), user("c"), assistant("d")]
    assert learned_texts(PLAIN, turns) == [" b \n<|e|>\n", "d<|e|>\n"]
    without_token = PLAIN.replace("<|e|>", "")
    assert learned_texts(without_token, turns) == [" b \n\n", "d\n"]


@pytest.mark.parametrize("trimmed", [True, False])
def test_white_space_is_learned_whatever_offsets_a_tokenizer_tells(trimmed: bool) -> None:
    """Some tokenizers leave white space out of their offsets, as if it were not there.

    Others cut and pad on their own.
    """
    from tokenizers import processors

    tokenizer = tokenizer_for(PLAIN.replace("<|e|>\n", ""))
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    (made,) = Encoder(tokenizer, "chat", 100).examples(
        table([user("a"), assistant(" b \n "), user("c "), assistant("d")])
    )
    assert tokenizer.decode(made.input_ids[made.learned]) == " b \n d"
    assert (
        tokenizer.decode(made.input_ids) == "<|user|>a<|assistant|> b \n <|user|>c <|assistant|>d"
    )
    assert (backend.post_processor, backend.truncation) != (None, None), (
        "the tokenizer is left as it was"
    )


def test_a_template_that_closes_the_text_with_the_end_token() -> None:
    closing = PLAIN + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert learned_texts(closing, *CASES["multi"]) == ["Hello.<|e|>\n", f"Fine.<|e|>\n{END}"]


@pytest.mark.parametrize(
    ("change", "reason", "remedy"),
    [
        (("{% for m", "{{ messages | length }}{% for m"), UNLIKE_PROMPT, "or set learn: last"),
        (
            (
                "{{ m.content }}",
                "{{ m.content }}{% if loop.last and loop.index0 % 2 %}!{% endif %}",
            ),
            UNSTABLE,
            "or set learn: last",
        ),
        (
            ("m.content", "m.content | upper"),
            "leaves out what a turn of the role user says",
            "Give another",
        ),
        (
            ("{{ m.content }}", "{{ m.nothing.at_all }}"),
            "'dict object' has no attribute 'nothing'",
            "",
        ),
        (("{{ m.content }}", "{{ 1 + m.content }}"), "TypeError", ""),
        (
            ("{{ m.content }}", "{{ raise_exception('we  only\ntalk') }}"),
            "refuses the conversation: we only talk",
            "",
        ),
    ],
)
def test_templates_that_cannot_be_trusted_are_refused(
    change: tuple[str, str], reason: str, remedy: str
) -> None:
    found = learned_texts(PLAIN.replace(*change), *CASES["multi"])
    assert reason in found
    assert remedy in found
    made = encoded(PLAIN.replace(*change), *CASES["multi"])
    assert len(made.input_ids) == 2
    assert not made.learned.any()


def test_no_other_remedy_is_named_than_one_that_helps() -> None:
    moving = PLAIN.replace("{% for m", "{{ messages | length }}{% for m")
    assert "learn: last" not in learned_texts(moving, *CASES["single"])


def test_an_answer_that_stands_elsewhere_is_refused() -> None:
    elsewhere = (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
        + PLAIN.replace(
            "{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"
        )
    )
    first_only = elsewhere.replace(
        "{% for m in messages if m.role == 'assistant' %}", "{% for m in [] %}"
    )
    assert "leaves out" in learned_texts(first_only, *CASES["single"])
    assert "not prefix-stable" in learned_texts(elsewhere, *CASES["single"])
    # The user says the same words, so they are in the text, but not where the answer belongs.
    assert "does not show the text of an answer" in learned_texts(
        first_only, [user("Ok"), assistant("Ok")]
    )


def test_tools_that_a_template_does_not_know_are_refused() -> None:
    assert "leaves out the tools" in learned_texts(
        PLAIN, *CASES["single"][:1], tools=json.dumps([SCHEMA])
    )
    asking = "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + PLAIN
    for tools, start in (
        (json.dumps([SCHEMA]), '[{"type"'),
        ("[]", "<|user|>"),
        (None, "<|user|>"),
    ):
        (piece,) = ChatRenderer(tokenizer_for(asking), None, "all").example(
            CASES["single"][0], tools
        )
        assert piece.text.startswith(start)


def test_tools_of_which_only_the_calls_are_there_are_refused() -> None:
    calling = PLAIN.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
    )
    assert "leaves out the tools" in learned_texts(calling, *CASES["tools"])
    assert isinstance(learned_texts(calling, CASES["tools"][0]), list)
    asking = "{{ tools | tojson }}" + calling
    assert isinstance(learned_texts(asking, *CASES["tools"]), list)


@pytest.mark.parametrize(
    "arguments", [{"city": "Bern", "day": None}, '{"city": "Bern", "day": null}']
)
@pytest.mark.parametrize(
    "written", ["arguments", "arguments | tojson", "'' + c.function.arguments"]
)
def test_arguments_are_given_as_a_template_takes_them(arguments: Any, written: str) -> None:
    shown = written if "+" in written else f"c.function.{written}"
    template = PLAIN.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ ARGUMENTS }}{% endfor %}".replace("ARGUMENTS", f"({shown})"),
    )
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    said = '{"city": "Bern", "day": null}'
    turns = [user("a"), assistant("", tool_calls=[call])]
    assert learned_texts(template, turns) == [f"f{said}<|e|>\n"]
    (piece,) = ChatRenderer(tokenizer_for(template), None, "all").prompt(
        [*turns, turn("tool", "x"), assistant("b")], None
    )
    assert f"f{said}<|e|>" in piece.text


def test_a_prompt_is_what_comes_before_the_answer_in_training() -> None:
    """Where an answer does not begin with the generation prompt, as that opens a thought."""
    opening = MARKED.replace("BODY", "{{ m.content }}") + (
        "{% if add_generation_prompt %}A:<think>{% endif %}"
    )
    turns = [user("q"), assistant("a"), user("r"), assistant("b"), user("s")]
    (whole,) = ChatRenderer(tokenizer_for(opening), None, "all").example(turns, None)
    (asked,) = ChatRenderer(tokenizer_for(opening), None, "all").prompt(turns, None)
    assert (asked.text, whole.text) == ("U:qA:aU:rA:", "U:qA:aU:rA:bU:s")


def test_text_that_a_template_spells_as_json_is_there() -> None:
    spelling = PLAIN.replace("{{ m.content }}", "{{ m.content | tojson }}")
    assert learned_texts(spelling, [user('a "b"\n'), assistant('"é"')]) == ['"\\"é\\""<|e|>\n']


CUTTING = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
CUT = "leaves out the thought of an answer"


def test_the_thought_of_a_learned_answer_must_be_there() -> None:
    turns = [
        user("a"),
        assistant("<think>hm</think>\nb"),
        user("c"),
        assistant("<think>so</think>d"),
    ]
    assert CUT in learned_texts(CUTTING, turns)
    assert learned_texts(PLAIN, turns) == [
        "<think>hm</think>\nb<|e|>\n",
        "<think>so</think>d<|e|>\n",
    ]
    earlier = CUTTING.replace("m.content.split", "m.content if loop.last else m.content.split")
    assert learned_texts(earlier, turns, learn="last") == ["<think>so</think>d<|e|>\n"]
    optional = Encoder(tokenizer_for(CUTTING), "chat", 100, thoughts=False)
    (made,) = optional.examples(table(turns))
    assert optional.tokenizer.decode(made.input_ids[made.learned]) == "\nb<|e|>\nd<|e|>\n"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_in_a_field_of_its_own_must_be_there(key: str) -> None:
    turns = [user("a"), assistant("b", **{key: " hm\n"})]
    assert CUT in learned_texts(PLAIN, turns)
    showing = PLAIN.replace("{{ m.content }}", "{{ m.KEY or '' }}{{ m.content }}")
    showing = showing.replace("KEY", key)
    assert learned_texts(showing, turns) == [" hm\nb<|e|>\n"]
    assert learned_texts(PLAIN, [user("a"), assistant("b", **{key: ""})]) == ["b<|e|>\n"]


def test_a_conversation_without_an_answer() -> None:
    assert learned_texts(PLAIN, [user("a")]) == "the conversation has no assistant turn"
    assert (
        learned_texts(PLAIN, [user("a")], learn="everything")
        == "the conversation has no assistant turn"
    )
    assert learned_texts(PLAIN, [user("a"), assistant("b"), user("c")]) == ["b<|e|>\n"]


# ---- what templates are given


def test_templates_get_every_field_of_a_turn_and_arguments_as_objects() -> None:
    template = (
        "{% for m in messages %}{{ m | tojson(sort_keys=true) }}{% endfor %}{{ tools | tojson }}"
    )
    text_call = {"function": {"name": "f", "arguments": '{"a": [1]}'}, "id": "x"}
    odd_call = {"function": {"name": "g", "arguments": "not JSON"}}
    turns = [
        Turn("user", "one", "two"),
        assistant("three", tool_calls=[text_call, odd_call], weight=0.5, reasoning_content="hm"),
    ]
    (piece,) = ChatRenderer(tokenizer_for(template), None, "everything").example(turns, None)
    asked, answered = (
        json.loads(part) for part in re.findall(r"\{.*?\}(?=\{\"content|none|null)", piece.text)
    )
    assert asked == {"role": "user", "content": "one\ntwo"}
    assert answered["tool_calls"][0]["function"]["arguments"] == {"a": [1]}
    assert answered["tool_calls"][1]["function"]["arguments"] == "not JSON"
    assert (answered["weight"], answered["reasoning_content"], answered["role"]) == (
        0.5,
        "hm",
        "assistant",
    )


def test_a_date_in_a_template_is_always_the_same() -> None:
    dated = "\n{{ strftime_now('%d %b %Y|%Y-%m-%d|%d %B %Y') }}" + PLAIN
    (piece,) = ChatRenderer(tokenizer_for(dated), None, "all").example(*CASES["single"])
    assert piece.text.startswith("\n26 Jul 2024|2024-07-26|26 July 2024<|user|>")


@needs_trl
def test_llamas_date() -> None:
    (piece,) = ChatRenderer(tokenizer_for(shipped("llama3_2")), None, "all").example(
        *CASES["single"]
    )
    assert "Today Date: 26 Jul 2024\n" in piece.text


@pytest.mark.parametrize(
    "where",
    [
        [user("say <|e|>"), assistant("b")],
        [user("a"), assistant("b<|e|>")],
        [turn("system", "<|e|>"), user("a"), assistant("b")],
        [Turn("user", "a", "x<|e|>"), assistant("b")],
        [
            user("a"),
            assistant("b", tool_calls=[{"function": {"name": "f", "arguments": '{"<|e|>": 1}'}}]),
        ],
        [user("a", name="<|e|>"), assistant("b")],
    ],
)
@pytest.mark.parametrize("learn", ["all", "everything"])
def test_the_name_of_a_special_token_is_never_made_one(where: list[Turn], learn: str) -> None:
    assert "the name of the special token <|e|>" in learned_texts(PLAIN, where, learn=learn)
    with pytest.raises(UserError, match=r"example_id 0: .*special token <\|e\|>"):
        encoder_for(PLAIN).prompts(table([*where, user("more"), assistant("c")]))


def test_of_two_special_tokens_that_begin_alike_the_longer_one_is_meant() -> None:
    tokenizer = tokenizer_for(PLAIN)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|e|>\n", "<|user|>", "<|assistant|>", "<|e|>"]}
    )
    encoder = Encoder(tokenizer, "chat", 100)
    assert encoder.stops == [encoder.end, tokenizer.convert_tokens_to_ids("<|e|>\n")]
    (made,) = encoder.examples(table([user("<|e|>\n"), assistant("b")]))
    assert "special token <|e|>\n," in str(made.reason)


def test_what_is_one_token_without_being_special_is_text() -> None:
    tokenizer = tokenizer_for(PLAIN)
    tokenizer.add_tokens(["<think>"])
    encoder = Encoder(tokenizer, "chat", 100)
    (made,) = encoder.examples(table([user("<think>"), assistant("<think>b")]))
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert made.input_ids.tolist().count(think) == 2
    assert made.learned[made.input_ids == think].tolist() == [False, True]
    tokenizer.chat_control_tokens = ["<think>"]
    (refused,) = Encoder(tokenizer, "chat", 100).examples(table([user("<think>"), assistant("b")]))
    assert "<think>" in str(refused.reason)


# ---- the encoder with a template


def test_prompts_end_with_the_generation_prompt() -> None:
    encoder = encoder_for(PLAIN)
    (prompt,) = encoder.prompts(table(*CASES["multi"]))
    assert (
        encoder.tokenizer.decode(prompt)
        == "<|user|>Hi?<|e|>\n<|assistant|>Hello.<|e|>\n<|user|>More?<|e|>\n<|assistant|>"
    )
    made = encoded(PLAIN, *CASES["multi"])
    assert made.input_ids.tolist()[: len(prompt)] == prompt


@needs_trl
@pytest.mark.parametrize(
    ("family", "token"),
    [
        ("gemma", "<end_of_turn>"),
        ("llama3", "<|eot_id|>"),
        ("phi3", "<|end|>"),
        ("cohere2", "<|END_RESPONSE|>"),
    ],
)
def test_answers_stop_at_the_end_token_and_at_the_templates_own(family: str, token: str) -> None:
    encoder = encoder_for(shipped(family))
    assert encoder.stops == [encoder.end, encoder.tokenizer.convert_tokens_to_ids(token)]


def test_a_given_template_is_used_in_place_of_the_tokenizers() -> None:
    encoder = Encoder(
        tokenizer_for(None),
        "chat",
        100,
        template="{% for m in messages %}{{ m.content }};{% endfor %}",
    )
    (made,) = encoder.examples(table(*CASES["single"]))
    assert encoder.tokenizer.decode(made.input_ids) == "Hi?;Hello.;"
    assert made.learned.tolist() == [False] * 4 + [True] * 7


def test_tokenizers_and_templates_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"no chat template.*prompt: alpaca or plain"):
        Encoder(tokenizer_for(None), "chat", 100)
    with pytest.raises(
        UserError, match=r"reading the chat template: line 2: .*name another as `template`"
    ):
        Encoder(tokenizer_for("\n{% for %}"), "chat", 100)
    Encoder(tokenizer_for("{{ raise_exception('no rows like yours') }}"), "chat", 100)


def test_a_tokenizer_with_several_templates_uses_the_one_for_tools() -> None:
    tokenizer = tokenizer_for(PLAIN)
    tokenizer.chat_template = {"default": PLAIN, "tool_use": "{{ tools[0].function.name }}" + PLAIN}
    for tools, start in ((None, "<|user|>Hi?"), (json.dumps([SCHEMA]), "weather<|user|>Hi?")):
        (piece,) = ChatRenderer(tokenizer, None, "all").example(CASES["single"][0], tools)
        assert piece.text.startswith(start)


# ---- any conversation


NAMES = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", END, "<s>", "<|pad|>"]
contents = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=8),
        st.sampled_from(
            [*NAMES, "assistant\n", "\n", " ", "model", "</s>", "é", "🎉", "{{ x }}", "{%"]
        ),
    ),
    max_size=4,
).map("".join)
STABLE = [
    "qwen2_5",
    "llama3",
    "gemma3",
    "phi3",
    "lfm2",
    "llama3_training",
    "gemma_training",
    "qwen3_training",
]


def texts(pieces: list[Piece]) -> tuple[list[str], list[str]]:
    """The learned texts, and the masked ones around them."""
    (piece,) = pieces
    borders = [0, *itertools.chain.from_iterable(piece.spans), len(piece.text)]
    parts = [piece.text[first:end] for first, end in itertools.pairwise(borders)]
    return parts[1::2], parts[::2]


@cache
def chat_for(family: str, learn: str = "all") -> ChatRenderer:
    return ChatRenderer(tokenizer_for(shipped(family)), None, learn)


@needs_trl
@settings(max_examples=150, deadline=None)
@given(
    said=st.lists(st.tuples(contents, contents), min_size=1, max_size=3),
    system=st.none() | contents,
    family=st.sampled_from(STABLE),
)
def test_learned_text_depends_on_the_answers_alone_and_masked_text_on_all_else(
    said: list[tuple[str, str]], system: str | None, family: str
) -> None:
    system = None if family == "gemma_training" else system

    def render(
        asked: list[str], answered: list[str], first: str | None
    ) -> tuple[list[str], list[str]]:
        turns = [t for a, b in zip(asked, answered, strict=True) for t in (user(a), assistant(b))]
        turns = [turn("system", first), *turns] if first is not None else turns
        return texts(chat_for(family).example(turns, None))

    asked, answered = (list(side) for side in zip(*said, strict=True))
    chat = chat_for(family)
    held = [
        name
        for name in chat.names
        if any(name in text for text in [*asked, *answered, system or ""])
    ]
    if held:
        with pytest.raises(Refused, match="special token") as refused:
            render(asked, answered, system)
        assert any(name in str(refused.value) for name in held)
        return
    learned, masked = render(asked, answered, system)
    assert len(learned) == len(answered)
    for text, answer in zip(learned, answered, strict=True):
        assert answer.strip() in text
    assert render(["x"] * len(asked), answered, None if system is None else "y")[0] == learned
    assert render(asked, ["z"] * len(answered), system)[1] == masked


@needs_trl
@settings(max_examples=60, deadline=None)
@given(
    said=st.lists(st.tuples(contents, contents), min_size=1, max_size=3),
    family=st.sampled_from(STABLE),
)
def test_a_token_is_learned_if_a_character_of_it_is(
    said: list[tuple[str, str]], family: str
) -> None:
    turns = [t for a, b in said for t in (user(a), assistant(b))]
    encoder = merging_encoder(family)
    (made,) = encoder.examples(table(turns))
    if made.reason is not None:
        assert "special token" in made.reason
        return
    (piece,) = chat_for(family).example(turns, None)
    tokens = encoder.tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True)
    assert made.input_ids.tolist() == tokens["input_ids"]
    expected = [
        any(first < end and last > begin for begin, end in piece.spans)
        for first, last in tokens["offset_mapping"]
    ]
    assert made.learned.tolist() == [False, *expected[1:]]


@cache
def merging_encoder(family: str) -> Encoder:
    """An encoder whose tokens run over the borders of turns where these have no special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        ["assistant\n model\n\n assistant\nassistant", "\n\nassistant\n é🎉"] * 9, trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token="<s>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|end|>", *sorted(set(SPECIAL.findall(shipped(family))))],
    )
    fast.chat_template = shipped(family)
    return Encoder(fast, "chat", 100_000)


@needs_trl
def test_tokens_over_the_border_of_a_turn_are_there_to_be_tested() -> None:
    encoder = merging_encoder("qwen2_5")
    (made,) = encoder.examples(table([user("a"), assistant("assistant")]))
    first = int(np.argmax(made.learned))
    assert encoder.tokenizer.decode(made.input_ids[first : first + 1]) == "assistant\nassistant"
