"""What a storage holds, which runs name it, and what can go.

    python -m s2l_ray.status --storage s2l_ray_storage            list what is stored
    python -m s2l_ray.status --storage s2l_ray_storage --prune    delete what no run names
    python -m s2l_ray.status --storage s2l_ray_storage --verify   read all files, and compare them

A run names the artifacts of its record, runs/NAME/run.json, which is written when it finishes and
replaced when the name is used again. What these were made from stays too, and so does what a run
wants that works or was interrupted (runs/NAME/begun.json). Give --unfinished only while no run is
working in the storage.
"""

import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.table import Table

from s2l_ray import api
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import FileEntry
from s2l_ray.core.storage.store import IO_THREADS, Store
from s2l_ray.display import Console, say
from s2l_ray.errors import UserError
from s2l_ray.pipeline import NAMES
from s2l_ray.pipeline.record import begun
from s2l_ray.run import bare_parser, exit_status, leave, set_up_logging

# Folders of files that are needed only while a run works.
LEFTOVERS = ("tokens", "scratch")


@dataclass(frozen=True)
class Entry:
    """A folder of the storage.

    Attributes:
        path: relative to the storage, <stage>/<fingerprint> for an artifact.
        rows: of its parts; None for what is not committed.
        bytes: of the files in it.
        made_at: ISO 8601; "" for what is not committed.
        named_by: names of the runs whose record names it, or what else needs it.
        state: "committed", "unfinished" (an artifact without manifest.json) or "leftover".
    """

    path: str
    rows: int | None
    bytes: int
    made_at: str
    named_by: tuple[str, ...]
    state: str

    def goes(self, unfinished: bool) -> bool:
        """Whether pruning deletes it.

        Args:
            unfinished: unfinished artifacts are deleted too.
        """
        if self.state == "unfinished":
            return unfinished
        return not self.named_by or (self.state == "leftover" and unfinished)


def main(arguments: list[str] | None = None) -> int:
    """Print what is stored and, with --prune, delete what can go. Exit status 0 unless it fails."""
    parser = bare_parser(__doc__ or "", prog="python -m s2l_ray.status")
    parser.add_argument("--storage", required=True, metavar="URI", help="a path, s3://, gs://, ...")
    parser.add_argument("--prune", action="store_true", help="delete what no run names")
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="unfinished artifacts can go too; the same job would go on from them",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every file of every committed artifact and compare it with the manifest",
    )
    args = parser.parse_args(arguments)
    set_up_logging()
    if args.verify:
        return exit_status(functools.partial(_verify, args.storage))
    return exit_status(functools.partial(_status, args.storage, args.prune, args.unfinished))


def _status(uri: str, prune: bool, unfinished: bool) -> None:
    storage = api.open(uri)
    entries = contents(storage)
    if not entries:
        say(f"nothing is stored in {storage.uri}")
        return
    Console(wide=True).print(_table(storage.uri, entries, unfinished))
    going = [entry for entry in entries if entry.goes(unfinished)]
    if not prune:
        say(f"can go (--prune deletes it): {_total(going)}")
        return
    for entry in going:
        _delete(storage.store, entry)
        say(f"deleted {entry.path}: {entry.bytes:,} bytes")
    say(f"deleted: {_total(going)}")


def _verify(uri: str) -> None:
    """Read all that is committed.

    Raises:
        UserError: naming every file and manifest that is not as it was written.
    """
    store = api.open(uri).store
    artifacts = [Artifact(store, stage, name) for stage in NAMES for name in store.folders(stage)]
    files: list[tuple[Artifact, FileEntry]] = []
    wrong: list[str] = []
    for artifact in artifacts:
        try:
            manifest = artifact.committed()
        except UserError as error:
            wrong.append(str(error))
        else:
            files += [(artifact, entry) for entry in manifest.data_files] if manifest else []
    with ThreadPoolExecutor(IO_THREADS) as pool:
        wrong += filter(None, pool.map(_damage, files))
    what = f"{len(files):,} files, {sum(entry.bytes for _, entry in files):,} bytes"
    if wrong:
        raise UserError(
            f"verifying {store.uri} ({what}): {len(wrong)} not as they were written.\n  - "
            + "\n  - ".join(wrong)
        )
    say(f"verified {what}: all are as they were written")


def _damage(file: tuple[Artifact, FileEntry]) -> str | None:
    artifact, entry = file
    try:
        artifact.read_file(entry)
    except UserError as error:
        return str(error)
    return None


def contents(storage: api.Storage) -> list[Entry]:
    """Everything in the folders of stages, and what runs left behind in `tokens` and `scratch`.

    Raises:
        UserError: a manifest or the record of a run is damaged, so what it names is not known.
    """
    store = storage.store
    committed = {stage: storage.artifacts(stage) for stage in NAMES}
    needed = _needed(storage, [each for found in committed.values() for each in found])
    entries = []
    for stage, found in committed.items():
        for each in found:
            by = tuple(needed.get((stage, each.fingerprint), ()))
            size = _bytes(store, f"{stage}/{each.fingerprint}")
            path = f"{stage}/{each.fingerprint}"
            entries.append(Entry(path, each.rows, size, each.made_at, by, "committed"))
        known = {each.fingerprint for each in found}
        for name in store.folders(stage):
            path = f"{stage}/{name}"
            if name not in known:
                entries.append(Entry(path, None, _bytes(store, path), "", (), "unfinished"))
    working = tuple(f"{name} (not finished)" for name, wanted in _begun(store).items() if wanted)
    for folder in LEFTOVERS:
        for name in store.folders(folder):
            path = f"{folder}/{name}"
            entries.append(Entry(path, None, _bytes(store, path), "", working, "leftover"))
    return entries


def _needed(
    storage: api.Storage, committed: Iterable[api.StoredArtifact]
) -> dict[tuple[str, str], list[str]]:
    """By (stage, fingerprint), the runs that name an artifact, or the artifact made from it."""
    needed: dict[tuple[str, str], list[str]] = {}
    for name in storage.runs():
        for key in sorted(storage.run(name).named()):
            needed.setdefault(key, []).append(name)
    for name, wanted in _begun(storage.store).items():
        for key in sorted(wanted):
            needed.setdefault(key, []).append(f"{name} (not finished)")
    # A manifest gives the fingerprints of its inputs without their stages.
    by_fingerprint = {each.fingerprint: each for each in committed}
    waiting = [fingerprint for _, fingerprint in needed]
    while waiting:
        user = by_fingerprint.get(waiting.pop())
        for fingerprint in {} if user is None else user.manifest.inputs.values():
            used = by_fingerprint.get(fingerprint)
            if user is not None and used and (used.stage, fingerprint) not in needed:
                needed[used.stage, fingerprint] = [f"for {user.stage} {user.fingerprint[:8]}"]
                waiting.append(fingerprint)
    return needed


def _begun(store: Store) -> dict[str, set[tuple[str, str]]]:
    """What each run wants that has not finished."""
    return {name: begun(store, name) for name in store.folders("runs")}


def _bytes(store: Store, path: str) -> int:
    return sum(store.list(path).values())


def _delete(store: Store, entry: Entry) -> None:
    # The manifest first: what an interrupted deletion leaves must not count as an artifact.
    store.delete(f"{entry.path}/manifest.json")
    store.delete(entry.path)


def _total(entries: list[Entry]) -> str:
    return f"{len(entries)} folders, {sum(entry.bytes for entry in entries):,} bytes"


def _table(uri: str, entries: list[Entry], unfinished: bool) -> Table:
    table = Table(title=f"stored in {uri}")
    for name in ("stage", "fingerprint", "rows", "bytes", "made at", "named by", ""):
        table.add_column(name, justify="right" if name in ("rows", "bytes") else "left")
    for entry in entries:
        stage, _, fingerprint = entry.path.partition("/")
        remark = "" if entry.state == "committed" else entry.state
        if entry.goes(unfinished):
            remark = f"{remark}, can go".removeprefix(", ")
        rows = f"{entry.rows:,}" if entry.rows else ""
        named = ", ".join(entry.named_by)
        table.add_row(
            stage, fingerprint, rows, f"{entry.bytes:,}", entry.made_at[:19], named, remark
        )
    return table


if __name__ == "__main__":
    leave(main())
