"""What people see on a terminal: names and texts of others as they are, never as its commands.

Names of sources, files and variants are written by others, and so are texts of rows. Nothing in
them styles a table, opens a link or steers the terminal.
"""

import logging
import re
import sys
from typing import Any, TextIO

import rich.console
from rich.style import Style
from rich.text import Text

from s2l_ray.errors import without_credentials

WIDTH = 118
# Control characters but tab and newline, marks that turn the direction of writing, and halves of
# characters, which no encoding takes.
UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text without what would steer the terminal; each such character is replaced."""
    return UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", text)


def shown(text: str) -> str:
    """The text as people may see it: printable, and without the credentials of URIs."""
    return printable(without_credentials(text))


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, which is not wrapped: it may hold a path that is to be copied."""
    print(shown(text), file=stream or sys.stdout)


class Console(rich.console.Console):
    """A console on which plain strings, as in cells and titles of tables, stay plain strings."""

    def __init__(self, stderr: bool = False, wide: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)
        if wide:
            self.width = max(WIDTH, self.width)

    def render_str(self, text: str, *, style: str | Style = "", **options: Any) -> Text:
        return super().render_str(shown(text), style=style, **options)


class ShownRecords(logging.Filter):
    """Log lines as people may see them."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = shown(logging.Formatter().formatException(record.exc_info))
        return True
