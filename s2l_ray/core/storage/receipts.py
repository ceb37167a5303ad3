"""Receipts: what a part leaves when it is done, so that a run started again finds it.

A receipt is JSON of the part, `<folder>/receipts/part-<index>.json`, written after its data files.
"""

from concurrent.futures import ThreadPoolExecutor

from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.records import from_bytes, to_bytes
from s2l_ray.core.storage.store import IO_THREADS, Store

FOLDER = "receipts"


def write_receipt(store: Store, folder: str, part: Part) -> None:
    """Note in an artifact's folder that a part is done; its data files have to be there already."""
    store.write(f"{folder}/{FOLDER}/part-{part.index:05d}.json", to_bytes(part))


def parts_with_receipts(store: Store, folder: str) -> dict[int, Part]:
    """The parts of an artifact's folder that have a receipt and all data files in the right size.

    Returns:
        Index -> part, by ascending index.
    """
    sizes = store.list(folder)
    names = [f"{folder}/{name}" for name in sizes if name.startswith(f"{FOLDER}/part-")]
    with ThreadPoolExecutor(IO_THREADS) as pool:
        parts = [part for part in pool.map(lambda name: _read(store, name), names) if part]
    return {
        part.index: part
        for part in sorted(parts, key=lambda part: part.index)
        if all(sizes.get(entry.name) == entry.bytes for entry in part.files.values())
    }


def _read(store: Store, name: str) -> Part | None:
    """The part of a receipt, or None when the receipt is damaged or gone.

    It goes when another run commits the artifact meanwhile.
    """
    try:
        return from_bytes(Part, store.read(name))
    except (FileNotFoundError, ValueError):
        return None
