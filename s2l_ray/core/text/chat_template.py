"""Conversations by a chat template, with the ranges that are learned.

transformers renders the template. The learned ranges are those between the template's generation
marks. A template without marks is rendered up to each answer, and once more with the answer; the
answer's range is accepted only if both texts are prefixes of the whole conversation's text.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from s2l_ray.core.text.messages import (
    NO_TOOLS,
    function_names,
    message_of,
    refuse_cut_thoughts,
    refuse_omissions,
    refuse_python_arguments,
    shows,
    strings,
)
from s2l_ray.core.text.rendering import Piece
from s2l_ray.core.text.template_limits import limited
from s2l_ray.core.text.turns import (
    Refused,
    Turn,
    last_answer,
    learned_answers,
    tool_calls,
)
from s2l_ray.errors import UserError

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Characters of a template's own error message that enter a reason.
LONGEST_MESSAGE = 200
MARKS = "Give a template with generation marks (training field `template`)"
# Some templates print today's date. The tokens of a row must not depend on the day, so it is always
# this one, which the templates of Llama 3.1 and later print where they know no date.
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%m', '07') | replace('%y', '24')"
    " | replace('%Y', '2024') | replace('%A', 'Friday') }}{% endmacro +%}"
)


@dataclass(frozen=True)
class _Conversation:
    """One conversation as a template gets it, to be rendered up to any of its turns."""

    renderer: "ChatRenderer"
    template: str
    turns: Sequence[Turn]
    messages: list[dict[str, Any]]
    schemas: list[Any] | None

    def text(self, count: int, prompt: bool = False) -> str:
        """The text of the first `count` turns, with the generation prompt if asked for."""
        return self._rendered(count, prompt, False)[0]

    def marked(self, count: int) -> tuple[str, list[tuple[int, int]]]:
        """The text of the first `count` turns, and the ranges between its generation marks."""
        return self._rendered(count, False, True)

    def refuse_unused_tools(self, text: str) -> None:
        """Refuse a text that is the same without the tools, of which only their calls are there."""
        called = "".join(strings(self.messages))
        if self.schemas and all(name in called for name in function_names(self.schemas)):
            try:
                unused = replace(self, schemas=None).text(len(self.turns)) == text
            except Refused:
                # It cannot do without them.
                return
            if unused:
                raise Refused(NO_TOOLS)

    def marks_before(self, text: str, marks: list[tuple[int, int]], number: int) -> int:
        """How many of the generation marks belong to turns before this one."""
        before, earlier = self.marked(number) if number else ("", [])
        reached = earlier[-1][1] if earlier else 0
        if marks[: len(earlier)] != earlier or text[:reached] != before[:reached]:
            raise Refused(
                "the chat template renders an earlier answer differently once the conversation "
                "goes on, so an answer's own generation marks cannot be told. "
                f"{MARKS} that does not, or set learn: all"
            )
        return len(earlier)

    def by_prefixes(self, text: str, number: int) -> tuple[int, int]:
        """The range of an answer: from the end of its generation prompt to the end of its turn."""
        turns = self.turns
        remedy = MARKS if number == last_answer(turns) else f"{MARKS}, or set learn: last"
        opened = self.text(number, prompt=True)
        if not text.startswith(opened):
            raise Refused(
                "the chat template is not prefix-stable: an answer does not begin with the "
                f"generation prompt. {remedy}"
            )
        closed = text
        if number < len(turns) - 1:
            closed = self.text(number + 1)
            # Some templates write the end token after the last turn only.
            if not text.startswith(closed):
                closed = closed.removesuffix(self.renderer.end_text)
            if not text.startswith(closed):
                raise Refused(
                    "the chat template is not prefix-stable: an answer is rendered differently "
                    f"once the conversation goes on. {remedy}"
                )
        if not shows(text[len(opened) : len(closed)], turns[number]):
            raise Refused(
                f"the chat template does not show the text of an answer where it belongs. {remedy}"
            )
        return len(opened), len(closed)

    def _rendered(
        self, count: int, prompt: bool, marked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        import jinja2

        try:
            with limited():
                texts, marks = self.renderer.engine(
                    [self.messages[:count]],
                    tools=self.schemas,
                    chat_template=self.template,
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=prompt,
                    **self.renderer.variables,
                )
        except UserError:
            # Of the limits: not this conversation is at fault.
            raise
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"reading the chat template: line {error.lineno}: {error.message}. Correct the "
                "template, or name another as `template`."
            ) from None
        # A template is a program that runs on users' rows: it may raise anything.
        except Exception as error:
            known = isinstance(error, jinja2.TemplateError)
            message = str(error) if known else f"{type(error).__name__}: {error}"
            message = " ".join(message.split())[:LONGEST_MESSAGE]
            raise Refused(f"the chat template refuses the conversation: {message}") from None
        return str(texts[0]), [(first, end) for first, end in marks[0]] if marked else []


class ChatRenderer:
    """Renders conversations by a chat template: the tokenizer's own, or a given one.

    Attributes:
        closing: the special token that ends an answer by this template, as a list of at most one;
            it is looked for in a conversation of two turns.

    Raises:
        UserError: there is no template, or it is not Jinja.
    """

    def __init__(
        self, tokenizer: Any, template: str | None, learn: str, thoughts: bool = True
    ) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        if template is None and not tokenizer.chat_template:
            raise UserError(
                "loading the tokenizer: prompt is chat, but the tokenizer has no chat template. "
                "Name a file with one as `template`, name the tokenizer of a chat model, or use "
                "prompt: alpaca or plain."
            )
        self.engine: Any = render_jinja_template
        self.tokenizer, self.given, self.learn = tokenizer, template, learn
        self.thoughts = thoughts
        self.variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.end_text: str = tokenizer.eos_token or ""
        self.names = special_names(tokenizer)
        self.special = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        self.closing = self._closing()

    def example(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """One piece, as the template writes its end tokens itself."""
        learned = learned_answers(turns, self.learn)
        conversation, text, marks = self._whole(turns, tools)
        if self.thoughts:
            refuse_cut_thoughts([turns[number] for number in learned], text)
        masked = [number for number, turn in enumerate(turns) if turn.masked]
        wanted = masked if self.learn == "everything" else learned
        if not wanted:
            spans = []
        elif marks is not None:
            spans = self._by_marks(conversation, text, marks, wanted)
        else:
            spans = [conversation.by_prefixes(text, number) for number in wanted]
        if self.learn == "everything":
            borders = [0, *itertools.chain.from_iterable(spans), len(text)]
            spans = list(zip(borders[::2], borders[1::2], strict=True))
        return [Piece(text, [(first, end) for first, end in spans if first < end])]

    def prompt(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """One piece: the earlier turns and the template's generation prompt, or what comes before
        the answer in training where the template does not begin an answer with that prompt."""
        last = last_answer(turns)
        conversation, text, marks = self._whole(turns[: last + 1], tools)
        opened = conversation.text(last, prompt=True)
        if marks is not None and not text.startswith(opened):
            opened = text[: self._by_marks(conversation, text, marks, [last])[0][0]]
        return [Piece(opened)]

    def _whole(
        self, turns: Sequence[Turn], tools: str | None
    ) -> tuple[_Conversation, str, list[tuple[int, int]] | None]:
        """The conversation, its text, and the ranges between generation marks if there are any.

        Some templates take the arguments of a tool call as an object and some as JSON text.
        """
        refused: Refused | None = None
        for as_text in (False, True) if any(map(tool_calls, turns)) else (False,):
            conversation = self._conversation(turns, tools, as_text)
            try:
                if GENERATION.search(conversation.template):
                    text, marks = conversation.marked(len(turns))
                else:
                    text, marks = conversation.text(len(turns)), None
                refuse_omissions(turns, conversation.schemas, text)
                conversation.refuse_unused_tools(text)
                refuse_python_arguments(conversation.messages, text)
            except Refused as reason:
                refused = refused or reason
            else:
                return conversation, text, marks
        raise refused or AssertionError

    def _conversation(
        self, turns: Sequence[Turn], tools: str | None, as_text: bool = False
    ) -> _Conversation:
        """What the template gets.

        Raises:
            Refused: a text holds a special token's name, which would become that token.
        """
        messages = [message_of(turn, as_text) for turn in turns]
        schemas = (json.loads(tools) if tools else None) or None
        for text in strings([messages, schemas]):
            found = self.special.search(text)
            if found:
                raise Refused(
                    f"a text holds the name of the special token {found[0]}, which a chat template "
                    "would turn into the token"
                )
        template: str = self.given or self.tokenizer.get_chat_template(None, schemas)
        if "strftime_now" in template:
            template = FIXED_DATE + template
        return _Conversation(self, template, turns, messages, schemas)

    def _by_marks(
        self,
        conversation: _Conversation,
        text: str,
        marks: list[tuple[int, int]],
        learned: list[int],
    ) -> list[tuple[int, int]]:
        """The generation marks of the learned answers."""
        answers = [n for n, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        if learned != answers:
            following = dict(itertools.pairwise(answers))
            spans = []
            for number in learned:
                first = conversation.marks_before(text, marks, number)
                after = following.get(number)
                end = None if after is None else conversation.marks_before(text, marks, after)
                spans += marks[first:end]
            marks = spans
        said = "".join(text[first:end] for first, end in marks)
        if not all(shows(said, conversation.turns[number]) for number in learned):
            raise Refused(
                "the chat template's generation marks do not hold the text of an answer. "
                f"{MARKS} that do"
            )
        return marks

    def _closing(self) -> list[str]:
        turns = [Turn("user", "Question"), Turn("assistant", "Answer")]
        try:
            text = self._conversation(turns, None).text(len(turns))
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
