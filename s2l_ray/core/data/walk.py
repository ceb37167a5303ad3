"""The files of a folder: all below it, each once, or those that a file in it lists."""

import os
from collections import deque
from collections.abc import Sequence

from pyarrow import fs as pafs

from s2l_ray.errors import UserError

HIDDEN = "hidden"


def files_below(files: pafs.FileSystem, folder: str) -> tuple[list[pafs.FileInfo], dict[str, str]]:
    """The files below a folder, and what is passed over: path -> why. Nothing is looked for in
    hidden folders.

    A link is followed once: links that lead to what is there anyway are passed over, so that rows
    are not read twice and links in a circle end.
    """
    if not isinstance(files, pafs.LocalFileSystem):
        return _remote(files, folder)
    paths, passed_over = _local(folder)
    found = files.get_file_info(paths)
    nothing = [info.path for info in found if info.type != pafs.FileType.File]
    passed_over |= dict.fromkeys(nothing, "a dangling link, or no regular file")
    return [info for info in found if info.type == pafs.FileType.File], passed_over


def _remote(files: pafs.FileSystem, folder: str) -> tuple[list[pafs.FileInfo], dict[str, str]]:
    selector = pafs.FileSelector(folder or "/", recursive=True, allow_not_found=True)
    found, passed_over = [], {}
    for info in files.get_file_info(selector):
        *folders, name = info.path[len(folder) + 1 :].split("/")
        if info.type != pafs.FileType.File or any(piece.startswith(".") for piece in folders):
            continue
        if name.startswith("."):
            passed_over[info.path] = HIDDEN
        else:
            found.append(info)
    return found, passed_over


def _local(folder: str) -> tuple[list[str], dict[str, str]]:
    """Paths of all files, those behind links after the others."""
    folders, links = deque([folder]), deque[str]()
    seen: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    paths: list[str] = []
    while folders or links:
        path = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(path)
        if real in seen:
            passed_over[path] = f"a link to {seen[real]}, which is read already"
            continue
        seen[real] = path
        if not os.path.isdir(path):
            paths.append(path)
            continue
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                if not entry.is_dir():
                    passed_over[entry.path] = HIDDEN
            elif entry.is_symlink():
                links.append(entry.path)
            else:
                folders.append(entry.path)
    return paths, passed_over


def listed_files(
    files: pafs.FileSystem, folder: str, names: Sequence[str], by: str, remedy: str
) -> list[str]:
    """Paths of the files of a folder that one of them lists.

    Args:
        by: the file that lists them, for messages.
        remedy: what to do, for messages.

    Raises:
        UserError: one of them is missing.
    """
    paths = [f"{folder}/{name}" for name in names]
    missing = [info.path for info in files.get_file_info(paths) if info.type != pafs.FileType.File]
    if missing:
        raise UserError(
            f"reading {folder}: its {by} lists {missing[0]}, which is missing. {remedy}."
        )
    return paths
