"""Whole files on any filesystem pyarrow knows, each read and written in one call."""

import errno
import functools
import os
import uuid
from collections.abc import Sequence
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs as pafs

from s2l_ray.errors import UserError

# Files read or written at a time.
IO_THREADS = 16
# What may stand in a URI as it is, beside letters and digits.
URI_CHARACTERS = "%/:@!$&'()*+,;=?~"


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
            f"opening {uri}: {error}. Expected a local path or a URI that pyarrow.fs knows "
            "(s3://, gs://, hdfs://, file://)."
        ) from None


def is_folder(uri: str) -> bool:
    """Whether a folder lies at a URI or local path."""
    files, path = filesystem(uri)
    return bool(files.get_file_info(path).type == pafs.FileType.Directory)


def join_uri(uri: str, path: str) -> str:
    """The place below a folder; the query of a URI (endpoint, region) stays at the end."""
    place, question, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{place.rstrip('/')}/{path}{question}{query}"


def is_plain_path(path: str) -> bool:
    """Whether a path stays below a folder: plain names with slashes between them."""
    return path.isprintable() and not {"", ".", ".."} & set(path.split("/"))


class Store:
    """Whole files under one root, read and written in one call. Pickles as its URI.

    No path escapes from the root, wherever it was read: all methods raise UserError for one that
    has `..` or an empty name in it.
    """

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
                f"opening the storage {self.uri}: {error}. Correct run.storage, or what gives "
                "access to it."
            ) from None
        if kind == pafs.FileType.File:
            raise UserError(
                f"opening the storage {self.uri}: it is a file. Set run.storage to a folder; it is "
                "made when it is not there."
            )

    def _full(self, path: str) -> str:
        if path and not is_plain_path(path):
            raise UserError(
                f"opening a file of the storage {self.uri}: expected a path of plain names below "
                f"it, got {path!r}. Whoever wrote what names it is not to be trusted: do not use "
                "that artifact."
            )
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def read(self, path: str) -> bytes:
        with self.fs.open_input_file(self._full(path)) as stream:
            return stream.read()

    def write(self, path: str, data: bytes) -> None:
        """All of `data` or nothing: on S3 an interrupted stream would still leave an object."""
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

    def link(self, folder: str, targets: dict[str, str]) -> None:
        """Have exactly these symbolic links in a folder; without effect where there are none.

        Object stores have none, and some network filesystems.

        Args:
            targets: name of the link -> path below the root that it points to.
        """
        if not isinstance(self.fs, pafs.LocalFileSystem):
            return
        place = self._full(folder)
        os.makedirs(place, exist_ok=True)
        for entry in os.scandir(place):
            if entry.is_symlink() and entry.name not in targets:
                os.unlink(entry.path)
        for name, target in targets.items():
            full = self._full(f"{folder}/{name}")
            if os.path.isdir(full) and not os.path.islink(full):
                # As in a copy of a storage that was made by following its links.
                continue
            temporary = f"{place}/.{uuid.uuid4().hex}.tmp"
            try:
                os.symlink(os.path.relpath(self._full(target), place), temporary)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP):
                    return
                raise
            os.replace(temporary, full)

    def uri_of(self, path: str) -> str:
        """The URI of a path below the root, for people and libraries that open URIs themselves."""
        self._full(path)
        return join_uri(self.uri, path)

    def exists(self, path: str) -> bool:
        return self.fs.get_file_info(self._full(path)).type != pafs.FileType.NotFound

    def list(self, folder: str) -> dict[str, int]:
        """Names and sizes of the files in a folder, at any depth; empty when there is no folder.

        Names are relative to the folder.
        """
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

    def delete(self, path: str) -> None:
        """Remove a file, or a folder and all in it; nothing happens when there is neither."""
        kind = self.fs.get_file_info(self._full(path)).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(self._full(path))
        elif kind == pafs.FileType.File:
            self.fs.delete_file(self._full(path))
