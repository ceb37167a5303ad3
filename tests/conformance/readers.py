"""Public suites of files against the readers of raw files.

    python tests/conformance/readers.py CHECKOUT...

A checkout is one of nst/JSONTestSuite, apache/parquet-testing and apache/arrow-testing. Each file
is read in a process of its own, with a limit of time and memory, so that a crash is seen. Counted
are files that are accepted, refused in words, and wrong: a crash, an error that is no UserError,
other values than an independent reader's, a refusal of what that one reads (but for what is refused
by intention), or malformed JSON that is accepted. Exit status 1 if any is wrong.

The independent readers are Python's json and pyarrow's, used directly.
"""

import json
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))
from s2l_ray.core.data import formats
from s2l_ray.core.data.formats.source import Source
from s2l_ray.core.data.formats.spans import Rows
from s2l_ray.core.data.json_text import values_of
from s2l_ray.core.data.original import original_column, original_texts
from s2l_ray.core.data.parts import RawFile
from s2l_ray.core.data.read import DAMAGE, index_file
from s2l_ray.core.data.rows import in_utf8
from s2l_ray.core.storage.parquet import parquet_bytes, read_parquet
from s2l_ray.errors import UserError

ACCEPTED, REFUSED, WRONG = "accepted", "refused", "wrong"
SECONDS, BYTES = 60, 8 << 30
# Refused by intention: types that may run code, two columns or keys of one name, rows of any size,
# streams that were cut short, types that pyarrow does not give to Python.
BY_INTENTION = (
    "extension type", "same name", "twice", "MiB in a row", "its end is missing", "to Python",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A file of a suite, and a function that reads it: ACCEPTED or REFUSED, and what was said."""

    name: str
    judge: Callable[[], tuple[str, str]]


class _Wrong(Exception):
    pass


# --- JSON


def json_cases(checkout: Path) -> Iterator[Case]:
    """Each text as a value in a row of an array of one row."""
    for path in sorted((checkout / "test_parsing").glob("*.json")):
        yield Case(path.name, lambda path=path: _json(path.name, path.read_bytes()))


def _json(name: str, text: bytes) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        path.write_bytes(b'[{"instruction": "q", "value": ' + text + b"}]")
        outcome, said, rows = _read(path, "x.json")
    if outcome == ACCEPTED and name.startswith("n_"):
        raise _Wrong("malformed, but accepted")
    if outcome == ACCEPTED and rows != [{"instruction": "q", "value": json.loads(text)}]:
        raise _Wrong("other values")
    if outcome == REFUSED and name.startswith("y_") and not _meant(said):
        raise _Wrong(f"well-formed, but refused: {said}")
    return outcome, said


# --- Parquet and Arrow


def parquet_cases(checkout: Path) -> Iterator[Case]:
    for path in sorted(checkout.rglob("*.parquet")):
        yield Case(str(path.relative_to(checkout)), lambda path=path: _columnar(path, "x.parquet"))


def arrow_cases(checkout: Path) -> Iterator[Case]:
    for path in sorted((checkout / "data").rglob("*")):
        kind = str(path.relative_to(checkout / "data"))
        if not path.is_file() or path.suffix in (".md", ".sh", ".gz", ".json", ".yaml"):
            continue
        if kind.startswith("arrow-ipc") and "tensor" not in kind:
            yield Case(kind, lambda path=path: _columnar(path, "x.arrow"))
        elif kind.startswith("parquet"):
            yield Case(kind, lambda path=path: _columnar(path, "x.parquet"))
        elif kind.startswith("csv"):
            yield Case(kind, lambda path=path: _read(path, "x.csv")[:2])


def _columnar(path: Path, name: str) -> tuple[str, str]:
    outcome, said, ours = _read(path, name)
    # What was damaged on purpose may be refused.
    if outcome == REFUSED and (_meant(said) or "fuzz" in str(path) or "crash" in path.name):
        return outcome, said
    try:
        table = _independent(path, name)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError):
        return outcome, said
    if outcome == REFUSED:
        raise _Wrong(f"pyarrow reads it, but refused: {said}")
    if table.num_rows:
        theirs = {column: str(_plain(table[column])) for column in table.column_names}
        if {column: str(values) for column, values in ours.items()} != theirs:
            raise _Wrong("other values than pyarrow's")
    return outcome, said


def _independent(path: Path, name: str) -> pa.Table:
    if name.endswith(".parquet"):
        return pq.ParquetFile(path, arrow_extensions_enabled=False).read()
    with pa.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file).read_all()


def _plain(column: pa.ChunkedArray) -> list[Any]:
    return [value for chunk in column.chunks for value in values_of(chunk)]


# --- what all share


def _read(path: Path, name: str) -> tuple[str, str, Any]:
    """Index a file, read all of its rows and export them, as `examples` and `subset` do.

    Returns:
        The outcome, what was said, and the rows: of text as objects, else by column.
    """
    refused: list[str] = []
    file = RawFile(str(path), name, "", path.stat().st_size, path.stat().st_mtime_ns)
    try:
        index = index_file(file, 1000)
        several = []
        if index.spans:
            with pa.OSFile(str(path)) as stream:
                source = Source(stream, name, str(path))
                bad = lambda row, reason, text, detail: refused.append(reason + detail)  # noqa: E731
                rows = formats.read(source, index.kind, index.spans, index.head, bad)
                several = [in_utf8(next(rows), str(path), bad) for _ in index.spans]
        texts = [text for rows in several for text in _exported(rows)]
    except UserError as error:
        return REFUSED, str(error), None
    except DAMAGE as error:
        return REFUSED, f"damaged: {error}", None
    if refused:
        return REFUSED, refused[0], None
    if several and several[0].texts is not None:
        return ACCEPTED, "", [json.loads(text) for text in texts]
    by_column: dict[str, list[Any]] = {}
    for rows in several:
        for column, values in rows.columns.items():
            found = values if isinstance(values, list) else _plain(values)
            by_column.setdefault(column, []).extend(found)
    return ACCEPTED, "", by_column


def _exported(rows: Rows) -> list[str]:
    if not rows.columns:
        return []
    field, array = original_column(rows, np.ones(len(rows.numbers), bool))
    table = pa.table([array], schema=pa.schema([field]))
    return original_texts(read_parquet(parquet_bytes(table), "the rows"))


def _meant(said: str) -> bool:
    return any(words in said for words in BY_INTENTION)


def judged(case: Case) -> tuple[str, str]:
    """The outcome of a case, in a process of its own."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        signal.alarm(SECONDS)
        try:
            answer = case.judge()
        except _Wrong as error:
            answer = WRONG, str(error)
        except BaseException as error:
            answer = WRONG, f"{type(error).__name__}: {error}"
        os.write(into, json.dumps(answer).encode()[:60_000])
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        data = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status:
        return WRONG, f"ended by signal {status & 127}"
    outcome, said = json.loads(data)
    return outcome, said


def cases_of(checkout: Path) -> Iterator[Case]:
    if (checkout / "test_parsing").is_dir():
        return json_cases(checkout)
    if (checkout / "bad_data").is_dir():
        return parquet_cases(checkout)
    if (checkout / "data" / "arrow-ipc-stream").is_dir():
        return arrow_cases(checkout)
    sys.exit(f"{checkout} is no checkout of a suite that is known; see --help")


def main() -> int:
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    wrong = 0
    for checkout in map(Path, sys.argv[1:]):
        counts: Counter[str] = Counter()
        for case in cases_of(checkout):
            outcome, said = judged(case)
            counts[outcome] += 1
            if outcome == WRONG:
                print(f"{WRONG}: {case.name}: {said[:300]}")
        found = ", ".join(f"{counts[key]} {key}" for key in (ACCEPTED, REFUSED, WRONG))
        print(f"{checkout.name}: {found}", flush=True)
        wrong += counts[WRONG]
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
