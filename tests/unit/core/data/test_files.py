"""Raw files of every shape: the rows that come out, what they are called, and how bad ones are named."""

import base64
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.config import Columns
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.formats import source
from s2l_ray.core.data.original import original_rows
from s2l_ray.core.data.parts import PartRange, part_ranges
from s2l_ray.core.data.read import PartRows, index_file, read_part
from s2l_ray.core.storage.parquet import open_parquet, parquet_bytes, read_parquet
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED
from s2l_ray.core.storage.store import Store, filesystem, join_uri
from s2l_ray.errors import UserError

GOOD = {"instruction": "say a", "output": "a"}


def parts_of(*paths: Path, rows_per_part: int = 100, root: str | None = None) -> list[PartRange]:
    files = find_files([str(path) for path in paths], root)
    return part_ranges(files, [index_file(file, rows_per_part) for file in files])


def read(
    path: Path, on_bad_row: str = "stop", rows_per_part: int = 100, **columns: str
) -> PartRows:
    """The only part of a file."""
    (part,) = parts_of(path, rows_per_part=rows_per_part)
    return read_part(part, Columns(**columns), on_bad_row)


def lines(path: Path, *rows: Any, end: bytes = b"\n") -> Path:
    """A JSONL file; bytes are written as they are."""
    path.write_bytes(
        b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + end for r in rows)
    )
    return path


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def refusal(path: Path, on_bad_row: str = "stop", **columns: str) -> str:
    with pytest.raises(UserError) as error:
        read(path, on_bad_row, **columns)
    assert str(path) in str(error.value)
    return str(error.value)


# ---- cutting into parts


texts = st.text(st.characters(codec="utf-8"), max_size=12)
rows_ = st.fixed_dictionaries(
    {"instruction": texts.map("i".__add__), "output": texts.map("o".__add__)},
    optional={"input": texts, "n": st.integers(-9, 9), "tags": st.lists(texts, max_size=2)},
)
blank = st.sampled_from([b"", b"  ", b"\t"])


@settings(max_examples=150, deadline=None)
@given(
    content=st.lists(st.one_of(rows_, blank), min_size=1, max_size=30).filter(
        lambda c: any(isinstance(r, dict) for r in c)
    ),
    rows_per_part=st.integers(1, 9),
    chunk=st.integers(1, 40),
    end=st.sampled_from([b"\n", b"\r\n"]),
    bom=st.booleans(),
    closed=st.booleans(),
    escaped=st.booleans(),
)
def test_every_line_comes_out_once_with_its_number(
    content: list[Any],
    rows_per_part: int,
    chunk: int,
    end: bytes,
    bom: bool,
    closed: bool,
    escaped: bool,
) -> None:
    raw = [
        json.dumps(r, ensure_ascii=escaped).encode() if isinstance(r, dict) else r for r in content
    ]
    data = (
        (b"\xef\xbb\xbf" if bom and raw[0].strip() else b"")
        + end.join(raw)
        + (end if closed else b"")
    )
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "CHUNK", chunk)
        path = Path(folder) / "x.jsonl"
        path.write_bytes(data)
        (file,) = find_files([str(path)], None)
        index = index_file(file, rows_per_part)
        parts = [read_part(part, Columns()) for part in part_ranges([file], [index])]
    assert index.sha256 == hashlib.sha256(data).hexdigest()
    assert index.rows == len(content) - (not closed and raw[-1] == b"")
    assert [span.first_row for span in index.spans] == list(range(0, index.rows, rows_per_part))
    assert sum(span.rows for span in index.spans) == index.rows
    found = []
    for part in parts:
        original = original_rows(part.table).to_pylist()
        found += list(zip(part.table["example_id"].to_pylist(), original, strict=True))
    expected = [(number, row) for number, row in enumerate(content) if isinstance(row, dict)]
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, got), (_, want) in zip(found, expected, strict=True):
        assert {name: value for name, value in got.items() if value is not None} == want


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    group=st.integers(1, 12),
    rows_per_part=st.integers(1, 15),
    empty_group=st.booleans(),
)
def test_parquet_is_cut_by_rows_whatever_its_row_groups(
    count: int, group: int, rows_per_part: int, empty_group: bool
) -> None:
    table = pa.table(
        {
            "z": pa.array(range(count), pa.int16()),
            "completion": [f"o{n}" for n in range(count)],
            "prompt": pa.array([f"i{n}" for n in range(count)], pa.large_string()),
            "when": pa.array([{"a": n, "b": [n] * (n % 3)} for n in range(count)]),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.parquet"
        with pq.ParquetWriter(path, table.schema) as writer:
            for first in range(0, count, group):
                writer.write_table(table.slice(first, group))
                if empty_group:
                    writer.write_table(table.slice(0, 0))
        parts = parts_of(path, rows_per_part=rows_per_part)
        made = [read_part(part, Columns()) for part in parts]
    assert [part.table.num_rows for part in made] == [part.rows for part in parts]
    whole = pa.concat_tables([original_rows(part.table) for part in made])
    assert whole.column_names == table.column_names
    assert whole.to_pylist() == table.to_pylist()
    assert whole.schema.field("z").type == pa.int16()
    assert np.concatenate([part.table["example_id"] for part in made]).tolist() == list(
        range(count)
    )


def test_ids_hold_the_files_number_and_the_row(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        lines(tmp_path / f"{name}.jsonl", b"", GOOD, GOOD, GOOD)
    parts = parts_of(tmp_path, rows_per_part=3)
    assert [(part.index, part.file.name, part.file_number) for part in parts] == [
        (0, "a.jsonl", 0), (1, "a.jsonl", 0), (2, "b.jsonl", 1), (3, "b.jsonl", 1), (4, "c.jsonl", 2), (5, "c.jsonl", 2),
    ]  # fmt: skip
    ids = [
        row for part in parts for row in read_part(part, Columns()).table["example_id"].to_pylist()
    ]
    assert ids == [number << 40 | row for number in range(3) for row in (1, 2, 3)]


def test_rows_of_five_megabytes_keep_their_places(tmp_path: Path) -> None:
    big = [
        {"instruction": f"{n}" * 5_000_000, "output": "ä" * 2_500_000 + str(n)} for n in range(3)
    ]
    path = lines(tmp_path / "x.jsonl", GOOD, *big, GOOD)
    found = [
        original_rows(p.table).to_pylist()
        for p in (read_part(q, Columns()) for q in parts_of(path, rows_per_part=2))
    ]
    assert found == [[GOOD, big[0]], [big[1], big[2]], [GOOD]]


# ---- columns


def test_every_column_is_kept_in_its_order(tmp_path: Path) -> None:
    content = [
        {"z": 1, "output": "a", "source": "s", "m": {"a": [1, 2], "b": {"c": "x"}}, "instruction": "q", "input": "", "f": 1.5, "t": True},
        {"z": None, "output": "b", "source": "t", "m": None, "instruction": "r", "input": None, "f": 2, "t": None, "late": "é"},
    ]  # fmt: skip
    made = read(lines(tmp_path / "x.jsonl", *content))
    back = original_rows(read_parquet(parquet_bytes(made.table), "x"))
    assert back.column_names == list(content[1])
    assert back.to_pylist() == [{**content[0], "late": None}, content[1]]
    assert made.table["source"].to_pylist() == ["s", "t"]
    assert [turns[0]["input"] for turns in made.table["messages"].to_pylist()] == [None, None]
    assert made.table.drop_columns(["original"]).schema == EXAMPLES_FIXED


def test_objects_without_fields_are_kept_as_null(tmp_path: Path) -> None:
    content = [
        {**GOOD, "meta": {}, "deep": [{"a": {}, "b": 1}], "none": []},
        {**GOOD, "meta": {}, "deep": [{"a": {}}], "none": []},
    ]
    made = read(lines(tmp_path / "x.jsonl", *content))
    back = original_rows(read_parquet(parquet_bytes(made.table), "x")).to_pylist()
    assert [(row["meta"], row["deep"], row["none"]) for row in back] == [
        (None, [{"a": None, "b": 1}], []),
        (None, [{"a": None, "b": None}], []),
    ]


@pytest.mark.parametrize(
    ("row", "columns", "meanings"),
    [
        ({"instruction": "q", "input": "i", "output": "a"}, {}, ("q", "i", "a", "x")),
        ({"prompt": "q", "completion": "a"}, {}, ("q", None, "a", "x")),
        ({"prompt": "q", "completion": "a", "input": "i"}, {}, ("q", None, "a", "x")),
        ({"question": "q", "answer": "a", "kind": "k"}, {"instruction": "question", "output": "answer", "source": "kind"}, ("q", None, "a", "k")),
        ({"instruction": "q", "output": "a", "context": "i", "source": "s"}, {"input": "context"}, ("q", "i", "a", "s")),
        ({"instruction": "q", "output": "a", "better": "b"}, {"output": "better"}, ("q", None, "b", "x")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_are_found_by_name_or_given(
    tmp_path: Path,
    row: dict[str, str],
    columns: dict[str, str],
    meanings: tuple[Any, ...],
    kind: str,
) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        lines(path, row)
    else:
        parquet(path, {name: [value] for name, value in row.items()})
    made = read(path, **columns)
    ((user, assistant),) = made.table["messages"].to_pylist()
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    source = made.table["source"][0].as_py()
    assert (user["content"], user["input"], assistant["content"], source) == meanings
    assert original_rows(made.table).to_pylist() == [row]


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({**GOOD, "example_id": 1}, {}, "a column is named 'example_id'"),
        ({**GOOD, "cluster": 1}, {}, "a column is named 'cluster'"),
        ({**GOOD, "source": "s", "kind": "k"}, {"source": "kind"}, "a column is named 'source'"),
        (
            {**GOOD, "prompt": "p", "completion": "c"},
            {},
            "they fit several schemas (instruction and output; prompt and completion)",
        ),
        (
            {"instruction": "q", "completion": "c"},
            {},
            "expected columns of a known schema (instruction and output;",
        ),
        (
            {"text": "t"},
            {"instruction": "text"},
            "Name the columns with examples.columns.instruction",
        ),
        (
            {**GOOD},
            {"input": "context"},
            "no column 'context' (examples.columns.input); it has ['instruction', 'output']",
        ),
    ],
)
def test_columns_that_do_not_tell_are_refused(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], said: str
) -> None:
    assert said in refusal(lines(tmp_path / "x.jsonl", row), **columns)
    assert said in refusal(
        parquet(tmp_path / "y.parquet", {n: [v] for n, v in row.items()}), **columns
    )


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["instruction", "output", "output"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "two columns have the same name" in refusal(tmp_path / "x.parquet")


# ---- bad rows


BAD_LINES = [
    (b'{"instruction": "q", "output": "a"', "expected a JSON object, but Expecting", "in column 35"),
    (b'{"instruction": "q", "output": "a", "x": NaN}', "NaN is not JSON", ""),
    (b'{"instruction": "q", "output": "a", "x": -Infinity}', "-Infinity is not JSON", ""),
    (b'[{"instruction": "q"}]', "expected a JSON object, got list", ""),
    (b"3", "expected a JSON object, got int", ""),
    (b"null", "expected a JSON object, got NoneType", ""),
    (b"{} {}", "expected a JSON object, but Extra data", ""),
    (b"[" * 100_000, "expected a JSON object, but", ""),
    (b'{"instruction": "caf\xe9", "output": "a"}', "expected UTF-8", "got byte 0xe9 at position 20"),
    (b'{"instruction": "\\ud83d", "output": "a"}', "half a surrogate pair", "'\\ud83d'"),
    (b'{"instruction": "q", "output": "a", "x": ["\\udc00"]}', "half a surrogate pair", ""),
    (b'{"instruction": "q", "output": 5}', "field 'output': expected text, got int", ""),
    (b'{"instruction": ["q"], "output": "a"}', "field 'instruction': expected text, got list", ""),
    (b'{"instruction": "q", "output": "a", "input": {}}', "field 'input': expected text, got dict", ""),
    (b'{"instruction": "q", "output": "a", "source": false}', "field 'source': expected text, got bool", ""),
    (b'{"instruction": "q", "output": null}', "field 'output': expected text, got a value that is null or missing", ""),
    (b'{"instruction": "q"}', "field 'output': expected text, got a value that is null or missing", ""),
    (b'{"instruction": "q", "output": ""}', "field 'output': expected text, got a value that is empty", ""),
    (b'{"instruction": " \\n\\t", "output": "a"}', "field 'instruction': expected text, got a value that is empty", ""),
    (b'{"instruction": "q", "output": "a", "source": ""}', "field 'source': expected text, got a value that is empty", ""),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "reason", "detail"), BAD_LINES)
def test_a_bad_line_stops_the_run_or_is_listed(
    tmp_path: Path, bad: bytes, reason: str, detail: str
) -> None:
    good = {**GOOD, "input": "i", "source": "s"}
    path = lines(tmp_path / "x.jsonl", good, b"", bad, good)
    message = refusal(path)
    assert f"{path}, line 3: " in message
    assert reason in message
    assert detail in message
    assert "with examples.on_bad_row: reject" in message

    made = read(path, "reject")
    assert made.table["example_id"].to_pylist() == [0, 3]
    (reject,) = made.rejects
    assert (reject["file"], reject["row"]) == ("x.jsonl", 2)
    assert reason in reject["reason"]
    assert reject["text"]
    assert len(reject["text"]) <= 500


def test_reasons_do_not_grow_with_the_rows(tmp_path: Path) -> None:
    broken = [b'{"instruction": "' + b"q" * n + b'", "output": "a"' for n in range(50)]
    broken += [b'{"instruction": "' + b"q" * n + b'\xff", "output": "a"}' for n in range(50)]
    made = read(lines(tmp_path / "x.jsonl", GOOD, *broken), "reject", rows_per_part=200)
    assert len(made.rejects) == 100
    assert len({reject["reason"] for reject in made.rejects}) == 2


def test_a_part_of_rejected_or_blank_lines_only_is_an_empty_part(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {**GOOD, "n": 1}, GOOD, b"{broken", b"3", b"", b"")
    first, broken, empty = (
        read_part(p, Columns(), "reject") for p in parts_of(path, rows_per_part=2)
    )
    assert (first.table.num_rows, len(first.rejects)) == (2, 0)
    assert (broken.table.num_rows, len(broken.rejects)) == (0, 2)
    assert (empty.table.num_rows, len(empty.rejects)) == (0, 0)
    assert empty.table.schema == first.table.drop_columns(["original"]).schema
    assert original_rows(broken.table).num_columns == 0
    assert read_parquet(parquet_bytes(empty.table), "x").num_rows == 0


def test_a_column_of_several_types_is_named_with_its_lines(tmp_path: Path) -> None:
    message = refusal(
        lines(tmp_path / "x.jsonl", {**GOOD, "m": 1}, {**GOOD, "m": None}, {**GOOD, "m": "one"})
    )
    assert "field 'm': expected one type in all rows" in message
    assert "str in line 3" in message
    assert "int in line 1" in message
    assert "field 'm'" in refusal(lines(tmp_path / "y.jsonl", {**GOOD, "m": 2**70}))


def test_bad_rows_of_parquet_are_named_or_listed(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "x.parquet",
        {"instruction": ["q", None, " ", "r"], "output": ["a", "b", "c", ""], "n": [1, 2, 3, 4]},
    )
    assert (
        "row 2: field 'instruction': expected text, got a value that is null or missing"
        in refusal(path)
    )
    made = read(path, "reject")
    assert made.table["example_id"].to_pylist() == [0]
    assert sorted(reject["row"] for reject in made.rejects) == [1, 2, 3]
    assert original_rows(made.table).to_pylist() == [{"instruction": "q", "output": "a", "n": 1}]


@pytest.mark.parametrize("column", ["output", "note"])
def test_text_of_parquet_that_is_not_utf8_is_named_or_listed(tmp_path: Path, column: str) -> None:
    broken = pa.array([b"fine", b"\xff\xfe", None]).view(pa.string())
    columns = {"instruction": ["q"] * 3, "output": ["a"] * 3, "note": ["n"] * 3, column: broken}
    path = parquet(tmp_path / "x.parquet", columns)
    assert f"row 2: field '{column}': expected UTF-8" in refusal(path)
    made = read(path, "reject")
    assert 0 in made.table["example_id"].to_pylist()
    assert {reject["row"] for reject in made.rejects} == ({1, 2} if column == "output" else {1})


@pytest.mark.parametrize("values", [[1, 2], [b"a", b"b"], [["a"], ["b"]], [{"a": 1}, {"a": 2}]])
def test_a_parquet_column_that_is_no_text_is_refused(tmp_path: Path, values: list[Any]) -> None:
    message = refusal(
        parquet(tmp_path / "x.parquet", {"instruction": ["q", "r"], "output": values}), "reject"
    )
    assert "field 'output': expected text, got" in message
    assert "examples.columns.output" in message


def test_text_of_parquet_may_be_of_any_string_type(tmp_path: Path) -> None:
    columns = {
        "instruction": pa.array(["q", "r"]).dictionary_encode(),
        "input": pa.array(["i", None], pa.string_view()),
        "output": pa.array(["a", "b"], pa.large_string()),
        "kind": pa.array(["x", "y"]).dictionary_encode(),
        "none": pa.nulls(2),
    }
    made = read(parquet(tmp_path / "x.parquet", columns))
    assert original_rows(made.table).to_pylist() == [
        {"instruction": "q", "input": "i", "output": "a", "kind": "x", "none": None},
        {"instruction": "r", "input": None, "output": "b", "kind": "y", "none": None},
    ]


# ---- files that are not what they seem


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_parquet_that_is_cut_off_is_refused(tmp_path: Path, keep: float) -> None:
    path = parquet(tmp_path / "x.parquet", {"instruction": ["q"] * 100, "output": ["a"] * 100})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=r"x.parquet: expected a whole Parquet file, but"):
        parts_of(path)


def test_parquet_with_damaged_pages_is_refused(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "x.parquet", {"instruction": ["q"] * 100, "output": [str(n) for n in range(100)]}
    )
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x.parquet: the data are damaged"):
        read(path)


def test_a_file_that_changed_or_went_after_it_was_cut_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", GOOD, GOOD)
    (part,) = parts_of(path)
    lines(path, GOOD)
    with pytest.raises(
        UserError,
        match=r"x.jsonl: expected \d+ bytes with SHA-256 \w{16}, got \d+: the file changed",
    ):
        read_part(part, Columns())
    path.unlink()
    with pytest.raises(UserError, match=r"must be readable under the same name on every node"):
        read_part(part, Columns())


EVIL = """
import pathlib, sys
folder, marker = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])

class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (marker,)
"""
MAKE_EVIL = (
    EVIL
    + """
import pyarrow as pa, pyarrow.parquet as pq
import ray.data
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray
good = pa.array(["a"])
evil = ArrowPythonObjectArray.from_objects([Evil()])
pq.write_table(pa.table({"instruction": good, "output": good, "x": evil}), folder / "top.parquet")
nested = pa.StructArray.from_arrays([evil], names=["y"])
pq.write_table(pa.table({"instruction": good, "output": good, "x": nested}), folder / "nested.parquet")
"""
)
READ_EVIL = (
    EVIL
    + """
import ray.data
import pyarrow.parquet as pq
from s2l_ray.config import Columns
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.data.read import index_file, read_part
from s2l_ray.core.storage.parquet import read_parquet
from s2l_ray.errors import UserError
for file in find_files([str(folder)], None):
    for attempt in (
        lambda: index_file(file, 10),
        lambda: read_part(PartRange(0, 0, file, "parquet", 0, 0, 1, 0, 0), Columns()),
        lambda: read_parquet(pathlib.Path(file.uri).read_bytes(), file.uri),
        lambda: read_parquet(pathlib.Path(file.uri).read_bytes(), file.uri, ["instruction"]),
    ):
        try:
            attempt()
        except UserError as error:
            assert "extension type" in str(error) and file.name in str(error), error
        else:
            raise SystemExit(f"{file.name} was read")
    assert not marker.exists(), file.name
pq.read_table(folder / "top.parquet")["x"].to_pylist()
assert marker.exists(), "the file was harmless, so nothing was shown"
"""
)


@pytest.fixture(scope="module")
def evil_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files whose values, once read as what they claim to be, create the file `marker` beside the folder."""
    folder = tmp_path_factory.mktemp("evil") / "raw"
    folder.mkdir()
    run_python(MAKE_EVIL, folder)
    return folder


def run_python(code: str, folder: Path) -> None:
    arguments = [sys.executable, "-c", code, str(folder), str(folder.parent / "marker")]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_column_that_would_run_code_is_refused_with_ray_data_imported(evil_folder: Path) -> None:
    run_python(READ_EVIL, evil_folder)
    (evil_folder.parent / "marker").unlink()


@pytest.mark.parametrize("name", ["top.parquet", "nested.parquet"])
def test_a_column_that_would_run_code_is_refused_without_it_too(
    evil_folder: Path, name: str
) -> None:
    with pytest.raises(
        UserError, match=f"{name}: a column has an Arrow extension type, which may run code"
    ):
        parts_of(evil_folder / name)
    assert not (evil_folder.parent / "marker").exists()


class Counting(pa.ExtensionType):
    """An extension type that notes when Arrow builds it, as one that unpickles would."""

    built = 0

    def __init__(self) -> None:
        super().__init__(pa.int64(), "s2l_ray.test.counting")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Counting":
        cls.built += 1
        return cls()


@pytest.fixture
def counting() -> Iterator[type[Counting]]:
    pa.register_extension_type(Counting())
    Counting.built = 0
    yield Counting
    pa.unregister_extension_type("s2l_ray.test.counting")


@pytest.mark.parametrize("padding", range(12))
def test_an_extension_type_is_refused_before_it_is_built(
    counting: type[Counting], padding: int
) -> None:
    field = pa.field("a" * (padding + 1), counting())
    deep = pa.field("deep", pa.list_(pa.struct([field])))
    for schema in (
        pa.schema([field]),
        pa.schema([deep]),
        pa.schema([pa.field("b", pa.int8()), field]),
    ):
        file = io.BytesIO()
        pq.ParquetWriter(file, schema).close()
        counting.built = 0
        with pytest.raises(
            UserError, match="x: a column has an Arrow extension type, which may run code"
        ):
            open_parquet(file.getvalue(), "x")
        assert counting.built == 0
        pq.ParquetFile(io.BytesIO(file.getvalue()))
        assert counting.built > 0


@pytest.mark.parametrize(
    "hide",
    [lambda b: b + b"A", lambda b: b[:-2], lambda b: b[:40] + b"\n" + b[40:], lambda b: b"?" + b],
)
def test_an_extension_type_behind_odd_base64_is_refused(
    counting: type[Counting], hide: Any
) -> None:
    stored = hide(base64.b64encode(pa.schema([pa.field("a", counting())]).serialize().to_pybytes()))
    file = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"ARROW:schema": stored}), file)
    counting.built = 0
    with pytest.raises(UserError, match="reading x: "):
        open_parquet(file.getvalue(), "x")
    assert counting.built == 0


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1PAR1", b"\xff" * 12, b"PAR1" + b"\xff" * 4 + b"PAR1", b"{}" * 50]
)
def test_what_is_no_parquet_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="reading x: expected a whole Parquet file, but"):
        open_parquet(data, "x")


def test_ordinary_parquet_from_pandas_is_read(tmp_path: Path) -> None:
    import pandas

    frame = pandas.DataFrame(
        {"instruction": ["q"], "output": ["a"], "kind": pandas.Categorical(["x"])}, index=[7]
    )
    frame.to_parquet(tmp_path / "x.parquet")
    made = read(tmp_path / "x.parquet")
    assert original_rows(made.table).to_pylist() == [
        {"instruction": "q", "output": "a", "kind": "x", "__index_level_0__": 7}
    ]


# ---- finding files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "raw/a.jsonl", "raw/b.ndjson", "raw/deep/c.jsonl", "raw/deep/er/d.jsonl", "raw/[x] #1%.jsonl",
        "raw/.hidden.jsonl", "raw/.cache/e.jsonl", "raw/notes.txt", "raw/f.text", "other/g.jsonl",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines(tmp_path / name, GOOD)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["raw"], ["[x] #1%.jsonl", "a.jsonl", "b.ndjson", "deep/c.jsonl", "deep/er/d.jsonl"]),
        (["raw/"], ["[x] #1%.jsonl", "a.jsonl", "b.ndjson", "deep/c.jsonl", "deep/er/d.jsonl"]),
        (["raw/*.jsonl"], ["[x] #1%.jsonl", "a.jsonl"]),
        (["raw/?.*"], ["a.jsonl", "b.ndjson"]),
        (["raw/**/*.jsonl"], ["[x] #1%.jsonl", "a.jsonl", "deep/c.jsonl", "deep/er/d.jsonl"]),
        (["raw/**/d.jsonl"], ["d.jsonl"]),
        (["raw/*/*.jsonl"], ["c.jsonl"]),
        (["raw/d*/**"], ["c.jsonl", "er/d.jsonl"]),
        (["raw/[ab].*"], ["a.jsonl", "b.ndjson"]),
        (["raw/[x] #1%.jsonl"], ["[x] #1%.jsonl"]),
        (["raw/.hidden.jsonl"], [".hidden.jsonl"]),
        (
            ["raw/a.jsonl", "raw", "raw/*.jsonl"],
            ["[x] #1%.jsonl", "a.jsonl", "b.ndjson", "deep/c.jsonl", "deep/er/d.jsonl"],
        ),
        (["raw/deep", "other"], ["other/g.jsonl", "raw/deep/c.jsonl", "raw/deep/er/d.jsonl"]),
    ],
)
def test_files_folders_and_globs(tree: Path, patterns: list[str], names: list[str]) -> None:
    for prefix in (str(tree), f"file://{tree}"):
        if prefix.startswith("file") and any(mark in "".join(patterns) for mark in "?#"):
            continue  # in a URI these have another meaning
        found = find_files([f"{prefix}/{pattern}" for pattern in patterns], None)
        assert [file.name for file in found] == names
        for file in found:
            remote, path = filesystem(file.uri)
            assert remote.get_file_info(path).size == file.bytes == len(json.dumps(GOOD)) + 1


def test_names_are_relative_to_the_root(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    for root in (str(tree), f"{tree}/", ".", "~", "raw/.."):
        assert [file.name for file in find_files(["raw/deep", "~/other"], root)] == [
            "other/g.jsonl",
            "raw/deep/c.jsonl",
            "raw/deep/er/d.jsonl",
        ]
    with pytest.raises(
        UserError, match=r"is not below examples.root = .*raw. Correct one of the two"
    ):
        find_files(["raw", "other"], str(tree / "raw"))
    with pytest.raises(UserError, match="is not below"):
        find_files(["raw"], str(tree / "ra"))


@pytest.mark.parametrize(
    "pattern", ["absent", "absent/*.jsonl", "raw/*.parquet", "raw/q*", "*.jsonl/x"]
)
def test_a_pattern_that_matches_nothing_is_named(tree: Path, pattern: str) -> None:
    with pytest.raises(UserError) as error:
        find_files([str(tree / "raw"), str(tree / pattern)], None, "evaluation")
    assert (
        f"looking for evaluation.files: {tree / pattern} matches no file that can be read (.jsonl, "
        in str(error.value)
    )


def test_unfit_files_are_named(tree: Path) -> None:
    with pytest.raises(UserError, match=r"f.text is none of .jsonl, .ndjson, .json.* Convert it"):
        find_files([str(tree / "raw/f.text")], None)
    (tree / "raw/empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty.jsonl is empty. Remove it"):
        find_files([str(tree / "raw")], None)
    no_rows = parquet(tree / "none.parquet", {"instruction": pa.array([], pa.string())})
    with pytest.raises(UserError, match=r"none.parquet: it has no rows"):
        parts_of(no_rows)
    with pytest.raises(UserError, match=r"are both a.jsonl below the root"):
        find_files([f"{tree}/raw/a.jsonl", f"file://{tree}/raw/a.jsonl"], str(tree / "raw"))


def test_raw_files_on_s3_are_found_and_read(s3_bucket: str, tmp_path: Path) -> None:
    store = Store(join_uri(s3_bucket, f"raw {tmp_path.name}"))
    row = {**GOOD, "source": "s"}
    for name in ("a.jsonl", "deep/b c.jsonl", "deep/x#1%.jsonl", ".hidden/d.jsonl"):
        store.write(name, (json.dumps(row) + "\n").encode() * 3)
    store.write(
        "t.parquet", parquet_bytes(pa.table({"prompt": ["q"] * 3, "completion": ["a"] * 3}))
    )
    expected = ["a.jsonl", "deep/b c.jsonl", "deep/x#1%.jsonl", "t.parquet"]
    for pattern, root in (
        (store.uri, None),
        (store.uri, store.uri),
        (join_uri(store.uri, "**/*"), store.uri),
    ):
        files = find_files([pattern], root)
        assert [file.name for file in files] == expected
        parts = part_ranges(files, [index_file(file, 2) for file in files])
        made = [read_part(part, Columns()) for part in parts]
        assert [part.table.num_rows for part in made] == [2, 1] * 4
    with pytest.raises(UserError, match="matches no"):
        find_files([join_uri(store.uri, "absent")], None)
