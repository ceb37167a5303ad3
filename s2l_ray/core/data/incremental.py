"""What an incremental run reuses of earlier runs: the numbers of its raw files, and scored parts.

An example's id holds its file's number. So a file that keeps its number and its content has the
same examples, in the same parts, with the same losses under the same proxy.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import ExamplesInfo, NumberedFile, info_of
from s2l_ray.core.storage.manifest import Manifest, Part
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError


@dataclass(frozen=True)
class Lineage:
    """How files are numbered after a base.

    Args:
        numbers: of all files, in the order they were given.
        next_number: the first that was never given.
        new: names of files that the base does not have, changed ones included.
        dropped: names of files of the base that are gone or changed.
    """

    numbers: list[int]
    next_number: int
    new: list[str]
    dropped: list[str]


def file_numbers(
    files: Sequence[tuple[str, int, str]], base: Manifest | None, on_changed: str, where: str
) -> Lineage:
    """Number raw files: those of `base` as they are, new ones after all numbers ever given.

    Args:
        files: name, bytes and SHA-256 of each.
        base: the manifest of `examples.extends`, or None for a data set of its own.
        on_changed: "stop" refuses files that are gone or have other content; "drop" leaves their
            old rows out, and a file with other content enters as a new one.
        where: the base's URI, for messages.

    Raises:
        UserError: naming every file that is gone or changed, unless these are dropped.
    """
    known = {file.name: file for file in files_of(base)} if base is not None else {}
    next_number = info_of(base, ExamplesInfo).next_file_number if base is not None else 0
    present = {name: sha256 for name, _, sha256 in files}
    gone = sorted(known.keys() - present.keys())
    changed = sorted(
        name for name in known.keys() & present.keys() if known[name].sha256 != present[name]
    )
    if (gone or changed) and on_changed == "stop":
        raise UserError(
            f"extending {where}: {_listed('gone', gone)}{_listed('changed', changed)}. Put them "
            "back as they were (new rows belong into new files), or leave their old rows out with "
            "examples.on_changed_file: drop."
        )
    numbers: list[int] = []
    new: list[str] = []
    for name, _, _ in files:
        if name in known and name not in changed:
            numbers.append(known[name].number)
        else:
            numbers.append(next_number + len(new))
            new.append(name)
    return Lineage(numbers, next_number + len(new), new, sorted([*gone, *changed]))


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return (
        f"{len(names)} of its files {'is' if len(names) == 1 else 'are'} {what} ({shown}); "
        if names
        else ""
    )


def files_of(examples: Manifest) -> list[NumberedFile]:
    """The raw files of an `examples` artifact by number."""
    return sorted(info_of(examples, ExamplesInfo).files, key=lambda file: file.number)


def listing(ranges: Iterable[PartRange]) -> list[tuple[str, int, str]]:
    """Name, bytes and SHA-256 of each raw file, in the order of the parts."""
    return list(
        dict.fromkeys((part.file.name, part.file.bytes, part.file.sha256) for part in ranges)
    )


def renumbered(ranges: Sequence[PartRange], numbers: Sequence[int]) -> list[PartRange]:
    """The parts under these numbers of their files, in the order of the numbers.

    Args:
        numbers: one for each file, in the order of `listing`.
    """
    by_file = [
        list(parts) for _, parts in itertools.groupby(ranges, key=lambda part: part.file.name)
    ]
    ordered = sorted(zip(numbers, by_file, strict=True), key=lambda pair: pair[0])
    parts = [replace(part, file_number=number) for number, parts in ordered for part in parts]
    return [replace(part, index=index) for index, part in enumerate(parts)]


def extended(
    ranges: Sequence[PartRange],
    base: Manifest,
    section: dict[str, Any],
    on_changed: str,
    where: str,
) -> list[PartRange]:
    """The parts of a data set that extends another, under the file numbers that the base began.

    Args:
        ranges: the parts of all files, numbered as if there were no base.
        base: the manifest of `examples.extends`.
        section: what of the config's section `examples` enters the artifact's name.
        on_changed: see `file_numbers`.
        where: the base's URI, for messages.

    Raises:
        UserError: the base's rows were cut or read in another way, or files are gone or changed.
    """
    wrong = [name for name in section if base.section.get(name) != section[name]]
    if wrong:
        raise UserError(
            f"extending {where}: it was made with examples.{wrong[0]} = "
            f"{base.section.get(wrong[0])}, but the config says {section[wrong[0]]}. Set it as it "
            "was then; ids and parts would not fit otherwise."
        )
    return renumbered(ranges, file_numbers(listing(ranges), base, on_changed, where).numbers)


def kept_parts(base: Manifest, ranges: Iterable[PartRange], version: int) -> dict[int, Part]:
    """The base's parts that the extended data set has unchanged, by their numbers in it; none where
    another version of the stage made them."""
    if base.version != version:
        return {}
    unchanged = {(file.number, file.name, file.sha256) for file in files_of(base)}
    of_base: dict[str, list[Part]] = {}
    for part in base.parts:
        of_base.setdefault(part.stats["file"], []).append(part)
    found: dict[int, Part] = {}
    for name, parts in itertools.groupby(ranges, key=lambda part: part.file.name):
        own = list(parts)
        if (own[0].file_number, name, own[0].file.sha256) in unchanged:
            pairs = zip(own, of_base[name], strict=True)
            found.update({new.index: old for new, old in pairs})
    return found


def scored_parts(
    store: Store,
    version: int,
    section: dict[str, Any],
    proxy: str,
    wanted: Iterable[tuple[int, str]],
) -> dict[int, tuple[Artifact, Part]]:
    """Parts that were scored before, by part number, with the `trajectories` that hold them.

    Equal bytes of an examples part have equal ids and texts, and so equal losses under the same
    proxy, stage version and section.

    Args:
        proxy: fingerprint of the proxy artifact.
        wanted: (part number, SHA-256 of the examples part).
    """
    numbers: dict[str, list[int]] = {}
    for number, sha256 in wanted:
        numbers.setdefault(sha256, []).append(number)
    found: dict[int, tuple[Artifact, Part]] = {}
    for name in store.folders("trajectories"):
        artifact = Artifact(store, "trajectories", name)
        manifest = artifact.committed()
        if manifest is None:
            continue
        made_by = manifest.version, manifest.section, manifest.inputs.get("proxy")
        if made_by != (version, section, proxy):
            continue
        for part in manifest.parts:
            for number in numbers.pop(part.stats["examples"], ()):
                found[number] = artifact, part
    return found
