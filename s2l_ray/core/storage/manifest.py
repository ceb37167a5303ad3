"""What an artifact consists of: its manifest, the parts it lists, and its fingerprint."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from s2l_ray.core.storage.records import PlainPath, from_bytes, to_bytes
from s2l_ray.errors import UserError

FORMAT = 1
CHECKSUM = b', "sha256": "%s"}'


def fingerprint(value: Any) -> str:
    """Hash of a JSON value: equal values give equal names, whatever the order of their keys."""
    canonical = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class FileEntry:
    """One data file of an artifact: its name inside the folder, its size in bytes, its SHA-256."""

    name: PlainPath
    bytes: int
    sha256: str


def entry_of(name: str, data: bytes) -> FileEntry:
    """The entry of a file with this content."""
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def difference(entry: FileEntry, data: bytes) -> str | None:
    """What differs between an entry and a file's content, as a sentence, or None."""
    if len(data) != entry.bytes:
        return f"expected {entry.bytes} bytes, got {len(data)}."
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        return f"expected SHA-256 {entry.sha256}, got {digest}: the content changed."
    return None


@dataclass(frozen=True)
class Part:
    """What a finished part is: its rows, its files by role, and who made it in which run."""

    index: int
    rows: int
    files: dict[PlainPath, FileEntry]
    node: str = ""
    run: str = ""
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def for_reading(self) -> "Part":
        """What a task needs to read it and check it, without what only people and the driver need.

        A job may have tens of thousands of parts, and statistics with a number for each cluster.
        """
        return replace(self, node="", run="", stats={})


@dataclass(frozen=True)
class Manifest:
    """What an artifact holds; the artifact counts only once this is written.

    `info` holds what later stages and people need of it; small values only.
    """

    format: int
    stage: str
    fingerprint: str
    inputs: dict[str, str]
    section: dict[str, Any]
    parts: list[Part]
    files: list[FileEntry]
    info: dict[str, Any]
    seconds: float
    run: str
    made_at: str
    scaling: dict[str, Any]
    versions: dict[str, str]
    # The version of the stage.
    version: int = 0
    # How many of `seconds` passed until the first row was worked on; None where no row was.
    start_seconds: float | None = None

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def data_files(self) -> list[FileEntry]:
        """All files that it lists: those of the parts, then the others."""
        return [entry for part in self.parts for entry in part.files.values()] + self.files

    def parts_made_by(self, run: str) -> int:
        """How many parts a run made itself; the others were found from runs before it."""
        return sum(part.run == run for part in self.parts)

    def to_bytes(self) -> bytes:
        """As JSON; its last field is the SHA-256 of the JSON without it."""
        text = to_bytes(self)
        return text[:-1] + CHECKSUM % hashlib.sha256(text).hexdigest().encode()

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> "Manifest":
        """The manifest that `to_bytes` wrote, or an earlier version without a checksum.

        Raises:
            UserError: it was changed or cut, or another version of the format wrote it.
        """
        try:
            manifest = from_bytes(cls, _without_checksum(data))
        except ValueError as error:
            raise UserError(
                f"reading {what}: not a manifest of this version ({error}). Remove the folder it "
                "lies in and run again."
            ) from None
        if manifest.format != FORMAT:
            raise UserError(
                f"reading {what}: expected format {FORMAT}, got {manifest.format}. Use the s2l_ray "
                "version that wrote it, or another storage."
            )
        return manifest


def _without_checksum(data: bytes) -> bytes:
    """The JSON of a manifest's other fields. A damaged field of this name stays, and is unknown."""
    length = len(CHECKSUM % (b"0" * 64))
    text, end = data[:-length] + b"}", data[-length:]
    digest = end[-66:-2]
    if end != CHECKSUM % digest:
        return data
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("its content changed: its checksum is another")
    return text
