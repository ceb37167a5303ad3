"""Finding raw files: paths, folders and globs on any filesystem to a list of files."""

import fnmatch
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from pyarrow import fs as pafs

from s2l_ray.core.data.formats import names
from s2l_ray.core.data.hub import saved_files
from s2l_ray.core.data.parts import RawFile
from s2l_ray.core.data.rounds import subset_files
from s2l_ray.core.data.walk import HIDDEN, files_below
from s2l_ray.core.storage.store import filesystem
from s2l_ray.errors import UserError

EMPTY, UNKNOWN = "empty", "no kind of file that is read"
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


# Files that stand beside rows by custom, and hold none.
NOT_ROWS = {
    "dataset_info.json": "a list of data sets for a trainer",
    "dataset_infos.json": "a description of a data set",
    "dataset_dict.json": "a description of a data set",
    "state.json": "a description of a data set",
}


@dataclass(frozen=True)
class Listing:
    """What was found under paths, folders and globs.

    Attributes:
        files: that are read.
        passed_over: URI -> why, of every other file that a folder or glob names.
    """

    files: list[RawFile]
    passed_over: dict[str, str]


@dataclass(frozen=True)
class _Found:
    """A file on its filesystem.

    Attributes:
        dataset: name of the saved data set that it belongs to, if any.
        of_subset: whether it is one of a subset that s2l_ray wrote.
        why: it is passed over; None where it is read.
    """

    info: pafs.FileInfo
    dataset: str | None = None
    of_subset: bool = False
    why: str | None = None


def find_files(
    patterns: list[str], root: str | None, section: str = "examples", split: str = "train"
) -> list[RawFile]:
    """All raw files that the patterns name; see `look`."""
    return look(patterns, root, section, split).files


def look(
    patterns: list[str], root: str | None, section: str = "examples", split: str = "train"
) -> Listing:
    """What the patterns name: files sorted by their name relative to the root.

    Args:
        patterns: paths, folders or globs. A folder may be one that the `datasets` library saved, or
            a subset.
        section: of the config, for messages.
        split: of such a folder that has several.

    Raises:
        UserError: a pattern that matches nothing, a file of an unknown kind, nothing but empty
            files, two files with one name.
    """
    found: dict[str, _Found] = {}
    passed_over: dict[str, str] = {}
    for pattern in patterns:
        matches = _matches(pattern, section, split)
        passed_over |= {uri: match.why for uri, match in matches.items() if match.why}
        read = {uri: match for uri, match in matches.items() if not match.why}
        if not read:
            raise _nothing(pattern, section, passed_over)
        found |= read
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
    left = {uri: why for uri, why in passed_over.items() if uri not in found}
    return Listing([files[name] for name in sorted(files)], left)


def _nothing(pattern: str, section: str, passed_over: dict[str, str]) -> UserError:
    empty = [uri for uri, why in passed_over.items() if why == EMPTY]
    if empty:
        return UserError(
            f"looking for {section}.files: {empty[0]} is empty. Remove it, or name other files."
        )
    return UserError(
        f"looking for {section}.files: {pattern} matches no file that can be read "
        f"({names.described()}). Correct the path; with several nodes it must be a place "
        "that all of them see."
    )


def _raw_file(uri: str, match: _Found, base: str, root: str | None, section: str) -> RawFile:
    info = match.info
    if not info.path.startswith(base):
        raise UserError(
            f"looking for {section}.files: {uri} is not below {section}.root = {root}. Correct one "
            "of the two."
        )
    name = info.path[len(base) :]
    return RawFile(
        uri,
        name,
        match.dataset or source_of(name),
        info.size,
        info.mtime_ns or 0,
        of_subset=match.of_subset,
    )


def source_of(name: str) -> str:
    """The source of a file's rows, where no column says it: the file's name without suffixes and
    without its number among shards."""
    return SHARD.sub("", names.bare_name(name).rpartition(".")[0])


def _matches(pattern: str, section: str, split: str) -> dict[str, _Found]:
    """URI -> each file that a path, folder or glob names."""
    filesystem_, path = filesystem(pattern)
    path = path.rstrip("/")
    try:
        info = filesystem_.get_file_info(path or "/")
        if info.type == pafs.FileType.File:
            found = [_looked_at(_Found(info))]
        elif info.type == pafs.FileType.Directory:
            found = _in_folder(filesystem_, path, split)
        else:
            found = _of_glob(filesystem_, path)
    except OSError as error:
        raise UserError(
            f"looking for {section}.files: {pattern}: {error}. Correct the path, or what gives "
            "access to it."
        ) from None
    # Arrow takes no other names.
    except UnicodeEncodeError as error:
        raise UserError(
            f"looking for {section}.files: {os.fsencode(error.object)!r} is no name in UTF-8. "
            "Rename the file."
        ) from None
    if info.type == pafs.FileType.File and not names.has_suffix(path):
        raise UserError(
            f"looking for {section}.files: {pattern} is none of {names.described()}. Convert it, "
            "or name other files."
        )
    return {_uri(pattern, path, match.info.path): match for match in found}


def _in_folder(files: pafs.FileSystem, folder: str, split: str) -> list[_Found]:
    saved = saved_files(files, folder, split)
    if saved is not None:
        dataset = folder.rpartition("/")[2]
        return [_Found(info, dataset) for info in files.get_file_info(saved)]
    chosen = subset_files(files, folder)
    if chosen is not None:
        return [_Found(info, of_subset=True) for info in files.get_file_info(chosen)]
    return _below(files, folder, ["**"])


def _of_glob(files: pafs.FileSystem, path: str) -> list[_Found]:
    pieces = path.split("/")
    plain = next((n for n, piece in enumerate(pieces) if set(piece) & set("*?[")), 0)
    return _below(files, "/".join(pieces[:plain]), pieces[plain:]) if plain else []


def _below(files: pafs.FileSystem, folder: str, wanted: list[str]) -> list[_Found]:
    """The files below a folder whose path from there fits a glob, given by its pieces."""
    if files.get_file_info(folder or "/").type != pafs.FileType.Directory:
        return []
    found, passed_over = files_below(files, folder)
    several = [_looked_at(_Found(info)) for info in found]
    several += [
        _Found(pafs.FileInfo(path), why=why)
        for path, why in passed_over.items()
        if why != HIDDEN or names.has_suffix(path)
    ]
    return [
        match for match in several if _fits(match.info.path[len(folder) + 1 :].split("/"), wanted)
    ]


def _looked_at(found: _Found) -> _Found:
    """The file, passed over where its name or size says that it holds no rows."""
    name = found.info.path.rpartition("/")[2]
    if name in NOT_ROWS:
        return replace(found, why=NOT_ROWS[name])
    if not names.has_suffix(name):
        return replace(found, why=UNKNOWN)
    return replace(found, why=EMPTY) if found.info.size == 0 else found


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
