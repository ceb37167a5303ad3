"""Content-addressed artifacts in parts.

An artifact lives at `<storage>/<stage>/<fingerprint>/`. Its manifest, written last, is the only
proof that it exists. Data files carry their content hash in their name and are checked against the
manifest whenever they are read. A part that is done leaves a receipt, so a later run finds the
finished parts of a run that died.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from s2l_ray.core.storage.manifest import FileEntry, Manifest, Part
from s2l_ray.core.storage.parquet import read_parquet
from s2l_ray.core.storage.store import Store, join_uri
from s2l_ray.errors import UserError

IO_THREADS = 16


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
