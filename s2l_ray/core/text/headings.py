"""Conversations under headings of our own: the paper's alpaca prompt, or bare texts (`plain`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from s2l_ray.core.text.rendering import Piece
from s2l_ray.core.text.turns import Turn, answer_text, last_answer, learned_answers

HEADINGS = ("instruction", "input", "system", "tool", "tools")


@dataclass(frozen=True)
class Style:
    """Texts that stand around the turns of a conversation.

    Attributes:
        opening: stands first; `opening_with_input` does where an instruction has an input.
        headings: the text before each turn, by what the turn holds (HEADINGS).
        after: the text after each turn but answers.
        cue: the text that asks for an answer.
    """

    opening: str
    opening_with_input: str
    headings: dict[str, str]
    after: str
    cue: str


STYLES = {
    # Stanford Alpaca's prompt, which S2L uses. Its opening takes the place of a system turn.
    "alpaca": Style(
        opening=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
        opening_with_input=(
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request."
        ),
        headings={name: f"\n\n### {name.capitalize()}:\n" for name in HEADINGS},
        after="",
        cue="\n\n### Response:",
    ),
    "plain": Style(
        opening="",
        opening_with_input="",
        headings=dict.fromkeys(HEADINGS, ""),
        after="\n",
        cue="",
    ),
}


class HeadingRenderer:
    """Renders conversations under the headings of a style, each answer at the end of a piece.

    A system turn at the start replaces the style's opening. Of the extra fields of a turn only tool
    calls are written, as JSON after the answer's text: the others have a meaning for chat templates
    only.
    """

    def __init__(self, style: str, learn: str) -> None:
        self.style, self.learn = STYLES[style], learn

    def example(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """One piece an answer, with all text before it; turns after the last answer are masked."""
        answers = learned_answers(turns, self.learn)
        everything = self.learn == "everything"
        pieces = []
        for number, masked in self._masked(turns, tools):
            if number == len(turns):
                pieces.append(Piece(masked, [(0, len(masked))] if everything else []))
                continue
            text = masked + answer_text(turns[number])
            learned = number in answers
            first, end = 0 if everything else len(masked), len(text) if learned else len(masked)
            pieces.append(Piece(text, [(first, end)] if first < end else [], learned))
        return pieces

    def prompt(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """The pieces of the earlier answers, then the text before the last one."""
        last = last_answer(turns)
        return [
            Piece(masked)
            if number == last
            else Piece(masked + answer_text(turns[number]), (), False)
            for number, masked in self._masked(turns[: last + 1], tools)
        ]

    def _masked(self, turns: Sequence[Turn], tools: str | None) -> Iterator[tuple[int, str]]:
        """The place of each assistant turn, and the text between it and the answer before.

        Text after the last answer comes with the number of turns as its place.
        """
        masked = self._opening(turns, tools)
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                yield number, masked + self.style.cue
                masked = ""
            elif number or turn.role != "system":
                heading = "instruction" if turn.role == "user" else turn.role
                masked += self._block(heading, turn.content)
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

    def _block(self, heading: str, text: str) -> str:
        return self.style.headings[heading] + text + self.style.after
