"""Content-addressed artifacts in parts, on any filesystem pyarrow knows (design, section 3 and invariants 2 and 3).

An artifact lives at `<storage>/<stage>/<fingerprint>/`. Its manifest, written last, is the only proof that it exists. Every
file is serialised in memory and written in one call; data files carry their content hash in their name and are checked
against the manifest whenever they are read. A part that is done leaves a receipt, so a dead run's work is found again.
"""

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs as pafs

from s2l_ray.core.storage.tables import read_parquet
from s2l_ray.errors import UserError

FORMAT = 1
IO_THREADS = 16
URI_CHARACTERS = "%/:@!$&'()*+,;=?~"  # may stand in a URI as they are, beside letters and digits


def fingerprint(value: Any) -> str:
    """Hash of a JSON value: equal values give equal names, whatever the order of their keys."""
    canonical = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


@functools.lru_cache(maxsize=64)
def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path on it.

    Raises:
        UserError: the scheme is unknown or the filesystem cannot be set up.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return pafs.FileSystem.from_uri(quote(uri, safe=URI_CHARACTERS))
    except (pa.ArrowInvalid, OSError, NotImplementedError) as error:
        raise UserError(
            f"opening {uri}: {error}. Expected a local path or a URI that pyarrow.fs knows (s3://, gs://, hdfs://, file://)."
        ) from None


def is_folder(uri: str) -> bool:
    """Whether a folder lies at a URI or local path."""
    files, path = filesystem(uri)
    return bool(files.get_file_info(path).type == pafs.FileType.Directory)


def join_uri(uri: str, path: str) -> str:
    """The place below a folder: the query of a URI (endpoint, region) stays at the end, local paths have none."""
    place, question, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{place.rstrip('/')}/{path}{question}{query}"


@dataclass(frozen=True)
class FileEntry:
    """One data file of an artifact: its name inside the artifact's folder, its size in bytes, and its SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """What a finished part is: the rows it holds, its files by role, and who made it in which run."""

    index: int
    rows: int
    files: dict[str, FileEntry]
    node: str = ""
    run: str = ""
    stats: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Part":
        return cls(
            **{**raw, "files": {role: FileEntry(**entry) for role, entry in raw["files"].items()}}
        )


@dataclass(frozen=True)
class Manifest:
    """The proof of an artifact. `info` holds what the stage wants to tell later stages and people; small values only."""

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
    version: int = 0  # of the stage
    start_seconds: float | None = (
        None  # of `seconds`, until the first row was worked on; None: no row was
    )

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def parts_made_by(self, run: str) -> int:
        """How many parts a run made itself; the others were found from runs before it."""
        return sum(part.run == run for part in self.parts)

    def to_bytes(self) -> bytes:
        # without indent: nine times as fast, and some artifacts have tens of thousands of parts
        return json.dumps(vars(self), default=_fields, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> "Manifest":
        try:
            raw = json.loads(data)
            parts = [Part.from_dict(part) for part in raw.pop("parts")]
            files = [FileEntry(**entry) for entry in raw.pop("files")]
            manifest = cls(**raw, parts=parts, files=files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"reading {what}: not a manifest of this version ({error}). Remove the folder it lies in and run again."
            ) from None
        if manifest.format != FORMAT:
            raise UserError(
                f"reading {what}: expected format {FORMAT}, got {manifest.format}. Use the s2l_ray version that wrote it, "
                "or another storage."
            )
        return manifest


def _fields(value: object) -> dict[str, Any]:
    """For JSON, of the classes that a manifest is made of; anything else does not belong there."""
    if isinstance(value, Part | FileEntry):
        return vars(value)
    raise TypeError(f"a {type(value).__name__} is not JSON")


class Store:
    """Whole files under one root, read and written in one call. Pickles as its URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
        self.fs, self.root = filesystem(self.uri)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.uri,)

    def check(self) -> None:
        """Look at the root. Raises UserError if it is a file, or cannot be reached."""
        try:
            kind = self.fs.get_file_info(self.root).type
        except OSError as error:
            raise UserError(
                f"opening the storage {self.uri}: {error}. Correct run.storage, or what gives access to it."
            ) from None
        if kind == pafs.FileType.File:
            raise UserError(
                f"opening the storage {self.uri}: it is a file. Set run.storage to a folder; it is made when it is not there."
            )

    def _full(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def read(self, path: str) -> bytes:
        with self.fs.open_input_file(self._full(path)) as stream:
            return stream.read()

    def write(self, path: str, data: bytes) -> None:
        """All of `data` or nothing: an interrupted stream would still leave an object (design, invariant 2)."""
        full = self._full(path)
        if not isinstance(self.fs, pafs.LocalFileSystem):
            with self.fs.open_output_stream(full) as stream:
                stream.write(data)
            return
        folder = os.path.dirname(full)
        os.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, full)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    def uri_of(self, path: str) -> str:
        """The URI of a path below the root, for people and for libraries that open URIs themselves."""
        return join_uri(self.uri, path)

    def exists(self, path: str) -> bool:
        return self.fs.get_file_info(self._full(path)).type != pafs.FileType.NotFound

    def list(self, folder: str) -> dict[str, int]:
        """Names (relative to `folder`, below it at any depth) and sizes of the files there; empty when there is no folder."""
        selector = pafs.FileSelector(self._full(folder), recursive=True, allow_not_found=True)
        skip = len(self._full(folder)) + 1
        found = self.fs.get_file_info(selector)
        return {
            f.path[skip:]: f.size
            for f in found
            if f.type == pafs.FileType.File and not f.base_name.startswith(".")
        }

    def folders(self, folder: str) -> Sequence[str]:
        """Names of the folders right below a folder; none when there is no folder."""
        selector = pafs.FileSelector(self._full(folder), allow_not_found=True)
        found = self.fs.get_file_info(selector)
        return sorted(f.base_name for f in found if f.type == pafs.FileType.Directory)

    def delete(self, folder: str) -> None:
        """Remove a folder and all in it; nothing happens when there is none."""
        if self.fs.get_file_info(self._full(folder)).type == pafs.FileType.Directory:
            self.fs.delete_dir(self._full(folder))


@dataclass(frozen=True)
class Artifact:
    """A place in the store for what one stage makes from given inputs, whether it is made yet or not."""

    store: Store
    stage: str
    fingerprint: str

    @classmethod
    def at(cls, uri: str, stage: str, field: str) -> "Artifact":
        """The committed artifact that a config field names by its URI, <storage>/<stage>/<fingerprint>.

        Raises:
            UserError: the URI is none of an artifact of that stage, or nothing is committed there.
        """
        place, question, query = uri.partition("?") if "://" in uri else (uri, "", "")
        storage, _, fingerprint = place.rstrip("/").rpartition("/")
        storage, _, named = storage.rpartition("/")
        if named != stage or not storage or not fingerprint:
            raise UserError(
                f"reading {field}: expected the URI of a {stage} artifact, <storage>/{stage}/<fingerprint> (run.json lists "
                f"them), got {uri}."
            )
        artifact = cls(Store(f"{storage}{question}{query}"), stage, fingerprint)
        if artifact.committed() is None:
            raise UserError(
                f"reading {field}: there is no manifest.json in {uri}, so nothing there counts. Correct the URI, or run the job that "
                "makes it."
            )
        return artifact

    @property
    def path(self) -> str:
        return f"{self.stage}/{self.fingerprint}"

    @property
    def label(self) -> str:
        """What people are told of it by."""
        return f"{self.stage} {self.fingerprint[:8]}"

    @property
    def uri(self) -> str:
        return self.store.uri_of(self.path)

    def uri_of(self, name: str) -> str:
        return join_uri(self.uri, name)

    def read(self, name: str) -> bytes:
        return self.store.read(f"{self.path}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self.store.write(f"{self.path}/{name}", data)

    def list(self, folder: str) -> list[str]:
        return sorted(self.store.list(f"{self.path}/{folder}"))

    def delete(self, folder: str) -> None:
        self.store.delete(f"{self.path}/{folder}")

    def committed(self) -> Manifest | None:
        """The manifest, or None when the artifact is not made (or not finished)."""
        try:
            data = self.read("manifest.json")
        except FileNotFoundError:
            return None
        return Manifest.from_bytes(data, self.uri_of("manifest.json"))

    def manifest(self) -> Manifest:
        """The manifest of an artifact that must be there."""
        found = self.committed()
        if found is None:
            raise UserError(
                f"reading {self.uri}: there is no manifest.json, so nothing there counts. Run the job that makes it."
            )
        return found

    def read_file(self, entry: FileEntry) -> bytes:
        """The bytes of a file, checked against what the manifest says of it.

        Raises:
            UserError: the file is missing, shorter or longer than it was, or its content changed.
        """
        remedy = f"Restore the file, or remove {self.uri} and run again: it will be made anew."
        try:
            data = self.read(entry.name)
        except FileNotFoundError:
            raise UserError(
                f"reading {self.uri_of(entry.name)}: the manifest lists it, but it is missing. {remedy}"
            ) from None
        if len(data) != entry.bytes:
            raise UserError(
                f"reading {self.uri_of(entry.name)}: expected {entry.bytes} bytes, got {len(data)}. {remedy}"
            )
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry.sha256:
            raise UserError(
                f"reading {self.uri_of(entry.name)}: expected SHA-256 {entry.sha256}, got {digest}: the content changed. "
                f"{remedy}"
            )
        return data

    def read_part(
        self, part: Part, columns: Sequence[str] | None = None, role: str = "data"
    ) -> pa.Table:
        """The table of a part, checked by size and hash."""
        entry = part.files[role]
        return read_parquet(self.read_file(entry), self.uri_of(entry.name), columns)

    def write_named(self, name: str, data: bytes) -> FileEntry:
        """Write a file whose name others expect, such as tokenizer.json."""
        self.write(name, data)
        return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())

    def write_file(self, stem: str, suffix: str, data: bytes) -> FileEntry:
        """Write a data file under a name that carries its content hash."""
        return self.write_named(f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}{suffix}", data)

    def write_part(
        self,
        index: int,
        rows: int,
        files: dict[str, tuple[str, bytes]],
        node: str,
        run: str,
        stats: dict[str, Any],
    ) -> Part:
        """Write a part's files, then its receipt.

        Args:
            files: role -> (suffix, bytes); the main file has the role "data", those of any other role lie in a folder of its name.
        """
        entries = {
            role: self.write_file(
                f"part-{index:05d}" if role == "data" else f"{role}/part-{index:05d}", suffix, data
            )
            for role, (suffix, data) in files.items()
        }
        part = Part(index, rows, entries, node, run, stats)
        self.write(
            f"receipts/part-{index:05d}.json",
            json.dumps(asdict(part), sort_keys=True, allow_nan=False).encode(),
        )
        return part

    def adopt(self, index: int, other: "Artifact", part: Part) -> Part:
        """Take a finished part of another artifact as this one's part `index`: its files are read, checked and written here."""
        files = {
            role: (entry.name[entry.name.rindex(".") :], other.read_file(entry))
            for role, entry in part.files.items()
        }
        return self.write_part(index, part.rows, files, part.node, part.run, part.stats)

    def finished_parts(self) -> dict[int, Part]:
        """Parts that earlier runs finished before the artifact was committed. Their data files are there, with the right size."""
        names = self.store.list(self.path)
        receipts = [name for name in names if name.startswith("receipts/part-")]
        with ThreadPoolExecutor(IO_THREADS) as pool:
            parts = [part for part in pool.map(self._receipt, receipts) if part is not None]
        return {
            part.index: part
            for part in sorted(parts, key=lambda part: part.index)
            if all(names.get(entry.name) == entry.bytes for entry in part.files.values())
        }

    def _receipt(self, name: str) -> Part | None:
        """The part of a receipt; None when it is damaged, or gone because another run committed the artifact meanwhile."""
        try:
            return Part.from_dict(json.loads(self.read(name)))
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def commit(self, manifest: Manifest) -> None:
        """Check that every listed file lies there with its size, write the manifest, and clear what only a restart needs."""
        names = self.store.list(self.path)
        listed = [
            entry for part in manifest.parts for entry in part.files.values()
        ] + manifest.files
        wrong = [entry.name for entry in listed if names.get(entry.name) != entry.bytes]
        if wrong:
            raise UserError(
                f"committing {self.uri}: expected {len(listed)} data files, but {len(wrong)} are missing or have another size, "
                f"{wrong[0]} first. Is {self.store.uri} the same storage on every node?"
            )
        self.write("manifest.json", manifest.to_bytes())
        for scratch in ("receipts", "state", "rounds"):
            self.delete(scratch)
