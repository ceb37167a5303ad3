"""An open raw file: its bytes uncompressed, and the hash of the file as it lies there."""

import hashlib
import io
import lzma
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from s2l_ray.core.data.formats.names import codec_of
from s2l_ray.core.data.formats.spans import Span
from s2l_ray.errors import UserError

CHUNK = 1 << 20
# Bytes at the beginning of a file that are looked at to find out what it is.
PEEK = 1 << 16
# Bytes of text that one Arrow column can hold.
LARGEST_SPAN = (1 << 31) - 1
# Bytes of one row: no memory would be enough for a file that unpacks to a single endless one.
LARGEST_ROW = 1 << 28


class Source:
    """An open raw file: read at any place where it is plain, only forward where it is compressed.

    Args:
        name: decides how the file is compressed.
        uri: for messages.
    """

    def __init__(self, file: pa.NativeFile, name: str, uri: str) -> None:
        self.file, self.name, self.uri = file, name, uri
        self.hashing = _Hashing(file)
        codec = codec_of(name)
        plain: Any = self.hashing
        if codec == "xz":
            plain = _xz(self.hashing)
        elif codec is not None:
            plain = pa.CompressedInputStream(pa.PythonFile(self.hashing), codec)
        self.forward = io.BufferedReader(plain, PEEK)
        self.compressed = codec is not None
        self.position = 0

    def chunks(self) -> Iterator[bytes]:
        """All bytes from the front, uncompressed."""
        return iter(lambda: self.forward.read(CHUNK), b"")

    def at(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`; of a compressed file, not before those that were read last."""
        if not self.compressed:
            return self.file.read_at(end - start, start)
        while self.position < start:
            skipped = len(self.forward.read(min(CHUNK, start - self.position)))
            if not skipped:
                raise OSError(f"it ends after {self.position} bytes")
            self.position += skipped
        data = self.forward.read(end - start)
        self.position += len(data)
        return data

    def text_of(self, span: Span) -> bytes:
        """The bytes of a span of text.

        Raises:
            UserError: more of them than one Arrow column can hold.
        """
        if span.end - span.start > LARGEST_SPAN:
            raise UserError(
                f"reading {self.uri}: {span.rows} rows from row {span.first_row + 1} are "
                f"{span.end - span.start} bytes, more than a part may have. Lower "
                "examples.rows_per_part."
            )
        return self.at(span.start, span.end)

    def check_row(self, row: int, size: int) -> None:
        """Refuse a row of more than LARGEST_ROW bytes, `row` counted from 1.

        Raises:
            UserError: it is larger.
        """
        if size > LARGEST_ROW:
            raise UserError(
                f"reading {self.uri}, row {row}: expected at most {LARGEST_ROW >> 20} MiB in a "
                "row, got more. If the rows are one to a line or items of one array, look at that "
                "row; remove it."
            )

    def sha256(self) -> str:
        """Hash of the file as it lies there; reads what was not read yet."""
        return self.hashing.finish()


def _xz(stream: Any) -> lzma.LZMAFile:
    return lzma.LZMAFile(stream)


class _Hashing(io.RawIOBase):
    """Passes a file's bytes on in order, and hashes them."""

    def __init__(self, file: pa.NativeFile) -> None:
        self.file, self.digest, self.position = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        self.position += count
        return count

    def finish(self) -> str:
        self.file.seek(self.position)
        while self.readinto(bytearray(CHUNK)):
            pass
        return self.digest.hexdigest()
