"""Where one training keeps its files inside the artifact that it belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

from s2l_ray.core.model.checkpoint import checkpoint_files, checkpoint_folder
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import FileEntry
from s2l_ray.errors import UserError


@dataclass(frozen=True)
class Place:
    """The `Files` of one training: all lies under `prefix`, empty or ending with a slash.

    Training states lie under `state/` of the artifact, which is deleted when it is committed.
    """

    artifact: Artifact
    prefix: str

    def write(self, path: str, data: bytes) -> None:
        self.artifact.write(self._path(path), data)

    def read(self, path: str) -> bytes:
        return self.artifact.read(self._path(path))

    def list(self, folder: str) -> Sequence[str]:
        """Names of the files and folders in a folder."""
        return sorted({name.split("/")[0] for name in self.artifact.list(self._path(folder))})

    def delete(self, folder: str) -> None:
        self.artifact.delete(self._path(folder))

    def folder(self, step: int) -> str:
        """The folder of a checkpoint, relative to the artifact."""
        return f"{self.prefix}{checkpoint_folder(step)}"

    def checkpoint(self, step: int) -> Sequence[FileEntry]:
        """The files of a complete checkpoint."""
        found = checkpoint_files(self, step)
        if found is None:
            raise UserError(
                f"training: the checkpoint of step {step} is not complete in {self.artifact.uri}. "
                "Run the same command again."
            )
        return [
            FileEntry(f"{self.folder(step)}/{entry['name']}", entry["bytes"], entry["sha256"])
            for entry in found
        ]

    def _path(self, path: str) -> str:
        return f"state/{self.prefix}{path}" if path.startswith("state") else f"{self.prefix}{path}"
