"""Data sets of the `datasets` library.

A folder that save_to_disk wrote is read as it lies there. A data set on the Hugging Face Hub is
written into the storage once, as Parquet; its files are raw files like others from then on.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pyarrow import fs as pafs

from s2l_ray.core.data.formats.schemas import check_media, media
from s2l_ray.core.data.walk import listed_files
from s2l_ray.core.storage.manifest import fingerprint
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.store import Store, is_plain_path, join_uri
from s2l_ray.errors import UserError

ROWS_PER_FILE = 65_536
BYTES_PER_FILE = 1 << 28
# Written last: without it, nothing of the folder counts.
RECORD = "dataset.json"


def saved_files(fs: pafs.FileSystem, folder: str, split: str) -> list[str] | None:
    """Paths of the Arrow files of a folder that save_to_disk wrote; None for any other folder.

    Raises:
        UserError: no such split, a damaged state file, or a file that it lists is missing.
    """
    splits = _read_json(fs, f"{folder}/dataset_dict.json")
    if splits is not None:
        names = splits.get("splits", [])
        if split not in names:
            raise UserError(
                f"reading {folder}: expected a split {split!r}, but the data set has {names}. Set "
                "examples.split, or name the folder of one split."
            )
        folder = f"{folder}/{split}"
    state = _read_json(fs, f"{folder}/state.json")
    if state is None and splits is None:
        return None
    try:
        files = [plain_name(entry["filename"]) for entry in (state or {})["_data_files"]]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"reading {folder}: state.json does not list the data set's files by plain names. Save "
            "the data set again."
        ) from None
    return listed_files(fs, folder, files, "state.json", "Save the data set again")


def plain_name(name: Any) -> str:
    """The name of a file in the folder that lists it. Raises ValueError for any other path."""
    if not isinstance(name, str) or "/" in name or not is_plain_path(name):
        raise ValueError(name)
    return name


def _read_json(fs: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    """The object of a small file; None where there is no such file."""
    if fs.get_file_info(path).type != pafs.FileType.File:
        return None
    with fs.open_input_file(path) as stream:
        data = stream.read()
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(
            f"reading {path}: it is not JSON ({error}). Save the data set again."
        ) from None
    return value if isinstance(value, dict) else {}


def stored_dataset(
    store: Store, name: str, config: str | None, split: str, ignore: Sequence[str] = ()
) -> list[str] | None:
    """URIs of the files of a Hub data set that the storage holds; None where it does not."""
    folder = _folder(name, config, split)
    try:
        record = json.loads(store.read(f"{folder}/{RECORD}"))
        files = [plain_name(name) for name in record["files"]]
        left_out = record.get("left_out", [])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"reading {store.uri_of(folder)}/{RECORD}: it does not list the data set's files by "
            "plain names. Remove the folder, and the data set is loaded again."
        ) from None
    if not set(left_out) <= set(ignore):
        return None
    return [join_uri(store.uri_of(folder), file) for file in files]


def store_dataset(
    store: Store, name: str, config: str | None, split: str, ignore: Sequence[str] = ()
) -> list[str]:
    """Load a data set from the Hub and write it into the storage; URIs of its files.

    Args:
        name: `org/name` or `org/name@revision`.
        ignore: columns that are left out where they hold pictures or the like.

    Raises:
        UserError: the Hub does not answer, or has no such data set; a column that is no plain data.
    """
    dataset = _load(name, config, split)
    pictures = media(dataset.features.to_dict())
    check_media(name, pictures, ignore, "examples")
    dataset = dataset.remove_columns(list(pictures))
    rows, folder = dataset.num_rows, _folder(name, config, split)
    size = max(1, dataset.data.nbytes // max(1, rows))
    step = max(1, min(ROWS_PER_FILE, BYTES_PER_FILE // size))
    files = []
    for number, first in enumerate(range(0, rows, step)):
        files.append(f"part-{number:05d}.parquet")
        table = dataset.with_format("arrow")[first : min(first + step, rows)]
        store.write(f"{folder}/{files[-1]}", parquet_bytes(table))
    record = {
        "name": name,
        "config": config,
        "split": split,
        "rows": rows,
        "files": files,
        "left_out": list(pictures),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.write(f"{folder}/{RECORD}", json.dumps(record, indent=1).encode())
    return [join_uri(store.uri_of(folder), file) for file in files]


def _folder(name: str, config: str | None, split: str) -> str:
    return f"datasets/{fingerprint([name, config, split])}"


def _load(name: str, config: str | None, split: str) -> Any:
    import datasets

    place, _, revision = name.partition("@")
    try:
        return datasets.load_dataset(place, config, split=split, revision=revision or None)
    # Errors come from many libraries: the network's, the Hub's, those of builders.
    except Exception as error:
        raise UserError(
            f"loading the data set {name} (configuration {config}, split {split}): "
            f"{type(error).__name__}: {error}. Correct examples.dataset, examples.dataset_config "
            "or examples.split; without a network, save the data set as a folder where there is "
            "one (save_to_disk) and name that folder."
        ) from None
