"""Conversations to text, with the ranges of characters that are learned.

Two ways. `Written` spells a conversation under headings of our own: the paper's alpaca prompt, or its bare texts (`plain`). `Chat` lets
a chat template do it, as transformers renders it, and finds what is learned by the template's generation marks; where it has none, by
rendering the conversation up to each answer and after it, which is only believed if both are prefixes of the whole text.

A row that cannot be rendered faithfully is refused with a reason that many rows may share; it is never masked by guess.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from s2l_ray.errors import UserError

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
THOUGHT_END = "</think>"
LONGEST_WORDS = 200  # of a template's own message that enter a reason
MARKS = "Give a template with generation marks (training field `template`)"
# Some templates print today's date. The tokens of a row must not depend on the day, so it is always this one, which the
# templates of Llama 3.1 and later print where they know no date.
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%y', '24') | replace('%Y', '2024') | replace('%A', 'Friday') }}{% endmacro +%}"
)


class Turn(NamedTuple):
    """One turn of a conversation, as tables.MESSAGES has it."""

    role: str
    content: str
    input: str | None = None
    extra: str | None = None


class Piece(NamedTuple):
    """Text that is tokenised by itself. A row is one piece or several, the end token after each of them.

    Attributes:
        spans: ranges [first, end) of characters that are learned, in order.
        end: whether the end token that follows is learned; None where none follows.
    """

    text: str
    spans: Sequence[tuple[int, int]] = ()
    end: bool | None = None


class Refused(ValueError):
    """A row that cannot be rendered; the message is the reason, for people and for counting."""


class Renderer(Protocol):
    """How rows become text. `tools` is JSON text of a list of schemas, or None."""

    def example(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """The whole conversation, for training and scoring. Raises Refused."""

    def prompt(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """Everything before the last assistant turn, and what makes the model answer. Raises Refused."""


def last_answer(turns: Sequence[Turn]) -> int:
    """Place of the last assistant turn. Raises Refused where there is none."""
    for number in range(len(turns) - 1, -1, -1):
        if turns[number].role == "assistant":
            return number
    raise Refused("the conversation has no assistant turn")


def answer_text(turn: Turn) -> str:
    """What an assistant turn says, without a template: its content, then the JSON of the tools it calls."""
    calls = tool_calls(turn)
    if not calls:
        return turn.content
    text = json.dumps(calls, ensure_ascii=False)
    return f"{turn.content}\n{text}" if turn.content else text


def tool_calls(turn: Turn) -> list[Any]:
    """The tool calls of a turn, as they stand in its extra fields."""
    calls = json.loads(turn.extra).get("tool_calls") if turn.extra else None
    return calls if isinstance(calls, list) else []


# ---- headings of our own


@dataclass(frozen=True)
class Style:
    """Texts around the turns: what opens a conversation (with and without input), stands before and after each text, asks for an answer."""

    opening: str
    opening_with_input: str
    headings: dict[str, str]
    after: str
    cue: str


STYLES = {
    # The paper's prompt. Its first sentences say what a system turn says, which therefore takes their place.
    "alpaca": Style(
        opening="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        opening_with_input="Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.",
        headings={
            name: f"\n\n### {name.capitalize()}:\n"
            for name in ("instruction", "input", "system", "tool", "tools")
        },
        after="",
        cue="\n\n### Response:",
    ),
    "plain": Style(
        opening="",
        opening_with_input="",
        headings=dict.fromkeys(("instruction", "input", "system", "tool", "tools"), ""),
        after="\n",
        cue="",
    ),
}


class Written:
    """Conversations under the headings of a style. Each answer ends a piece, so that the end token follows it.

    A system turn at the start takes the place of the style's opening. Of the extra fields of a turn only tool calls are written, as
    JSON after the answer's text: other fields mean something to chat templates alone.
    """

    def __init__(self, style: str, learn: str) -> None:
        self.style, self.learn = STYLES[style], learn

    def example(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """One piece an answer, with all that comes before it; turns after the last answer are masked text."""
        last = last_answer(turns)
        everything = self.learn == "everything"
        pieces = []
        for number, masked in self._masked(turns, tools):
            if number == len(turns):
                pieces.append(Piece(masked, [(0, len(masked))] if everything else []))
                continue
            text = masked + answer_text(turns[number])
            learned = self.learn != "last" or number == last
            span = (0 if everything else len(masked), len(text))
            pieces.append(Piece(text, [span] if learned else [], learned))
        return pieces

    def prompt(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """The pieces of the earlier answers, then the text that the last one follows."""
        last = last_answer(turns)
        return [
            Piece(masked)
            if number == last
            else Piece(masked + answer_text(turns[number]), (), False)
            for number, masked in self._masked(turns[: last + 1], tools)
        ]

    def _masked(self, turns: Sequence[Turn], tools: str | None) -> Iterator[tuple[int, str]]:
        """Place of each assistant turn and the masked text before it; at the end the number of turns, if text is left."""
        masked = self._opening(turns, tools)
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                yield number, masked + self.style.cue
                masked = ""
            elif number or turn.role != "system":
                masked += self._block(
                    "instruction" if turn.role == "user" else turn.role, turn.content
                )
                if turn.input:
                    masked += self._block("input", turn.input)
        if masked:
            yield len(turns), masked

    def _opening(self, turns: Sequence[Turn], tools: str | None) -> str:
        style, first = self.style, turns[0]
        if first.role == "system" and first.content:
            opening = first.content + style.after
        else:
            user = next((turn for turn in turns if turn.role == "user"), first)
            opening = style.opening_with_input if user.input else style.opening
        return opening + self._block("tools", tools) if tools else opening

    def _block(self, name: str, text: str) -> str:
        return self.style.headings[name] + text + self.style.after


# ---- chat templates


@dataclass(frozen=True)
class _Script:
    """One conversation as a template is given it, to be rendered up to any of its turns."""

    chat: "Chat"
    template: str
    turns: Sequence[Turn]
    messages: list[dict[str, Any]]
    schemas: list[Any] | None

    def render(self, count: int, prompt: bool = False) -> str:
        """The text of the first `count` turns, with the generation prompt if asked for."""
        return self._render(count, prompt, False)[0]

    def marked(self, count: int) -> tuple[str, list[tuple[int, int]]]:
        """The text of the first `count` turns, and the ranges between the template's generation marks."""
        return self._render(count, False, True)

    def _render(self, count: int, prompt: bool, marked: bool) -> tuple[str, list[tuple[int, int]]]:
        import jinja2

        try:
            texts, marks = self.chat.engine(
                [self.messages[:count]],
                tools=self.schemas,
                chat_template=self.template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self.chat.variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"reading the chat template: line {error.lineno}: {error.message}. Correct the template, or name another as `template`."
            ) from None
        except (
            Exception
        ) as error:  # a template is a program run on users' rows: it may fail in any way
            named = (
                str(error)
                if isinstance(error, jinja2.TemplateError)
                else f"{type(error).__name__}: {error}"
            )
            words = " ".join(named.split())[:LONGEST_WORDS]
            raise Refused(f"the chat template refuses the conversation: {words}") from None
        return str(texts[0]), [(first, end) for first, end in marks[0]] if marked else []


class Chat:
    """Conversations by a chat template: the tokenizer's own, or a given one.

    `closing` is the special token that ends an answer by this template, as far as it shows on a conversation of two turns.

    Raises:
        UserError: there is no template, or it is not Jinja.
    """

    def __init__(self, tokenizer: Any, template: str | None, learn: str) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        if template is None and not tokenizer.chat_template:
            raise UserError(
                "loading the tokenizer: prompt is chat, but the tokenizer has no chat template. Name a file with one as `template`, "
                "name the tokenizer of a chat model, or use prompt: alpaca or plain."
            )
        self.engine: Any = render_jinja_template
        self.tokenizer, self.given, self.learn = tokenizer, template, learn
        self.variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.end_text: str = tokenizer.eos_token or ""
        self.names = special_names(tokenizer)
        self.special = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        self.closing = self._closing()

    def example(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """One piece, as the template writes its end tokens itself."""
        last = last_answer(turns)
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        learned = [last] if self.learn == "last" else answers
        script = self._script(turns, tools)
        by_marks = GENERATION.search(script.template) is not None
        text, marks = script.marked(len(turns)) if by_marks else (script.render(len(turns)), [])
        _refuse_what_is_left_out(script, text)
        if self.learn == "everything":
            spans = [(0, len(text))]
        elif by_marks:
            spans = self._by_marks(script, text, marks, learned)
        else:
            spans = [self._by_prefixes(script, text, number) for number in learned]
        return [Piece(text, [(first, end) for first, end in spans if first < end])]

    def prompt(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """One piece: the earlier turns and the template's generation prompt."""
        return [Piece(self._script(turns, tools).render(last_answer(turns), prompt=True))]

    def _script(self, turns: Sequence[Turn], tools: str | None) -> _Script:
        """What the template is given. Refused where a text holds a special token's name, which would become that token."""
        messages = [_message(turn) for turn in turns]
        schemas = (json.loads(tools) if tools else None) or None
        for text in _texts([messages, schemas]):
            found = self.special.search(text)
            if found:
                raise Refused(
                    f"a text holds the name of the special token {found[0]}, which a chat template would turn into the token"
                )
        template: str = self.given or self.tokenizer.get_chat_template(None, schemas)
        if "strftime_now" in template:
            template = FIXED_DATE + template
        return _Script(self, template, turns, messages, schemas)

    def _by_marks(
        self, script: _Script, text: str, marks: list[tuple[int, int]], learned: list[int]
    ) -> list[tuple[int, int]]:
        """All generation marks, or those that the last answer adds."""
        if self.learn == "last":
            before, earlier = script.marked(learned[0]) if learned[0] else ("", [])
            reached = earlier[-1][1] if earlier else 0
            if marks[: len(earlier)] != earlier or text[:reached] != before[:reached]:
                raise Refused(
                    "the chat template renders an earlier answer differently once the conversation goes on, so the last one's "
                    f"generation marks cannot be told. {MARKS} that does not, or set learn: all"
                )
            marks = marks[len(earlier) :]
        said = "".join(text[first:end] for first, end in marks)
        if not all(_shows(said, script.turns[number]) for number in learned):
            raise Refused(
                f"the chat template's generation marks do not hold the text of an answer. {MARKS} that do"
            )
        return marks

    def _by_prefixes(self, script: _Script, text: str, number: int) -> tuple[int, int]:
        """What an answer adds to the whole text: from the generation prompt before it to where the text of its turn ends."""
        remedy = MARKS if number == last_answer(script.turns) else f"{MARKS}, or set learn: last"
        opened = script.render(number, prompt=True)
        if not text.startswith(opened):
            raise Refused(
                f"the chat template is not prefix-stable: an answer does not begin with the generation prompt. {remedy}"
            )
        closed = text
        if number < len(script.turns) - 1:
            closed = script.render(number + 1)
            if not text.startswith(
                closed
            ):  # some templates write the end token after the last turn only
                closed = closed.removesuffix(self.end_text)
            if not text.startswith(closed):
                raise Refused(
                    "the chat template is not prefix-stable: an answer is rendered differently once the conversation goes on. "
                    f"{remedy}"
                )
        if not _shows(text[len(opened) : len(closed)], script.turns[number]):
            raise Refused(
                f"the chat template does not show the text of an answer where it belongs. {remedy}"
            )
        said = closed.rstrip()
        # White space after the token that closes a turn is the template's: the model has stopped by then.
        return len(opened), len(said) if said.endswith(tuple(self.names)) else len(closed)

    def _closing(self) -> list[str]:
        turns = [Turn("user", "Question"), Turn("assistant", "Answer")]
        try:
            text = self._script(turns, None).render(len(turns))
        except Refused:
            return []
        return self.special.findall(text.rpartition("Answer")[2])[:1]


def special_names(tokenizer: Any) -> list[str]:
    """The texts that a tokenizer turns into special tokens wherever they stand, longest first."""
    further = tokenizer.chat_control_tokens or ()
    tokens = tokenizer.added_tokens_decoder.values()
    return sorted(
        {token.content for token in tokens if token.special or token.content in further},
        key=lambda name: (-len(name), name),
    )


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as chat templates want it: tool arguments are objects, though OpenAI's files have them as JSON text."""
    extra = json.loads(turn.extra) if turn.extra else {}
    for call in extra.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):  # not JSON: the template gets the text
                function["arguments"] = json.loads(function["arguments"])
    content = f"{turn.content}\n{turn.input}" if turn.input else turn.content
    return {**extra, "role": turn.role, "content": content}


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _shows(text: str, turn: Turn) -> bool:
    """Whether a rendered text has a turn's content and the names of the tools it calls, as they are or as JSON spells them.

    Of an answer with a thought in it only what follows the thought counts, as templates rearrange or drop thoughts.
    """
    content = turn.content.rpartition(THOUGHT_END)[2] if turn.role == "assistant" else turn.content
    wanted = [content.strip(), (turn.input or "").strip(), *_function_names(tool_calls(turn))]
    return all(
        part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in wanted
    )


def _function_names(tools: list[Any]) -> list[str]:
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return [str(function.get("name", "")) for function in functions if isinstance(function, dict)]


def _refuse_what_is_left_out(script: _Script, text: str) -> None:
    """Some templates silently drop the turns, the tool calls or the tools that they do not know."""
    for turn in script.turns:
        if not _shows(text, turn):
            raise Refused(
                f"the chat template leaves out what a turn of the role {turn.role} says. Give another template"
            )
    if not all(name in text for name in _function_names(script.schemas or [])):
        raise Refused("the chat template leaves out the tools. Give another template")
