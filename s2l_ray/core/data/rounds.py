"""Several rounds of selection: a subset that s2l_ray wrote is read again.

Its rows are those of its JSON lines, which are as they came in. What was added to them in the
earlier round is dropped (cluster, score) or kept under another name: the id that a row had in the
first round stays in the column FIRST_ID, however many rounds follow.
"""

from dataclasses import replace

from pyarrow import fs as pafs

from s2l_ray.core.data.formats.spans import Rows
from s2l_ray.core.data.json_text import members, object_text
from s2l_ray.core.data.walk import listed_files
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.errors import UserError

MANIFEST = "manifest.json"
ID, FIRST_ID = "example_id", "first_example_id"
ADDED = (ID, "cluster", "score")


def subset_files(fs: pafs.FileSystem, folder: str) -> list[str] | None:
    """Paths of the JSON lines of a folder that holds a subset; None for a folder without artifact.

    Raises:
        UserError: it holds another artifact, or not all that its manifest lists.
    """
    place = f"{folder}/{MANIFEST}"
    if fs.get_file_info(place).type != pafs.FileType.File:
        return None
    with fs.open_input_file(place) as stream:
        data = stream.read()
    if b'"fingerprint"' not in data:
        return None
    manifest = Manifest.from_bytes(data, place)
    if manifest.stage != "subset":
        raise UserError(
            f"reading {folder}: this is an artifact of the stage {manifest.stage}, which holds no "
            "raw rows. Name raw files, or the folder of a subset."
        )
    names = [part.files["jsonl"].name for part in manifest.parts]
    remedy = "Copy the whole folder, or name the files themselves"
    return listed_files(fs, folder, names, MANIFEST, remedy)


def of_earlier_round(rows: Rows) -> Rows:
    """The rows of a subset, with the id that each had in the first round."""
    columns = {name: column for name, column in rows.columns.items() if name not in ADDED}
    if ID in rows.columns:
        columns.setdefault(FIRST_ID, rows.columns[ID])
    texts = None if rows.texts is None else [_of_earlier_round(text) for text in rows.texts]
    return replace(rows, columns=columns, texts=texts)


def _of_earlier_round(text: str) -> str:
    own = members(text)
    first = own.get(FIRST_ID, own.get(ID, "null"))
    return object_text({key: own[key] for key in own if key not in ADDED} | {FIRST_ID: first})
