"""The raw files of a job: each is read once, and its index is stored for later runs."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from s2l_ray.config import Columns, Evaluation, Examples
from s2l_ray.core.data.columns import column_names
from s2l_ray.core.data.find import find_files, look
from s2l_ray.core.data.formats.schemas import check_media
from s2l_ray.core.data.formats.spans import Column, FileIndex, Rows
from s2l_ray.core.data.hub import store_dataset, stored_dataset
from s2l_ray.core.data.parts import PartRange, RawFile, part_ranges
from s2l_ray.core.data.read import index_file
from s2l_ray.core.data.rounds import of_earlier_round
from s2l_ray.core.data.rows import without
from s2l_ray.core.data.uses import Use, column_uses
from s2l_ray.core.storage.manifest import fingerprint
from s2l_ray.core.storage.parquet import schema_from_text
from s2l_ray.core.storage.records import from_bytes, to_bytes
from s2l_ray.core.storage.store import IO_THREADS, Store, is_folder
from s2l_ray.errors import UserError

# Names of files that one message has.
MOST_SHOWN = 10
log = logging.getLogger("s2l_ray")


class RawFiles:
    """The raw files of config sections and the parts they are cut into.

    The first look at a file reads it whole, to hash it and to count its rows. The result is kept in
    the storage under the file's URI, size and time of change, so that later runs need not read it.

    Args:
        store: where the indexes are kept, and data sets that were loaded from the Hub.
        assume: a section whose files cannot be found has no parts, instead of an error.

    Attributes:
        uses: section -> file name -> what becomes of its columns.
        passed_over: section -> URI -> why a file that a folder or glob names is not read.
    """

    def __init__(self, store: Store, assume: bool) -> None:
        self.store, self.assume = store, assume
        # By URI of the file.
        self._text_bytes: dict[str, int] = {}
        self.uses: dict[str, dict[str, list[Use]]] = {}
        self.passed_over: dict[str, dict[str, str]] = {}
        self._ranges: dict[str, list[PartRange]] = {}

    def ranges(self, section: Examples | Evaluation, name: str) -> list[PartRange]:
        """The parts of a section's files, in file order; equal sections give the same list.

        Args:
            name: of the section, for messages.

        Raises:
            UserError: files that are missing, empty or damaged, or whose columns do not fit.
        """
        key = section.model_dump_json()
        if key not in self._ranges:
            try:
                files = self._files(section, name)
            except UserError:
                if not self.assume:
                    raise
                files = []
            with ThreadPoolExecutor(IO_THREADS) as pool:
                looks = list(pool.map(lambda file: self._look_at(file, section), files))
            for file, (index, uses) in zip(files, looks, strict=True):
                self._text_bytes[file.uri] = index.text_bytes
                if index.rows:
                    self.uses.setdefault(name, {})[file.name] = uses
            _tell_unknown(section, [uses for _, uses in looks])
            self._ranges[key] = part_ranges(*_with_rows(files, [index for index, _ in looks]))
        return self._ranges[key]

    def _look_at(
        self, file: RawFile, section: Examples | Evaluation
    ) -> tuple[FileIndex, list[Use]]:
        """The index of a file without its first rows, and what becomes of its columns by these."""
        index = self._index(file, section.rows_per_part)
        if not index.rows:
            return index, []
        check_columns(file, index, section.columns, section.ignore)
        return replace(index, first=None), first_uses(file, index, section)

    def identity(self, ranges: list[PartRange]) -> list[Any]:
        """What of the files enters the name of an artifact: no places and no times."""
        files = {part.file_number: part.file for part in ranges}
        return [
            [number, file.name, file.bytes, file.sha256, file.source]
            for number, file in sorted(files.items())
        ]

    def text_bytes(self, ranges: list[PartRange]) -> int:
        """Bytes of text, uncompressed, of the files that these parts are of."""
        return sum(self._text_bytes[uri] for uri in {part.file.uri for part in ranges})

    def _files(self, section: Examples | Evaluation, name: str) -> list[RawFile]:
        dataset = getattr(section, "dataset", None)
        if dataset is None or not isinstance(section, Examples):
            return self._look(section.files, section.root, name) if section.files else []
        if is_folder(dataset):
            return self._look([dataset], section.root, name, section.split)
        where = (self.store, dataset, section.dataset_config, section.split, section.ignore)
        stored = stored_dataset(*where)
        if stored is None and self.assume:
            return []
        log.info(
            "%s: %s", dataset, "taken from the storage" if stored else "loading it into the storage"
        )
        source = dataset.partition("@")[0]
        return [
            replace(file, source=source)
            for file in find_files(stored or store_dataset(*where), None, name)
        ]

    def _look(
        self, patterns: list[str], root: str | None, name: str, split: str = "train"
    ) -> list[RawFile]:
        found = look(patterns, root, name, split)
        if found.passed_over:
            self.passed_over[name] = found.passed_over
            say_passed_over(name, len(found.files), found.passed_over)
        return found.files

    def _index(self, file: RawFile, rows_per_part: int) -> FileIndex:
        path = f"index/{fingerprint([file.uri, file.bytes, file.mtime_ns, rows_per_part])}.json"
        try:
            index = from_bytes(FileIndex, self.store.read(path))
            if index.first is not None:
                return index
        except (FileNotFoundError, ValueError):
            pass
        index = index_file(file, rows_per_part)
        self.store.write(path, to_bytes(index))
        return index


def say_passed_over(section: str, files: int, passed_over: dict[str, str]) -> None:
    """Say which files of folders and globs are read and which are not."""
    shown = [f"{uri} ({why})" for uri, why in list(passed_over.items())[:MOST_SHOWN]]
    more = len(passed_over) - len(shown)
    log.info(
        "%s.files: %d files are read, %d passed over: %s%s",
        section,
        files,
        len(passed_over),
        ", ".join(shown),
        f" and {more} more" if more else "",
    )


def _with_rows(
    files: Sequence[RawFile], indexes: Sequence[FileIndex]
) -> tuple[list[RawFile], list[FileIndex]]:
    """The files that have rows, and their indexes.

    Raises:
        UserError: none has.
    """
    pairs = [(file, index) for file, index in zip(files, indexes, strict=True) if index.rows]
    if files and not pairs:
        raise UserError(f"reading {files[0].uri}: it has no rows. Remove it, or name other files.")
    for file, index in zip(files, indexes, strict=True):
        if not index.rows:
            log.info("%s has no rows", file.uri)
    return [file for file, _ in pairs], [index for _, index in pairs]


def _tell_unknown(section: Examples | Evaluation, uses_of_files: list[list[Use]]) -> None:
    """Warn of columns to ignore that no file has."""
    dataset = section.dataset if isinstance(section, Examples) else None
    if dataset is not None and not is_folder(dataset):
        # They were left out as it was stored.
        return
    present = {use.column for uses in uses_of_files for use in uses}
    unknown = [name for name in section.ignore if name not in present]
    if unknown and present:
        log.warning(
            "%s.ignore names %s, which no file has in its first rows; they have %s",
            section.columns.section,
            ", ".join(map(repr, unknown)),
            ", ".join(map(repr, sorted(present)[:MOST_SHOWN])),
        )


def check_columns(file: RawFile, index: FileIndex, columns: Columns, ignore: Sequence[str]) -> None:
    """Check the columns of a file that has a schema, before any work. Columns to ignore are left
    out.

    Raises:
        UserError: its columns fit no schema, or one is of pictures or the like.
    """
    check_media(file.uri, index.media, ignore, columns.section)
    if index.schema:
        names = schema_from_text(index.schema, file.uri).names
        column_names([name for name in names if name not in ignore], columns, file.uri)


def first_uses(file: RawFile, index: FileIndex, section: Examples | Evaluation) -> list[Use]:
    """What becomes of a file's columns, by its first rows.

    Raises:
        UserError: columns that fit no schema, or one that looks like conversation is in no text.
    """
    rows = json.loads(index.first or "[]")
    present = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Column] = {name: [row.get(name) for row in rows] for name in present}
    read = Rows(np.arange(len(rows)), columns)
    read = without(of_earlier_round(read) if file.of_subset else read, section.ignore)
    left_out = f"left out ({section.columns.section}.ignore)"
    ignored = [Use(name, left_out) for name in present if name in section.ignore]
    return [*column_uses(read, section.columns, file.uri), *ignored]
