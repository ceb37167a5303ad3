"""Files that would run code when they are read are refused before."""

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2l_ray.core.storage.parquet import open_parquet
from s2l_ray.errors import UserError
from tests.unit.core.data.raw import parts_of

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
table = pa.table({"instruction": good, "output": good, "x": nested})
pq.write_table(table, folder / "nested.parquet")
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
    """Parquet files whose values, once unpickled, create the file `marker` beside the folder."""
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
