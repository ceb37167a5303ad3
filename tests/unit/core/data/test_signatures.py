"""Files that are something else than their names say are told what they are."""

import gzip
import lzma
from pathlib import Path

import pytest

from s2l_ray.errors import UserError
from tests.unit.core.data.raw import parts_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
# Without the time at which it was compressed, which would change the name of a test.
GZIP = gzip.compress(b"{}", mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", POINTER, "a pointer of Git LFS, not the file .* Run git lfs pull"),
        ("x.parquet", POINTER, "a pointer of Git LFS"),
        ("x.csv.gz", POINTER, "a pointer of Git LFS"),
        ("x.jsonl", GZIP, "it is compressed with gzip. Add .gz to its name"),
        ("x.tsv", lzma.compress(b"{}"), "it is compressed with xz. Add .xz to its name"),
        ("x.json", b"PAR1....", "it is a Parquet file. Name it .parquet"),
        ("x.jsonl", b"ARROW1..", "it is an Arrow file"),
        ("x.csv", b"PK\x03\x04...", "it is a zip archive. Unpack it"),
        ("x.csv", "a,b".encode("utf-16"), "it is text in UTF-16. Convert it to UTF-8"),
        ("x.json", b"<!DOCTYPE HTML><html>", "it is a web page. Download the file itself"),
    ],
)
def test_what_a_file_is_is_told(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*{said}"):
        parts_of(tmp_path / name)
