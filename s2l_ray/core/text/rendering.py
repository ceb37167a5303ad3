"""What a renderer makes of a conversation: texts with the ranges of characters that are learned."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from s2l_ray.core.text.turns import Turn


class Piece(NamedTuple):
    """Text that is tokenised by itself: a row, or a part of it that an end token follows.

    Attributes:
        spans: ranges [first, end) of characters that are learned, in order.
        end: whether the end token that follows is learned; None where no end token follows.
    """

    text: str
    spans: Sequence[tuple[int, int]] = ()
    end: bool | None = None


class Renderer(Protocol):
    """Renders conversations as text. `tools` is JSON text of a list of schemas, or None.

    A row that cannot be rendered faithfully is refused with a reason that many rows may share. Its
    learned ranges are never guessed.
    """

    def example(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """The whole conversation, for training and scoring. Raises Refused."""

    def prompt(self, turns: Sequence[Turn], tools: str | None) -> list[Piece]:
        """The text from which a model generates the last assistant turn. Raises Refused."""
