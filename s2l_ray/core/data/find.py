"""Finding raw files: paths, folders and globs on any filesystem to a list of files."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote

from pyarrow import fs as pafs

from s2l_ray.core.data.formats import names
from s2l_ray.core.data.hub import saved_files
from s2l_ray.core.data.parts import RawFile
from s2l_ray.core.storage.store import filesystem
from s2l_ray.errors import UserError

SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class _Found:
    """A file on its filesystem, and the name of the saved data set it belongs to, if any."""

    info: pafs.FileInfo
    dataset: str | None = None


def find_files(
    patterns: list[str], root: str | None, section: str = "examples", split: str = "train"
) -> list[RawFile]:
    """All raw files that the patterns name, sorted by their name relative to the root.

    Args:
        patterns: paths, folders or globs. A folder may be one that the `datasets` library saved.
        section: of the config, for messages.
        split: of such a folder that has several.

    Raises:
        UserError: a pattern that matches nothing, a file of an unknown kind, an empty file, two
            files with one name.
    """
    found: dict[str, _Found] = {}
    for pattern in patterns:
        matches = _matches(pattern, section, split)
        if not matches:
            raise UserError(
                f"looking for {section}.files: {pattern} matches no file that can be read "
                f"({names.described()}). Correct the path; with several nodes it must be a place "
                "that all of them see."
            )
        found.update(matches)
    base = (
        _with_slash(filesystem(root)[1])
        if root
        else _common_folder(match.info.path for match in found.values())
    )
    files: dict[str, RawFile] = {}
    for uri, match in found.items():
        file = _raw_file(uri, match, base, root, section)
        if file.name in files:
            raise UserError(
                f"looking for {section}.files: {files[file.name].uri} and {uri} are both "
                f"{file.name} below the root. Name one of them, or give the other another name."
            )
        files[file.name] = file
    return [files[name] for name in sorted(files)]


def _raw_file(uri: str, match: _Found, base: str, root: str | None, section: str) -> RawFile:
    info = match.info
    if not info.path.startswith(base):
        raise UserError(
            f"looking for {section}.files: {uri} is not below {section}.root = {root}. Correct one "
            "of the two."
        )
    if info.size == 0:
        raise UserError(
            f"looking for {section}.files: {uri} is empty. Remove it, or name other files."
        )
    name = info.path[len(base) :]
    return RawFile(uri, name, match.dataset or source_of(name), info.size, info.mtime_ns or 0)


def source_of(name: str) -> str:
    """The source of a file's rows, where no column says it: the file's name without suffixes and
    without its number among shards."""
    return SHARD.sub("", names.bare_name(name).rpartition(".")[0])


def _matches(pattern: str, section: str, split: str) -> dict[str, _Found]:
    """URI -> each file that a path, folder or glob names; hidden files and folders are left out."""
    filesystem_, path = filesystem(pattern)
    path = path.rstrip("/")
    try:
        info = filesystem_.get_file_info(path or "/")
        if info.type == pafs.FileType.File:
            found = [_Found(info)]
        elif info.type == pafs.FileType.Directory:
            found = _in_folder(filesystem_, path, split)
        else:
            found = _of_glob(filesystem_, path)
    except OSError as error:
        raise UserError(
            f"looking for {section}.files: {pattern}: {error}. Correct the path, or what gives "
            "access to it."
        ) from None
    if info.type == pafs.FileType.File and not path.endswith(names.SUFFIXES):
        raise UserError(
            f"looking for {section}.files: {pattern} is none of {names.described()}. Convert it, "
            "or name other files."
        )
    return {_uri(pattern, path, match.info.path): match for match in found}


def _in_folder(files: pafs.FileSystem, folder: str, split: str) -> list[_Found]:
    saved = saved_files(files, folder, split)
    if saved is None:
        return _below(files, folder, ["**"])
    dataset = folder.rpartition("/")[2]
    return [_Found(info, dataset) for info in files.get_file_info(saved)]


def _of_glob(files: pafs.FileSystem, path: str) -> list[_Found]:
    pieces = path.split("/")
    plain = next((n for n, piece in enumerate(pieces) if set(piece) & set("*?[")), 0)
    return _below(files, "/".join(pieces[:plain]), pieces[plain:]) if plain else []


def _below(files: pafs.FileSystem, folder: str, wanted: list[str]) -> list[_Found]:
    """The files below a folder whose path from there fits a glob, given by its pieces."""
    selector = pafs.FileSelector(folder or "/", recursive=True, allow_not_found=True)
    return [
        _Found(info)
        for info in files.get_file_info(selector)
        if info.type == pafs.FileType.File
        and info.path.endswith(names.SUFFIXES)
        and _is_wanted(info.path[len(folder) + 1 :].split("/"), wanted)
    ]


def _is_wanted(pieces: list[str], wanted: list[str]) -> bool:
    return not any(piece.startswith(".") for piece in pieces) and _fits(pieces, wanted)


def _fits(pieces: list[str], wanted: list[str]) -> bool:
    """Globs as shells read them: `*` stays inside a folder's name, `**` spans any folders."""
    if not wanted:
        return not pieces
    if wanted[0] == "**":
        return any(_fits(pieces[skip:], wanted[1:]) for skip in range(len(pieces) + 1))
    return (
        bool(pieces) and fnmatch.fnmatchcase(pieces[0], wanted[0]) and _fits(pieces[1:], wanted[1:])
    )


def _uri(pattern: str, path: str, found: str) -> str:
    """How to open a path on the filesystem of a pattern: with the access keys and the query of the
    pattern, where it is a URI."""
    if "://" not in pattern:
        return found
    place, question, query = pattern.partition("?")
    place = place.rstrip("/")
    ends = (end for end in range(len(place)) if unquote(place[end:]) == path)
    access = place[: next(ends, place.index("://") + 3)]
    return f"{access}{quote(found)}{question}{query}"


def _with_slash(folder: str) -> str:
    return folder if folder.endswith("/") else folder + "/"


def _common_folder(paths: Iterable[str]) -> str:
    """The folder that all paths have in common, with a slash at its end; "" where there is none."""
    folders = [path.split("/")[:-1] for path in paths]
    shared = []
    for pieces in zip(*folders, strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return "/".join(shared) + "/" if shared else ""
