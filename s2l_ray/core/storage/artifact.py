"""Content-addressed artifacts in parts.

An artifact lives at `<storage>/<stage>/<fingerprint>/`. It exists only once its manifest is
there, which is written last. Data files carry their content hash in their name and are checked
against the manifest whenever they are read. A part that is done leaves a receipt, so a later run
finds the finished parts of a run that died.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from s2l_ray.core.storage.manifest import FileEntry, Manifest, Part, difference, entry_of
from s2l_ray.core.storage.parquet import read_parquet
from s2l_ray.core.storage.receipts import parts_with_receipts, write_receipt
from s2l_ray.core.storage.store import Store, join_uri
from s2l_ray.errors import UserError


@dataclass(frozen=True)
class Artifact:
    """The place in the store of what one stage makes from given inputs, be it made yet or not."""

    store: Store
    stage: str
    fingerprint: str

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
        return _of(self, Manifest.from_bytes(data, self.uri_of("manifest.json")))

    def manifest(self) -> Manifest:
        """The manifest of an artifact that must be there."""
        found = self.committed()
        if found is None:
            raise UserError(
                f"reading {self.uri}: there is no manifest.json, so nothing there counts. Run "
                "the job that makes it."
            )
        return found

    def read_file(self, entry: FileEntry) -> bytes:
        """The bytes of a file, checked against what the manifest says of it.

        Raises:
            UserError: the file is missing, shorter or longer than it was, or its content changed.
        """
        what = self.uri_of(entry.name)
        remedy = f"Restore the file, or remove {self.uri} and run again: it will be made anew."
        try:
            data = self.read(entry.name)
        except FileNotFoundError:
            raise UserError(
                f"reading {what}: the manifest lists it, but it is missing. {remedy}"
            ) from None
        found = difference(entry, data)
        if found is not None:
            raise UserError(f"reading {what}: {found} {remedy}")
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
        return entry_of(name, data)

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
            files: role -> (suffix, bytes). The files of a role lie in a folder named by it, which
                holds nothing else, so that other libraries open it as one table. The main file has
                the role "data".
        """
        entries = {
            role: self.write_file(f"{role}/part-{index:05d}", suffix, data)
            for role, (suffix, data) in files.items()
        }
        part = Part(index, rows, entries, node, run, stats)
        write_receipt(self.store, self.path, part)
        return part

    def adopt(self, index: int, other: "Artifact", part: Part) -> Part:
        """Take a finished part of another artifact as this one's part `index`.

        Its files are read, checked and written here.
        """
        files = {
            role: (PurePosixPath(entry.name).suffix, other.read_file(entry))
            for role, entry in part.files.items()
        }
        return self.write_part(index, part.rows, files, part.node, part.run, part.stats)

    def finished_parts(self) -> dict[int, Part]:
        """Parts that earlier runs finished before the artifact was committed, by index.

        Their data files are there, with the right size.
        """
        return parts_with_receipts(self.store, self.path)

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and clear what only a restart needs.

        Raises:
            UserError: a listed file is missing or has another size.
        """
        sizes = self.store.list(self.path)
        listed = manifest.data_files
        wrong = [entry.name for entry in listed if sizes.get(entry.name) != entry.bytes]
        if wrong:
            raise UserError(
                f"committing {self.uri}: expected {len(listed)} data files, but "
                f"{len(wrong)} are missing or have another size, {wrong[0]} first. "
                f"Is {self.store.uri} the same storage on every node?"
            )
        self.write("manifest.json", manifest.to_bytes())
        for scratch in ("receipts", "state", "rounds"):
            self.delete(scratch)


def _of(artifact: Artifact, manifest: Manifest) -> Manifest:
    """The manifest, if it was written for this artifact."""
    if (manifest.stage, manifest.fingerprint) != (artifact.stage, artifact.fingerprint):
        raise UserError(
            f"reading {artifact.uri}: expected the manifest of {artifact.stage} "
            f"{artifact.fingerprint}, got that of {manifest.stage} {manifest.fingerprint}. The "
            "folder was renamed, or holds another's files: remove it and run again."
        )
    return manifest


def artifact_at(uri: str, stage: str, field: str) -> Artifact:
    """The committed artifact that a config field names by its URI.

    Raises:
        UserError: the URI is none of an artifact of that stage, or nothing is committed there.
    """
    place, question, query = uri.partition("?") if "://" in uri else (uri, "", "")
    storage, _, fingerprint = place.rstrip("/").rpartition("/")
    storage, _, named = storage.rpartition("/")
    if named != stage or not storage or not fingerprint:
        raise UserError(
            f"reading {field}: expected the URI of a {stage} artifact, "
            f"<storage>/{stage}/<fingerprint> (run.json lists them), got {uri}."
        )
    artifact = Artifact(Store(f"{storage}{question}{query}"), stage, fingerprint)
    if artifact.committed() is None:
        raise UserError(
            f"reading {field}: there is no manifest.json in {uri}, so nothing there "
            "counts. Correct the URI, or run the job that makes it."
        )
    return artifact
