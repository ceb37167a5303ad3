"""The turns of conversations: their roles, the order these must have, and their columns.

The turns of a part are held flat, as columns over all of them, so that rows of plain text are never
looked at one by one. Shapes: M turns of a part, N rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from s2l_ray.core.storage.schemas import MESSAGES

ROLES = ("system", "user", "assistant", "tool")
SYSTEM, USER, ASSISTANT, TOOL = range(len(ROLES))
# What comes before the first turn.
START = len(ROLES)
ROLE_NAMES = {
    **{name: code for code, name in enumerate(ROLES)},
    **dict.fromkeys(("developer",), SYSTEM),
    **dict.fromkeys(("human",), USER),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "function_call"), ASSISTANT),
    **dict.fromkeys(("function", "observation", "function_response"), TOOL),
}
# An assistant turn may also follow another one, once a tool was called.
FOLLOWERS = {
    START: (SYSTEM, USER),
    SYSTEM: (USER,),
    USER: (ASSISTANT,),
    ASSISTANT: (USER, TOOL),
    TOOL: (TOOL, ASSISTANT),
}
ALLOWED = np.zeros((START + 1, len(ROLES)), bool)
for _before, _followers in FOLLOWERS.items():
    ALLOWED[_before, list(_followers)] = True


@dataclass(frozen=True)
class Turns:
    """Turns of many rows.

    Args:
        row: int64 [M], position in the part, ascending.
        role: int8 [M], index into ROLES.
        content, input, extra: string [M], as in schemas.MESSAGES.
        masked: bool [M], which turns the data mark as not to be learned.
    """

    row: np.ndarray
    role: np.ndarray
    content: pa.Array
    input: pa.Array
    extra: pa.Array
    masked: np.ndarray


def turns_of_role(row: np.ndarray, role: int, content: pa.Array) -> Turns:
    """One turn for each of these rows, all of one role."""
    nothing = pa.nulls(len(row), pa.string())
    masked = np.zeros(len(row), bool)
    return Turns(row, np.full(len(row), role, np.int8), content, nothing, nothing, masked)


def joined(several: list[Turns]) -> Turns:
    """All turns in one, by row; those of a row in the order of the list."""
    if len(several) == 1:
        return several[0]
    order = np.argsort(np.concatenate([turns.row for turns in several]), kind="stable")
    texts = {
        name: pa.concat_arrays([getattr(turns, name) for turns in several]).take(pa.array(order))
        for name in ("content", "input", "extra")
    }
    return Turns(
        row=np.concatenate([turns.row for turns in several])[order],
        role=np.concatenate([turns.role for turns in several])[order],
        masked=np.concatenate([turns.masked for turns in several])[order],
        **texts,
    )


def to_lists(turns: Turns, count: int) -> pa.ListArray:
    """schemas.MESSAGES [N]: the turns of each row as a list."""
    offsets = np.searchsorted(turns.row, np.arange(count + 1)).astype(np.int32)
    roles = pa.array(ROLES, pa.string()).take(pa.array(turns.role))
    inner = MESSAGES.value_type
    struct = pa.StructArray.from_arrays(
        [roles, turns.content, turns.input, turns.extra, pa.array(turns.masked)],
        fields=list(inner),
    )
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=MESSAGES)


def check_order(turns: Turns, report: Callable[[int, str, str], None]) -> None:
    """Check that roles follow each other as in FOLLOWERS, and that every row has an answer.

    Args:
        report: called once for every row that is wrong: its position, the reason, a detail.
    """
    first_M = np.diff(turns.row, prepend=-1) != 0
    before_M = np.where(first_M, START, np.roll(turns.role, 1))
    place_M = np.arange(len(turns.row))
    latest_user_M = np.maximum.accumulate(np.where(first_M | (turns.role == USER), place_M, 0))
    latest_tool_M = np.maximum.accumulate(np.where(turns.role == TOOL, place_M, -1))
    allowed_M = ALLOWED[before_M, turns.role] | (
        (before_M == ASSISTANT) & (turns.role == ASSISTANT) & (latest_tool_M > latest_user_M)
    )
    number_M = place_M - np.maximum.accumulate(np.where(first_M, place_M, 0)) + 1
    wrong = np.flatnonzero(~allowed_M)
    rows, first_of_row = np.unique(turns.row[wrong], return_index=True)
    for row, place in zip(rows.tolist(), wrong[first_of_row].tolist(), strict=True):
        before = int(before_M[place])
        expected = " or ".join(ROLES[role] for role in FOLLOWERS[before])
        after = "first" if before == START else f"after {ROLES[before]}"
        report(
            row,
            f"roles out of order: expected {expected} {after}, got {ROLES[turns.role[place]]}",
            f", turn {int(number_M[place])}",
        )
    silent = np.setdiff1d(turns.row, turns.row[turns.role == ASSISTANT])
    for row in np.setdiff1d(silent, rows).tolist():
        report(row, "expected an assistant turn, got none", "")
