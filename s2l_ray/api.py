"""The Python interface: read what is stored as Arrow or pandas, and run jobs from a notebook.

    import s2l_ray

    storage = s2l_ray.open("s2l_ray_storage")
    storage.latest("trajectories").matrix()                      # example ids [n], losses [n, S]
    storage.run("demo").artifact("subset", variant="s2l").pandas()

    job = s2l_ray.load("jobs/mixture_cpu.yaml", "clusters.k=200")
    s2l_ray.make(s2l_ray.plan(job, until="subset"))

Every read is checked against the manifest: a file that is missing or changed is an error.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from s2l_ray import config, pipeline
from s2l_ray.core.data.original import under_one_schema
from s2l_ray.core.storage.artifact import Artifact, artifact_at
from s2l_ray.core.storage.info import (
    ClustersInfo,
    EvaluationInfo,
    ExamplesInfo,
    Info,
    ProxyInfo,
    SubsetInfo,
    TargetInfo,
    TrajectoriesInfo,
    info_of,
)
from s2l_ray.core.storage.manifest import Manifest, Part
from s2l_ray.core.storage.schemas import vectors
from s2l_ray.core.storage.store import IO_THREADS, Store
from s2l_ray.errors import UserError, without_credentials

if TYPE_CHECKING:
    from pandas import DataFrame

# By stage, the type of its info; a stage that is not here has none.
INFOS: dict[str, type[Info]] = {
    "examples": ExamplesInfo,
    "proxy": ProxyInfo,
    "trajectories": TrajectoriesInfo,
    "clusters": ClustersInfo,
    "subset": SubsetInfo,
    "target": TargetInfo,
    "evaluation": EvaluationInfo,
}


def load(job: str | dict[str, Any], *overrides: str) -> config.Job:
    """Read and check a job.

    Args:
        job: path of a YAML file, or the same as a dict.
        overrides: `section.field=value`, as on the command line.

    Raises:
        UserError: listing every unknown key, wrong type and impossible combination.
    """
    if isinstance(job, dict):
        return config.load(None, list(overrides), job)
    return config.load(job, list(overrides))


def plan(job: config.Job, until: str = pipeline.NAMES[-1], assume: bool = False) -> pipeline.Plan:
    """Name every artifact of a job, up to a stage; starts nothing. See `pipeline.plan`."""
    return pipeline.plan(job, until, assume)


def make(plan: pipeline.Plan) -> list[pipeline.Done]:
    """Reuse or make every artifact of a plan. Ray starts only if something must be made with it.

    It is what `python -m s2l_ray.run` does; that module has the name `s2l_ray.run`.
    """
    return pipeline.run(plan)


def open(uri: str) -> "Storage":
    """The storage of runs: a local path, or a URI that pyarrow.fs knows.

    Raises:
        UserError: it is a file, or cannot be reached.
    """
    return Storage(uri)


class StoredArtifact:
    """A committed artifact, to be read.

    Attributes:
        manifest: its inputs, config section, parts, files, versions and times.
    """

    def __init__(self, artifact: Artifact, manifest: Manifest) -> None:
        self.manifest = manifest
        self._artifact = artifact

    def __repr__(self) -> str:
        return f"<{self.stage} {self.fingerprint}: {self.rows:,} rows, made {self.made_at}>"

    @property
    def uri(self) -> str:
        """Of its folder."""
        return self._artifact.uri

    @property
    def stage(self) -> str:
        return self._artifact.stage

    @property
    def fingerprint(self) -> str:
        """The hash of everything that decides its content."""
        return self._artifact.fingerprint

    @property
    def rows(self) -> int:
        """Of all parts; 0 for what has no parts, such as a model."""
        return self.manifest.rows

    @property
    def made_at(self) -> str:
        """ISO 8601, in UTC."""
        return self.manifest.made_at

    @property
    def info(self) -> Info | None:
        """Facts about the artifact as a whole, of the stage's type in `core.storage.info`."""
        kind = INFOS.get(self.stage)
        return None if kind is None else info_of(self.manifest, kind)

    def parts(self, columns: Sequence[str] | None = None, role: str = "data") -> Iterator[pa.Table]:
        """One table a part, in order; only one part is in memory at a time.

        Args:
            columns: to read; None: all.
            role: of the files to read. Some stages write further tables beside "data", such as the
                rejects of examples. Parts without a file of that role are left out.

        Raises:
            UserError: no part has such a file or column, or a file is damaged.
        """
        for part in self._with_role(role):
            table = self._artifact.read_part(part, columns, role)
            unknown = sorted(set(columns or ()) - set(table.column_names))
            if unknown:
                # Read again only to say what there is.
                known = ", ".join(self._artifact.read_part(part, None, role).column_names)
                raise UserError(
                    f"reading {self.uri}: it has no column {unknown[0]!r}. Expected some of "
                    f"{known}."
                )
            yield table

    def _with_role(self, role: str) -> list[Part]:
        found = [part for part in self.manifest.parts if role in part.files]
        tables = {
            name
            for part in self.manifest.parts
            for name, entry in part.files.items()
            if entry.name.endswith(".parquet")
        }
        if role not in tables:
            listed = ", ".join(sorted(tables)) or "none"
            raise UserError(
                f"reading {self.uri}: it has no tables of the role {role!r}; its roles with "
                f"tables: {listed}. Its other files are listed in .manifest."
            )
        return found

    def arrow(self, columns: Sequence[str] | None = None, role: str = "data") -> pa.Table:
        """All parts as one table. See `parts` for the arguments and errors.

        Where the raw files of examples have original columns of several types, as JSON beside
        Parquet has, these are under the schema that all files share.
        """
        tables = list(self.parts(columns, role))
        if self.stage == "examples" and role == "data":
            tables = under_one_schema(tables, info_of(self.manifest, ExamplesInfo).schema)
        return pa.concat_tables(tables)

    def pandas(self, columns: Sequence[str] | None = None, role: str = "data") -> "DataFrame":
        """All parts as one pandas table.

        Raises:
            UserError: as `parts`, or pandas is not installed.
        """
        try:
            import pandas  # noqa: F401
        except ImportError:
            raise UserError(
                "making a pandas table: pandas is not installed. Install it (pip install pandas), "
                "or use .arrow()."
            ) from None
        return self.arrow(columns, role).to_pandas()

    def matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """Of trajectories: what clustering sees.

        Returns:
            Ids of the n scored rows, int64 [n], and their losses, float32 [n, S]. The S columns are
            the [member, step] pairs of `info.steps`.

        Raises:
            UserError: this is no artifact of trajectories.
        """
        if self.stage != "trajectories":
            raise UserError(
                f"reading the loss matrix of {self.uri}: expected trajectories, got {self.stage}."
            )
        steps = info_of(self.manifest, TrajectoriesInfo).steps
        ids = [np.empty(0, np.int64)]
        losses = [np.empty((0, len(steps)), np.float32)]
        for table in self.parts(["example_id", "losses"]):
            scored, values = vectors(table["losses"], f"losses of {self.uri}")
            ids.append(table["example_id"].to_numpy()[scored])
            losses.append(values)
        return np.concatenate(ids), np.concatenate(losses)


class StoredRun:
    """The record of a finished run.

    Attributes:
        name: `run.name` of its config.
        record: its `run.json`: config, artifacts, versions, seconds and FLOPs.
    """

    def __init__(self, store: Store, name: str, record: dict[str, Any]) -> None:
        self.name, self.record = name, record
        self._store = store

    @property
    def variants(self) -> list[str]:
        return list(self.record["variants"])

    def named(self) -> set[tuple[str, str]]:
        """(stage, fingerprint) of every artifact of any variant."""
        return {
            (stage, entry["fingerprint"])
            for stages in self.record["variants"].values()
            for stage, entry in stages.items()
        }

    def artifact(self, stage: str, variant: str | None = None) -> StoredArtifact:
        """What the run made or reused.

        Args:
            variant: the first one by default.

        Raises:
            UserError: the run has no such variant or stage, or the artifact was removed.
        """
        variant = self.variants[0] if variant is None else variant
        _known(f"reading the run {self.name}", "variant", variant, self.variants)
        entries = self.record["variants"][variant]
        _known(f"reading variant {variant} of run {self.name}", "stage", stage, entries)
        # The storage may have been copied since: the artifact beside the record comes first.
        here = Artifact(self._store, stage, entries[stage]["fingerprint"])
        manifest = here.committed()
        if manifest is not None:
            return StoredArtifact(here, manifest)
        elsewhere = artifact_at(entries[stage]["uri"], stage, f"{stage} of run {self.name}")
        return StoredArtifact(elsewhere, elsewhere.manifest())


class Storage:
    """What runs have stored under one path or URI."""

    def __init__(self, uri: str) -> None:
        self.store = Store(uri)
        self.store.check()

    def __repr__(self) -> str:
        return without_credentials(f"<storage {self.uri}>")

    @property
    def uri(self) -> str:
        return self.store.uri

    def artifacts(self, stage: str) -> list[StoredArtifact]:
        """All committed artifacts of a stage, the newest first."""
        found = self._committed(stage, "")
        return sorted(found, key=lambda each: (each.made_at, each.fingerprint), reverse=True)

    def latest(self, stage: str) -> StoredArtifact:
        """The committed artifact of a stage that was made last.

        Raises:
            UserError: there is none.
        """
        found = self.artifacts(stage)
        if not found:
            raise UserError(
                f"reading the latest {stage} in {self.uri}: nothing is committed. Correct the "
                "storage, or run the job that makes it."
            )
        return found[0]

    def artifact(self, stage: str, fingerprint: str) -> StoredArtifact:
        """A committed artifact by its fingerprint, or by how its fingerprint begins.

        Raises:
            UserError: no committed artifact has it, or several.
        """
        found = self._committed(stage, fingerprint)
        found = [each for each in found if each.fingerprint == fingerprint] or found
        if len(found) == 1:
            return found[0]
        listed = ", ".join(sorted(each.fingerprint for each in found or self.artifacts(stage)))
        what = f"reading {stage} {fingerprint!r} in {self.uri}: expected one committed artifact"
        if found:
            raise UserError(f"{what}, but several begin so: {listed}. Give more of it.")
        raise UserError(f"{what}, found none. Committed are: {listed or 'none'}.")

    def _committed(self, stage: str, prefix: str) -> list[StoredArtifact]:
        _known(f"reading {self.uri}", "stage", stage, pipeline.NAMES)
        names = [name for name in self.store.folders(stage) if name.startswith(prefix)]
        artifacts = [Artifact(self.store, stage, name) for name in names]
        with ThreadPoolExecutor(IO_THREADS) as pool:
            manifests = list(pool.map(Artifact.committed, artifacts))
        return [
            StoredArtifact(artifact, manifest)
            for artifact, manifest in zip(artifacts, manifests, strict=True)
            if manifest is not None
        ]

    def runs(self) -> list[str]:
        """Names of the runs that finished and left their record."""
        names = self.store.folders("runs")
        return [name for name in names if self.store.exists(f"runs/{name}/run.json")]

    def run(self, name: str) -> StoredRun:
        """The record of a run.

        Raises:
            UserError: there is none, or it is damaged.
        """
        path = f"runs/{name}/run.json"
        try:
            record = json.loads(self.store.read(path))
            run = StoredRun(self.store, name, record)
            run.named()
        except FileNotFoundError:
            raise UserError(
                f"reading the run {name!r} in {self.uri}: there is no {path}. Finished runs: "
                f"{', '.join(self.runs()) or 'none'}."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"reading {self.store.uri_of(path)}: not the record of a run ({error!r}). Run the "
                "job again, which writes it anew."
            ) from None
        return run


def _known(doing: str, what: str, given: str, expected: Sequence[str] | dict[str, Any]) -> None:
    if given not in expected:
        raise UserError(f"{doing}: expected a {what} of {', '.join(expected)}, got {given!r}.")
