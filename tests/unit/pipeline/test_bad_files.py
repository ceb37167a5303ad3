"""Bad input on disk: each kind is named with its file, row, field and remedy, before anything is
committed.

The plan refuses what can be seen without parsing rows, before Ray starts. The task that reads the
rows refuses the rest; here it is called without Ray.
"""

import bz2
import gzip
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import yaml

from s2l_ray import config, pipeline
from s2l_ray.core.data.original import original_texts
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.data.read import read_parts
from s2l_ray.errors import UserError
from tests import tiny

GOOD = {"instruction": "say a", "output": "a"}
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TABLE = pa.table({"instruction": ["q", "r"], "output": ["a", "b"]})


@dataclass(frozen=True)
class Bad:
    """One kind: what to put into the folder `raw`, and what must be said of it."""

    make: Callable[[Path], Any]
    said: tuple[str, ...]
    # Whether the plan refuses it; otherwise whoever reads the rows does.
    planned: bool = True
    # Fields of the section besides `files`, or in place of it.
    examples: dict[str, Any] | None = None


def write(name: str, data: bytes | str) -> Callable[[Path], Any]:
    return lambda raw: (raw / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def lines(*rows: Any, name: str = "x.jsonl") -> Callable[[Path], Any]:
    text = b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    return write(name, text + b"\n")


def all_of(*makers: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda raw: [make(raw) for make in makers]


def parquet(table: pa.Table = TABLE, cut: slice = slice(None)) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()[cut]


def arrow(table: pa.Table = TABLE, stream: bool = False, cut: slice = slice(None)) -> bytes:
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()[cut]


def feather_one() -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(TABLE, sink, version=1)
    return sink.getvalue()


def damaged(data: bytes, first: int, count: int = 8) -> bytes:
    return data[:first] + b"\xff" * count + data[first + count :]


def extension() -> pa.Table:
    tensor = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), [2]), pa.array([[1, 2]] * 2, pa.list_(pa.int32(), 2))
    )
    return TABLE.append_column("tensor", tensor)


def chat(*turns: Any, **more: Any) -> Callable[[Path], Any]:
    """A good row, then one of these turns."""
    return lines({"messages": CHAT}, {"messages": list(turns), **more})


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


LINES = (json.dumps(GOOD) + "\n").encode() * 50
ROW = "Correct the row, or leave it out"
REPLACE = "Replace the file"
KINDS: dict[str, Bad] = {
    # What is not there.
    "a path that is not there": Bad(
        lambda raw: raw.rmdir(), ("matches no file", "Correct the path")
    ),
    "a folder without a file": Bad(lambda raw: None, ("raw matches no file", "Correct the path")),
    "a folder of hidden files": Bad(
        lines(GOOD, name=".x.jsonl"), ("matches no file", "Correct the path")
    ),
    "a folder of other files": Bad(
        write("notes.txt", "x"), ("matches no file", ".jsonl", ".parquet")
    ),
    "a glob that matches nothing": Bad(
        lines(GOOD), ("*.parquet matches no file",), examples={"files": "raw/*.parquet"}
    ),
    "a file of an unknown kind": Bad(
        lines(GOOD, name="x.text"),
        ("x.text is none of .jsonl", "Convert it"),
        examples={"files": "raw/x.text"},
    ),
    "a link to nothing": Bad(
        lambda raw: (raw / "x.jsonl").symlink_to(raw / "gone.jsonl"), ("matches no file",)
    ),
    "a link to itself": Bad(
        lambda raw: (raw / "x.jsonl").symlink_to(raw / "x.jsonl"), ("raw", "Correct the path")
    ),
    "a link to the folder it lies in": Bad(
        lambda raw: (raw / "x").symlink_to(raw), ("raw", "Correct the path")
    ),
    "files outside of the root": Bad(
        lines(GOOD),
        ("x.jsonl is not below examples.root", "Correct one"),
        examples={"root": "raw/deeper"},
    ),
    "two files of one name": Bad(
        lines(GOOD),
        ("are both x.jsonl below the root", "Name one of them"),
        examples={"files": ["raw/x.jsonl", "file://{raw}/x.jsonl"]},
    ),
    # Files without rows.
    "an empty file": Bad(write("x.jsonl", ""), ("x.jsonl is empty", "Remove it")),
    "an empty gzip": Bad(
        write("x.jsonl.gz", gzip.compress(b"")), ("x.jsonl.gz: it has no rows", "Remove it")
    ),
    "a CSV of a header alone": Bad(
        write("x.csv", "instruction,output\n"), ("x.csv: it has no rows", "Remove it")
    ),
    "a Parquet file without rows": Bad(
        write("x.parquet", parquet(TABLE[:0])), ("x.parquet: it has no rows",)
    ),
    "an Arrow file without rows": Bad(
        write("x.arrow", arrow(TABLE[:0])), ("x.arrow: it has no rows",)
    ),
    "a TSV quote that never ends": Bad(
        write("x.tsv", 'instruction\toutput\nq\ta\nq\t"a\nq\ta\n'),
        ("x.tsv, row 2: a quote does not end", "unexpected end of data"),
    ),
    "an empty JSON array": Bad(
        write("x.json", " [ \n ] "), ("x.json: it has no rows", "Remove it")
    ),
    # Files that are not whole, or not what their names say.
    "truncated gzip": Bad(
        write("x.jsonl.gz", gzip.compress(LINES)[:-9]),
        ("x.jsonl.gz: the data are damaged", "Truncated", REPLACE),
    ),
    "gzip that is none": Bad(
        write("x.jsonl.gz", LINES), ("x.jsonl.gz: the data are damaged", REPLACE)
    ),
    "gzip with a wrong checksum": Bad(
        write("x.csv.gz", damaged(gzip.compress(LINES), len(gzip.compress(LINES)) - 8)),
        ("x.csv.gz: the data are damaged", REPLACE),
    ),
    "zstd that is none": Bad(
        write("x.jsonl.zst", b"garbage" * 9), ("x.jsonl.zst: the data are damaged", REPLACE)
    ),
    "truncated bzip2": Bad(
        write("x.json.bz2", bz2.compress(b"[" + LINES)[:-3]),
        ("x.json.bz2: the data are damaged", REPLACE),
    ),
    "truncated Parquet": Bad(
        write("x.parquet", parquet(cut=slice(0, -9))),
        ("x.parquet: expected a whole Parquet file", REPLACE),
    ),
    "Parquet that is none": Bad(
        write("x.parquet", LINES), ("x.parquet: expected a whole Parquet file", REPLACE)
    ),
    "Parquet of damaged pages": Bad(
        write("x.parquet", damaged(parquet(), 4, 40)),
        ("x.parquet: the data are damaged", REPLACE),
    ),
    "a truncated Arrow file": Bad(
        write("x.arrow", arrow(cut=slice(0, -7))),
        ("x.arrow: expected a whole Arrow file", "its end is missing", REPLACE),
    ),
    "an Arrow file cut to its head": Bad(
        write("x.arrow", arrow(cut=slice(0, 7))), ("x.arrow: expected a whole Arrow file", REPLACE)
    ),
    "a truncated Arrow stream": Bad(
        write("x.arrow", arrow(stream=True, cut=slice(0, -8))),
        ("x.arrow: expected a whole Arrow file or stream", "its end is missing"),
    ),
    "Arrow that is none": Bad(
        write("x.feather", LINES), ("x.feather: expected a whole Arrow file or stream", REPLACE)
    ),
    "an Arrow stream without its body": Bad(
        write("x.arrow", arrow(stream=True)[:-80] + arrow(stream=True)[-8:]),
        ("x.arrow: the data are damaged", REPLACE),
    ),
    "Feather of version 1": Bad(
        write("x.feather", feather_one()), ("x.feather: this is Feather version 1", "as version 2")
    ),
    "a JSON array that is not closed": Bad(
        write("x.json", json.dumps([GOOD, GOOD])[:-1]),
        ("x.json: expected an array of objects", "in row 2", REPLACE),
    ),
    "text behind a JSON array": Bad(
        write("x.json", json.dumps([GOOD]) + " {}"),
        (
            "x.json: expected nothing behind the end of the array",
            "'{}'",
            "Write all rows as one array",
        ),
    ),
    "one JSON object over many lines": Bad(
        write("x.json", json.dumps({"data": [GOOD]}, indent=1)),
        ("x.json: expected an array of objects, or an object a line", "one to a line"),
    ),
    "a CSV with a quote that is not closed": Bad(
        write("x.csv", 'instruction,output\nq,a\n"r,b\nc,d\n'),
        ("x.csv, row 2: a quote does not end", "double the quotes"),
    ),
    "a CSV with text behind a quote": Bad(
        write("x.csv", 'instruction,output\nq,a\n"r"s,b\n'),
        ("x.csv, row 2: a quote does not end", "double the quotes"),
    ),
    # Columns.
    "two columns of one name in Parquet": Bad(
        write(
            "x.parquet",
            parquet(
                pa.Table.from_arrays(
                    [pa.array(["a"])] * 3, names=["instruction", "output", "output"]
                )
            ),
        ),
        ("x.parquet: two columns have the same name", "Rename one"),
    ),
    "two columns of one name in CSV": Bad(
        write("x.csv", "instruction,output,output\nq,a,b\n"),
        ("x.csv: two columns have the same name", "Rename one"),
    ),
    "a CSV header that is not UTF-8": Bad(
        write("x.csv", b"instruction,output,caf\xe9\nq,a,b\n"),
        ("x.csv: expected a header in UTF-8, got byte 0xe9", "Convert the file"),
    ),
    "a CSV in UTF-16": Bad(
        write("x.csv", "instruction,output\nq,a\n".encode("utf-16")),
        ("x.csv: expected text, as its name says, but it is text in UTF-16", "Convert it to UTF-8"),
    ),
    "a column example_id": Bad(
        write("x.parquet", parquet(TABLE.append_column("example_id", [[1, 2]]))),
        ("x.parquet: a column is named 'example_id'", "Rename the column"),
    ),
    "a column cluster": Bad(
        lines({**GOOD, "cluster": 1}),
        ("x.jsonl: a column is named 'cluster'", "Rename the column"),
    ),
    "a column score": Bad(
        write("x.csv", "instruction,output,score\nq,a,1\n"),
        ("x.csv: a column is named 'score'", "Rename the column"),
    ),
    "an extension type in Parquet": Bad(
        write("x.parquet", parquet(extension())),
        ("x.parquet: a column has an Arrow extension type", "rewrite the file"),
    ),
    "an extension type in an Arrow file": Bad(
        write("x.arrow", arrow(extension())),
        ("x.arrow: a column has an Arrow extension type", "rewrite the file"),
    ),
    "an extension type in an Arrow stream": Bad(
        write("x.arrow", arrow(extension(), stream=True)),
        ("x.arrow: a column has an Arrow extension type", "rewrite the file"),
    ),
    "columns of no schema": Bad(
        write("x.csv", "a,b\n1,2\n"),
        (
            "x.csv: expected columns of a known schema",
            "it has ['a', 'b']",
            "examples.columns.instruction",
        ),
    ),
    "columns of two schemas": Bad(
        write("x.parquet", parquet(TABLE.append_column("messages", [["x", "y"]]))),
        (
            "x.parquet: they fit several schemas (instruction and output; messages)",
            "examples.columns.messages",
        ),
    ),
    "a mapping to a column that is absent": Bad(
        write("x.parquet", parquet()),
        ("x.parquet: no column 'text' (examples.columns.output)", "Correct examples.columns"),
        examples={"columns": {"output": "text"}},
    ),
    "a column of numbers for text": Bad(
        write("x.parquet", parquet(TABLE.set_column(1, "output", [[1, 2]]))),
        ("x.parquet, field 'output': expected text, got int64", "examples.columns.output"),
        planned=False,
    ),
    # Rows that are none.
    "a line that is not UTF-8": Bad(
        lines(GOOD, b'{"instruction": "caf\xe9", "output": "a"}'),
        ("x.jsonl, line 2: expected UTF-8, got byte 0xe9", ROW),
        planned=False,
    ),
    "lines in UTF-16": Bad(
        write("x.jsonl", json.dumps(GOOD).encode("utf-16")),
        ("x.jsonl: expected text, as its name says, but it is text in UTF-16", "Convert it"),
    ),
    "a field of a CSV that is not UTF-8": Bad(
        write("x.csv", b"instruction,output\nq,a\nr,caf\xe9\n"),
        ("x.csv, row 2: field 'output': expected UTF-8", ROW),
        planned=False,
    ),
    "a field of Parquet that is not UTF-8": Bad(
        write(
            "x.parquet",
            parquet(TABLE.set_column(1, "output", pa.array([b"a", b"\xff"]).view(pa.string()))),
        ),
        ("x.parquet, row 2: field 'output': expected UTF-8", ROW),
        planned=False,
    ),
    "a field of Arrow that is not UTF-8": Bad(
        write(
            "x.arrow",
            arrow(TABLE.set_column(1, "output", pa.array([b"a", b"\xff"]).view(pa.string()))),
        ),
        ("x.arrow, row 2: field 'output': expected UTF-8", ROW),
        planned=False,
    ),
    "a broken line": Bad(
        lines(GOOD, b'{"instruction": "q", "output"'),
        ("x.jsonl, line 2: expected a JSON object, but Expecting", "in column 30", ROW),
        planned=False,
    ),
    "a line that is no object": Bad(
        lines(GOOD, [1]), ("x.jsonl, line 2: expected a JSON object, got list", ROW), planned=False
    ),
    "a scalar in an array": Bad(
        write("x.json", json.dumps([GOOD, 3])),
        ("x.json, row 2: expected a JSON object, got int", ROW),
        planned=False,
    ),
    "a comma too many in an array": Bad(
        write("x.json", json.dumps([GOOD])[:-1] + ",]"),
        ("x.json, row 2: expected a JSON object, but Expecting value", ROW),
        planned=False,
    ),
    "NaN in an array": Bad(
        write("x.json", json.dumps([{**GOOD, "n": float("nan")}])),
        ("x.json, row 1: expected a JSON object, but NaN is not JSON", ROW),
        planned=False,
    ),
    "infinity in a line": Bad(
        lines({**GOOD, "n": float("inf")}),
        ("x.jsonl, line 1: expected a JSON object, but Infinity is not JSON", ROW),
        planned=False,
    ),
    "half a surrogate pair": Bad(
        lines(GOOD, b'{"instruction": "\\ud83d", "output": "a"}'),
        ("x.jsonl, line 2: expected text, got half a surrogate pair", ROW),
        planned=False,
    ),
    "a record of too many fields": Bad(
        write("x.csv", "instruction,output\nq,a\nr,b,c\n"),
        ("x.csv, row 2: expected 2 fields, got 3", ROW),
        planned=False,
    ),
    "a record of too few fields": Bad(
        write("x.tsv.gz", gzip.compress(b"instruction\toutput\nq\n")),
        ("x.tsv.gz, row 1: expected 2 fields, got 1", ROW),
        planned=False,
    ),
    "an output that is null": Bad(
        lines(GOOD, {"instruction": "q", "output": None}),
        (
            "x.jsonl, line 2: field 'output': expected text, got a value that is null or missing",
            ROW,
        ),
        planned=False,
    ),
    "an output that is missing": Bad(
        lines(GOOD, {"instruction": "q"}),
        ("x.jsonl, line 2: field 'output'", "null or missing", ROW),
        planned=False,
    ),
    "an output that is empty": Bad(
        write("x.csv", "instruction,output\nq, \n"),
        ("x.csv, row 1: field 'output': expected text, got a value that is empty", ROW),
        planned=False,
    ),
    "an output that is a number": Bad(
        lines(GOOD, {"instruction": "q", "output": 5}),
        ("x.jsonl, line 2: field 'output': expected text, got int", ROW),
        planned=False,
    ),
    # Conversations.
    "an empty conversation": Bad(
        chat(),
        ("x.jsonl, line 2: field 'messages': expected turns, got an empty conversation", ROW),
        planned=False,
    ),
    "an unknown role": Bad(
        chat(turn("user", "q"), turn("oracle", "a")),
        ("x.jsonl, line 2: field 'messages'", "'oracle' in turn 2", "examples.columns.roles"),
        planned=False,
    ),
    "a user twice": Bad(
        chat(turn("user", "q"), turn("user", "r"), turn("assistant", "a")),
        (
            "line 2: field 'messages': roles out of order",
            "expected assistant after user, got user, turn 2",
            ROW,
        ),
        planned=False,
    ),
    "an assistant first": Bad(
        chat(turn("assistant", "a")),
        ("line 2: field 'messages': roles out of order", "got assistant, turn 1"),
        planned=False,
    ),
    "a tool that nobody called": Bad(
        chat(turn("user", "q"), turn("tool", "t"), turn("assistant", "a")),
        ("expected assistant after user, got tool, turn 2", ROW),
        planned=False,
    ),
    "a system turn in the middle": Bad(
        chat(*CHAT, turn("system", "s"), *CHAT),
        ("expected user or tool after assistant, got system, turn 3",),
        planned=False,
    ),
    "nobody who answers": Bad(
        chat(turn("user", "q")),
        ("line 2: field 'messages': expected an assistant turn, got none", ROW),
        planned=False,
    ),
    "content that is a number": Bad(
        chat(turn("user", "q"), turn("assistant", 7)),
        ("line 2: field 'messages': expected text under the key 'content', got int, turn 2", ROW),
        planned=False,
    ),
    "content with a picture": Bad(
        chat(turn("user", [{"type": "image_url"}]), turn("assistant", "a")),
        ("nothing but parts of text", "'image_url' in turn 1", ROW),
        planned=False,
    ),
    "an answer without text or calls": Bad(
        chat(turn("user", "q"), turn("assistant", "")),
        ("got an empty assistant turn, turn 2", ROW),
        planned=False,
    ),
    "tools that are no JSON": Bad(
        chat(*CHAT, tools="search"),
        ("line 2: field 'tools': expected the JSON text of a list of tools", ROW),
        planned=False,
    ),
    "turns that are no JSON in a CSV": Bad(
        write("x.csv", "messages\n[{'role': 'user'}]\n"),
        ("x.csv, row 1: field 'messages': expected the JSON text of a list of turns", ROW),
        planned=False,
    ),
}


def job_of(folder: Path, examples: dict[str, Any] | None) -> config.Job:
    """The tiny job on the folder `raw`; names in `examples` are relative to `folder`."""
    job = tiny.job(folder, evaluation=None)
    changes = {name: _placed(folder, value) for name, value in (examples or {}).items()}
    job["examples"] = {"files": str(folder / "raw"), "rows_per_part": 4, **changes}
    job["subset"]["budget"] = 0.5
    job["proxy"] |= {"checkpoints": 1}
    job["clusters"] |= {"k": 1}
    return config.load(None, [], job)


def _placed(folder: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_placed(folder, item) for item in value]
    if isinstance(value, str) and value.startswith("raw/"):
        return str(folder / value)
    return value.format(raw=folder / "raw") if isinstance(value, str) else value


def read_rows(job: config.Job, ranges: list[PartRange]) -> None:
    """What the tasks of `examples` do, less the writing."""
    section = job.first.examples
    for _, parts in itertools.groupby(ranges, key=lambda part: part.file.name):
        for read in read_parts(list(parts), section.columns, section.on_bad_row):
            original_texts(read.table)


def assert_nothing_committed(folder: Path) -> None:
    import ray

    assert not list((folder / "storage").rglob("manifest.json"))
    assert not list((folder / "storage" / "datasets").rglob("*"))
    assert not ray.is_initialized()


@pytest.mark.parametrize("kind", list(KINDS))
def test_bad_input_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = KINDS[kind]
    job = job_of(tmp_path, bad.examples)
    for path in (tmp_path / "raw").iterdir():
        path.unlink()
    bad.make(tmp_path / "raw")
    if bad.planned:
        with pytest.raises(UserError) as error:
            pipeline.plan(job, until="examples")
    else:
        ranges = pipeline.plan(job, until="examples").nodes[0].ranges
        with pytest.raises(UserError) as error:
            read_rows(job, ranges)
    message = str(error.value)
    for words in bad.said:
        assert words in message
    assert "\n" not in message
    assert_nothing_committed(tmp_path)


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 60


@pytest.mark.parametrize(
    "kind", ["truncated Parquet", "a column example_id", "a JSON array that is not closed"]
)
def test_the_plan_refuses_before_ray_starts(kind: str, tmp_path: Path) -> None:
    """As users start it: exit status 1, one line, and Ray not even imported."""
    job = job_of(tmp_path, None).first.model_dump(mode="json", exclude_unset=True)
    for path in (tmp_path / "raw").iterdir():
        path.unlink()
    KINDS[kind].make(tmp_path / "raw")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "s2l_ray.run",
        "--config",
        str(tmp_path / "job.yaml"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in ended.stderr.splitlines() if not line.startswith("import time")]
    assert ended.returncode == 1
    assert len(said) == 1
    assert KINDS[kind].said[0] in said[0]
    assert " ray\n" not in ended.stderr
    assert_nothing_committed(tmp_path)


# ---- files that change while the job runs


CHANGES: dict[str, Callable[[Path], Any]] = {
    "longer": lambda path: path.write_bytes(LINES + LINES),
    "shorter": lambda path: path.write_bytes(LINES[:-30]),
    "other content of the same size": lambda path: path.write_bytes(LINES.replace(b"say", b"SAY")),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_file_that_is_replaced_while_the_job_runs_is_refused(change: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, None)
    for path in (tmp_path / "raw").iterdir():
        path.unlink()
    path = tmp_path / "raw" / "x.jsonl"
    path.write_bytes(LINES)
    ranges = pipeline.plan(job, until="examples").nodes[0].ranges
    CHANGES[change](path)
    os.utime(path, ns=(1, 1))
    words = r"expected \d+ bytes .*the file changed while the job ran.*Run the same command again"
    with pytest.raises(UserError, match=f"x.jsonl: {words}"):
        read_rows(job, ranges)
    assert_nothing_committed(tmp_path)


def test_a_file_that_was_only_touched_is_read(tmp_path: Path) -> None:
    job = job_of(tmp_path, None)
    ranges = pipeline.plan(job, until="examples").nodes[0].ranges
    for path in (tmp_path / "raw").iterdir():
        os.utime(path, ns=(1, 1))
    read_rows(job, ranges)


def test_a_file_that_goes_while_the_job_runs_is_named(tmp_path: Path) -> None:
    job = job_of(tmp_path, None)
    ranges = pipeline.plan(job, until="examples").nodes[0].ranges
    (tmp_path / "raw" / "b.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"b.jsonl: .*must be readable under the same name on every node"
    ):
        read_rows(job, ranges)


# Root reads whatever it likes unless it gives these up.
WITHOUT_RIGHTS = ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_read_is_named(what: str, tmp_path: Path) -> None:
    job = tiny.job(tmp_path, evaluation=None)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    (tmp_path / "raw" / "a.jsonl" if what == "file" else tmp_path / "raw").chmod(0)
    command = [sys.executable, "-m", "s2l_ray.run", "--config", str(tmp_path / "job.yaml")]
    rights = WITHOUT_RIGHTS if os.geteuid() == 0 else []
    try:
        ended = subprocess.run([*rights, *command], capture_output=True, text=True, check=False)
    finally:
        (tmp_path / "raw").chmod(0o700)
    assert ended.returncode == 1
    assert re.search(r"error: .*raw.*(Permission|Correct the path|readable)", ended.stderr), (
        ended.stderr
    )
    assert "Traceback" not in ended.stderr
    assert_nothing_committed(tmp_path)
