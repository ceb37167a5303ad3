"""The table of stages and the loop that reuses or makes them. This is the whole framework.

An artifact is named by the hash of everything that decides its content: the stage's version, its section of the config, its
seed, and the names of the artifacts it is made from. So the plan of a job is known before any work, variants share what they
have in common, and the same command resumes.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from s2l_ray.config import Config, Evaluation, Examples, Job, Training
from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.data.files import (
    FileIndex,
    PartRange,
    RawFile,
    check_columns,
    find_files,
    index_file,
    part_ranges,
)
from s2l_ray.core.data.hub import store_dataset, stored_dataset
from s2l_ray.core.data.incremental import file_numbers, listing, renumbered
from s2l_ray.core.model.loading import check_weights, identity, load_encoder, template_text
from s2l_ray.core.selection import draw
from s2l_ray.core.selection.quotas import budget_rows
from s2l_ray.core.storage.artifact import IO_THREADS, Artifact
from s2l_ray.core.storage.manifest import FORMAT, Manifest, fingerprint
from s2l_ray.core.storage.store import Store, is_folder
from s2l_ray.errors import UserError
from s2l_ray.pipeline import task_graph

log = logging.getLogger("s2l_ray")
# Fields that say where things lie or what to expect of them; their content enters by its hash.
NO_CONTENT = (
    "files",
    "root",
    "dataset",
    "dataset_config",
    "split",
    "expected_rows",
    "expected_tokens_per_row",
    "extends",
    "on_changed_file",
    "use",
)
WHAT_A_PROXY_READS = (
    "model",
    "tokenizer",
    "prompt",
    "template",
    "learn",
    "max_length",
    "truncation",
)
PACKAGES = ("s2l_ray", "ray", "torch", "transformers", "deepspeed", "pyarrow", "faiss-cpu", "numpy")


@dataclass(frozen=True)
class Stage:
    """A kind of artifact. `version` goes up whenever the stage makes something else from the same inputs."""

    name: str
    version: int
    module: str
    inputs: Callable[[Config], tuple[str, ...]]
    wanted: Callable[[Config], bool] = lambda config: True


STAGES = (
    Stage("examples", 2, "examples", lambda config: ()),
    Stage("proxy", 2, "proxy", lambda config: ("examples",)),
    Stage("trajectories", 2, "trajectories", lambda config: ("examples", "proxy")),
    Stage(
        "clusters",
        2,
        "clusters",
        lambda config: ("trajectories",),
        lambda config: _by_cluster(config),
    ),
    Stage(
        "subset",
        2,
        "subset",
        lambda config: (
            ("examples", "trajectories") + (("clusters",) if _by_cluster(config) else ())
        ),
    ),
    Stage(
        "target",
        2,
        "target",
        lambda config: ("subset",),
        lambda config: config.target is not None,
    ),
    Stage(
        "evaluation",
        2,
        "evaluation",
        lambda config: ("target",),
        lambda config: config.evaluation is not None,
    ),
    Stage("report", 2, "report", lambda config: ()),
)
NAMES = tuple(stage.name for stage in STAGES)


def _by_cluster(config: Config) -> bool:
    return bool(draw.needs(config.subset) & {"cluster", "distance"})


@dataclass
class Node:
    """One artifact of the plan: what makes it, from what, and for which variants."""

    stage: Stage
    artifact: Artifact
    config: Config
    section: dict[str, Any]
    inputs: dict[str, Artifact]
    ranges: list[PartRange] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)
    at_once: int = 1

    @property
    def label(self) -> str:
        return self.artifact.label

    def made_from(self) -> set[str]:
        """Labels of the artifacts that must be there first."""
        return {artifact.label for artifact in self.inputs.values()}


@dataclass
class Plan:
    """The union of all variants' artifacts, each once, in the order of the stages."""

    job: Job
    store: Store
    nodes: list[Node]
    rows: dict[str, int]
    text_bytes: dict[str, int]

    def of(self, variant: str) -> dict[str, Node]:
        """A variant's artifacts by stage; the report belongs to all variants."""
        return {node.stage.name: node for node in self.nodes if variant in node.variants}


@dataclass(frozen=True)
class Done:
    """What became of a node: its manifest, whether this run made it, and how long that took."""

    node: Node
    manifest: Manifest
    made: bool
    seconds: float


def plan(job: Job, until: str = "report", assume: bool = False) -> Plan:
    """Name every artifact of a job, looking at raw files and model folders but starting nothing.

    Args:
        until: the last stage wanted.
        assume: take files that are not at hand as described by the config (for --dry-run).

    Raises:
        UserError: files that are missing, a budget larger than the data, more clusters than rows.
    """
    if until not in NAMES:
        raise UserError(
            f"reading the command line: --until expects one of {', '.join(NAMES)}, got {until!r}."
        )
    wanted = NAMES[: NAMES.index(until) + 1]
    store = Store(job.first.run.storage)
    store.check()
    nodes: dict[tuple[str, str], Node] = {}
    rows: dict[str, int] = {}
    text_bytes: dict[str, int] = {}
    raw = _RawFiles(store, assume)
    for variant, config in job.variants.items():
        ranges = raw.ranges(config.examples, "examples")
        rows[variant] = sum(part.rows for part in ranges) or config.examples.expected_rows or 0
        text_bytes[variant] = sum(
            raw.indexes[uri].text_bytes for uri in {part.file.uri for part in ranges}
        )
        if not ranges and not assume:
            raise UserError(
                "planning the run: examples.files names no file. Name files, a folder, a glob or a data set; --dry-run goes without."
            )
        if config.examples.extends is not None:
            ranges = _extended(config, ranges)
        _check_sizes(config, rows[variant])
        own: dict[str, Node] = {}
        for stage in STAGES[:-1]:
            if stage.name in wanted and stage.wanted(config):
                found = _node(stage, config, own, raw, ranges, assume)
                node = nodes.setdefault((stage.name, found.artifact.fingerprint), found)
                node.variants.append(variant)
                own[stage.name] = node
    if "report" in wanted:
        _add_report(job, store, nodes)
    ordered = sorted(nodes.values(), key=lambda node: NAMES.index(node.stage.name))
    return Plan(job, store, ordered, rows, text_bytes)


def _node(
    stage: Stage,
    config: Config,
    own: dict[str, Node],
    raw: "_RawFiles",
    ranges: list[PartRange],
    assume: bool,
) -> Node:
    """One stage of one variant; `own` holds the variant's stages before it."""
    if stage.name == "proxy" and config.proxy.use is not None:
        used = Artifact.at(config.proxy.use, "proxy", "proxy.use")
        section = used.manifest().section
        _check_used_proxy(section, _section("proxy", config, assume))
        return Node(stage, used, config, section, {})
    inputs = {name: own[name].artifact for name in stage.inputs(config)}
    if stage.name == "examples" and config.examples.extends is not None:
        inputs["base"] = Artifact.at(config.examples.extends, "examples", "examples.extends")
    if stage.name == "clusters" and config.clusters.use is not None:
        inputs["base"] = Artifact.at(config.clusters.use, "clusters", "clusters.use")
    own_ranges = ranges if stage.name == "examples" else []
    if stage.name == "evaluation" and config.evaluation is not None:
        held_out = config.evaluation
        own_ranges = raw.ranges(held_out, "evaluation")
    section = _section(stage.name, config, assume)
    artifact = Artifact(
        raw.store, stage.name, _name(stage, section, inputs, raw.identity(own_ranges))
    )
    return Node(stage, artifact, config, section, inputs, own_ranges)


def _extended(config: Config, ranges: list[PartRange]) -> list[PartRange]:
    """The parts under the file numbers that examples.extends began; its rows must have been cut and read in the same way."""
    section, uri = config.examples, str(config.examples.extends)
    base = Artifact.at(uri, "examples", "examples.extends").manifest()
    ours = _section("examples", config, assume=False)
    wrong = [name for name in ours if base.section.get(name) != ours[name]]
    if wrong:
        raise UserError(
            f"extending {uri}: it was made with examples.{wrong[0]} = {base.section.get(wrong[0])}, but the config says "
            f"{ours[wrong[0]]}. Set it as it was then; ids and parts would not fit otherwise."
        )
    return renumbered(
        ranges, file_numbers(listing(ranges), base, section.on_changed_file, uri).numbers
    )


def _check_used_proxy(used: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to score rows with a proxy that was trained on rows in another form than the config describes."""
    if len(used["members"]) != len(asked["members"]):
        raise UserError(
            f"planning the proxy: proxy.use names an artifact of {len(used['members'])} proxies, but proxy.members describes "
            f"{len(asked['members'])}. Describe those that were trained."
        )
    for number, (theirs, ours) in enumerate(zip(used["members"], asked["members"], strict=True)):
        wrong = [name for name in WHAT_A_PROXY_READS if theirs.get(name) != ours.get(name)]
        if wrong:
            raise UserError(
                f"planning the proxy: the artifact that proxy.use names was trained with {wrong[0]} = {theirs.get(wrong[0])} (member "
                f"{number}), but the config says {ours.get(wrong[0])}; also different: {', '.join(wrong[1:]) or 'nothing'}. Set these "
                "fields of proxy as they were then."
            )


def _add_report(job: Job, store: Store, nodes: dict[tuple[str, str], Node]) -> None:
    inputs = {
        f"{variant}/{node.stage.name}": node.artifact
        for node in nodes.values()
        for variant in node.variants
    }
    section = {"run": job.first.run.name, **job.first.report.model_dump()}
    artifact = Artifact(store, "report", _name(STAGES[-1], section, inputs, []))
    nodes["report", artifact.fingerprint] = Node(
        STAGES[-1], artifact, job.first, section, inputs, variants=list(job.variants)
    )


def _name(
    stage: Stage, section: dict[str, Any], inputs: dict[str, Artifact], files: list[Any]
) -> str:
    return fingerprint(
        {
            "format": FORMAT,
            "stage": stage.name,
            "version": stage.version,
            "section": section,
            "inputs": {name: artifact.fingerprint for name, artifact in inputs.items()},
            "files": files,
        }
    )


def _section(stage: str, config: Config, assume: bool) -> dict[str, Any]:
    """What of a section decides the artifact's content: not where files lie, nor how often state is saved."""
    if stage == "proxy":
        return {"members": [_training(member, assume) for member in config.proxy.each()]}
    if stage == "target":
        assert config.target is not None
        return _training(config.target, assume)
    dumped: dict[str, Any] = getattr(config, stage).model_dump(mode="json")
    if stage == "subset" and not draw.uses_at(config.subset):
        del dumped["at"]  # a job that sets it for one rule does not make the others' subsets again
    for where in NO_CONTENT:
        dumped.pop(where, None)
    return dumped


def _training(section: Training, assume: bool) -> dict[str, Any]:
    dumped = section.model_dump(
        mode="json", exclude={"model", "tokenizer", "state_every", "members", "use"}
    )
    try:
        template = template_text(section)
        dumped["template"] = template and fingerprint(template)
        return {**dumped, **identity(section.model, section.tokenizer)}
    except UserError:
        if not assume:
            raise
        return {**dumped, "assumed": section.model.model_dump(), "tokenizer": section.tokenizer}


def _check_sizes(config: Config, rows: int) -> None:
    if rows == 0:
        return
    if isinstance(config.subset.budget, int):
        budget_rows(config.subset.budget, rows)
    for section in config.proxy.each() if config.proxy.use is None else ():
        steps = (
            -(-rows * section.epochs // section.global_batch)
            if section.epochs is not None
            else int(section.steps or 0)
        )
        if section.checkpoints > steps:
            raise UserError(
                f"planning the proxy: proxy.checkpoints = {section.checkpoints}, but {rows} rows in batches of "
                f"{section.global_batch} make only {steps} steps. Lower proxy.checkpoints or proxy.global_batch, or train longer."
            )
    if _by_cluster(config) and config.clusters.within == "all" and config.clusters.k > rows:
        raise UserError(
            f"planning clusters: clusters.k = {config.clusters.k}, but the data have only {rows} rows. Lower clusters.k."
        )


class _RawFiles:
    """Looks at each raw file once; what it saw is remembered in the storage by path, size and time of change."""

    def __init__(self, store: Store, assume: bool) -> None:
        self.store, self.assume = store, assume
        self.seen: dict[str, list[PartRange]] = {}
        self.indexes: dict[str, FileIndex] = {}

    def ranges(self, section: Examples | Evaluation, name: str) -> list[PartRange]:
        """The parts of a section's files, after a look at the columns of those files that tell them by themselves."""
        key = section.model_dump_json()
        if key not in self.seen:
            try:
                files = self._files(section, name)
            except UserError:
                if not self.assume:
                    raise
                files = []
            with ThreadPoolExecutor(IO_THREADS) as pool:
                indexes = list(
                    pool.map(lambda file: self._index(file, section.rows_per_part), files)
                )
            self.indexes.update(
                {file.uri: index for file, index in zip(files, indexes, strict=True)}
            )
            check_columns(files, indexes, section.columns)
            self.seen[key] = part_ranges(files, indexes)
        return self.seen[key]

    def _files(self, section: Examples | Evaluation, name: str) -> list[RawFile]:
        dataset = getattr(section, "dataset", None)
        if dataset is None or not isinstance(section, Examples):
            return find_files(section.files, section.root, name) if section.files else []
        if is_folder(dataset):
            return find_files([dataset], section.root, name, section.split)
        where = (self.store, dataset, section.dataset_config, section.split)
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

    def identity(self, ranges: list[PartRange]) -> list[Any]:
        files = {part.file_number: part.file for part in ranges}
        return [
            [number, file.name, file.bytes, file.sha256, file.source]
            for number, file in sorted(files.items())
        ]

    def _index(self, file: RawFile, rows_per_part: int) -> FileIndex:
        path = f"index/{fingerprint([file.uri, file.bytes, file.mtime_ns, rows_per_part])}.json"
        try:
            return FileIndex.from_dict(json.loads(self.store.read(path)))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            index = index_file(file, rows_per_part)
            self.store.write(path, json.dumps(asdict(index)).encode())
            return index


def run(made_plan: Plan, only: set[str] | None = None) -> list[Done]:
    """Reuse or make every artifact of a plan. Ray is started only if something is to be made that needs it.

    Args:
        only: labels of the nodes to look at; with them given, no run record is written.
    """
    nodes = [node for node in made_plan.nodes if only is None or node.label in only]
    run_id = uuid.uuid4().hex[:12]
    committed = {node.label: node.artifact.committed() for node in nodes}
    missing = [
        node for node in nodes if committed[node.label] is None and node.stage.name != "report"
    ]
    if missing:
        _begin(made_plan, missing)
    done: dict[str, Done] = {}
    begun: set[str] = set()
    by_label = {node.label: node for node in nodes}

    def left_like(node: Node) -> int:
        left = [
            other
            for other in nodes
            if other.label not in begun and other.stage.module in ("proxy", "target")
        ]
        return sum(_workers(other) == _workers(node) for other in left)

    def make(label: str) -> None:
        begun.add(label)
        node = by_label[label]
        take(_make(node, done, run_id, functools.partial(left_like, node)))

    def take(result: Done) -> None:
        rows = f"{result.manifest.rows:,} rows, " if result.manifest.parts else ""
        state = "made" if result.made else "reused"
        log.info("%s: %s, %s%.1f s", result.node.label, state, rows, result.seconds)
        done[result.node.label] = result

    for label, found in committed.items():
        if found is not None:
            begun.add(label)
            take(Done(by_label[label], found, False, found.seconds))
    with _workers_ended() if missing else contextlib.nullcontext():
        task_graph.in_order(
            {node.label: node.made_from() for node in nodes if node.label not in done},
            make,
            made_plan.job.first.scaling.side_by_side,
        )
    results = [done[node.label] for node in nodes]
    if only is None:
        _record(made_plan, results)
    return results


def _begin(made_plan: Plan, missing: list[Node]) -> None:
    """Refuse models that cannot be used, join or start Ray, and refuse what does not fit there."""
    _check_models(missing)
    from s2l_ray.edge import placement, session

    importing = threading.Thread(target=_import, args=({node.stage.module for node in missing},))
    importing.start()
    session.connect(made_plan.job.first)
    importing.join()  # not beside the stages: modules that import each other must not be begun in two threads
    _share(missing)
    for node in missing:
        placement.check_placement(node.config, node.stage.name, node.at_once)
    session.check_storage(made_plan.store)


def _import(modules: set[str]) -> None:
    """Import the stages that will be needed, which takes seconds, while Ray starts. An error comes again where they are used."""
    with contextlib.suppress(Exception):
        for module in sorted(modules):
            importlib.import_module(f"s2l_ray.stages.{module}.make")


def _share(missing: list[Node]) -> None:
    """Say how many trainings may go on at the same time as each.

    Those of equally many workers get equal shares, so that the workers of one can do another.
    """
    needs = {node.label: node.made_from() for node in missing}
    trainings = [node for node in missing if node.stage.module in ("proxy", "target")]
    labels = {node.label for node in trainings}
    most: dict[int, int] = {}
    for node in trainings:
        others = task_graph.unrelated(node.label, needs, labels)
        at_once = min(node.config.scaling.side_by_side, 1 + len(others))
        most[_workers(node)] = max(at_once, most.get(_workers(node), 1))
    for node in trainings:
        node.at_once = most[_workers(node)]


def _workers(node: Node) -> int:
    scaling = node.config.scaling
    return scaling.proxy_workers if node.stage.name == "proxy" else scaling.target_workers


def _workers_ended() -> contextlib.AbstractContextManager[None]:
    from s2l_ray.edge import worker_pool as groups

    return groups.ended()


def _check_models(missing: list[Node]) -> None:
    """Load the config and tokenizer of every model that will be used, so that a wrong one is told before any work."""
    for node in missing:
        proxies = node.stage.name in ("proxy", "trajectories")
        sections: list[Training] = list(node.config.proxy.each()) if proxies else []
        if node.stage.name == "target" and node.config.target is not None:
            sections.append(node.config.target)
        for section in sections:
            load_encoder(section)
            if section.trained:
                check_weights(section.model)


def _make(
    node: Node, done: dict[str, Done], run_id: str, trainings_left: Callable[[], int]
) -> Done:
    with _lease(node):
        waited_for = node.artifact.committed()
        if waited_for is not None:
            return Done(node, waited_for, False, waited_for.seconds)
        log.info("%s: making", node.label)
        began = time.monotonic()
        _make_room(node)
        inputs = {
            # one that is not in the plan was made elsewhere
            name: done[label].manifest if (label := artifact.label) in done else artifact.manifest()
            for name, artifact in node.inputs.items()
        }
        work = Work(
            config=node.config,
            artifact=node.artifact,
            inputs=node.inputs,
            manifests=inputs,
            run=run_id,
            ranges=node.ranges,
            section=node.section,
            version=node.stage.version,
            at_once=node.at_once,
            trainings_left=trainings_left,
        )
        outcome: Outcome = importlib.import_module(f"s2l_ray.stages.{node.stage.module}.make").make(
            work
        )
        manifest = Manifest(
            format=FORMAT,
            stage=node.stage.name,
            fingerprint=node.artifact.fingerprint,
            inputs={name: artifact.fingerprint for name, artifact in node.inputs.items()},
            section=node.section,
            parts=outcome.parts,
            files=outcome.files,
            info=outcome.info,
            seconds=round(time.monotonic() - began, 3),
            run=run_id,
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            scaling=node.config.scaling.model_dump(),
            versions=versions(),
            version=node.stage.version,
            start_seconds=work.start_seconds,
        )
        node.artifact.commit(manifest)
    return Done(node, manifest, True, manifest.seconds)


def _lease(node: Node) -> contextlib.AbstractContextManager[None]:
    if node.stage.name == "report":  # quick, needs no Ray, and two writers write the same
        return contextlib.nullcontext()
    from s2l_ray.edge import lease

    return lease.lease(node.artifact)


def _make_room(node: Node) -> None:
    if node.stage.module in ("proxy", "target", "report"):
        return
    from s2l_ray.edge import placement

    placement.make_room(node.config, node.stage.name)


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except (
            importlib.metadata.PackageNotFoundError
        ):  # s2l_ray itself, when a job runs it from its working directory
            found[package] = importlib.import_module(package).__version__
    return found


def _record(made_plan: Plan, done: list[Done]) -> None:
    """Write <storage>/runs/<name>/run.json, and the report beside it."""
    config = made_plan.job.first
    by_label = {result.node.label: result for result in done}
    variants = {
        variant: {
            stage: {
                "uri": node.artifact.uri,
                "fingerprint": node.artifact.fingerprint,
                "rows": by_label[node.label].manifest.rows,
                "seconds": by_label[node.label].manifest.seconds,
                "flops": by_label[node.label].manifest.info.get("flops"),
            }
            for stage, node in made_plan.of(variant).items()
        }
        for variant in made_plan.job.variants
    }
    record = {
        "name": config.run.name,
        "config": {
            variant: value.model_dump(mode="json")
            for variant, value in made_plan.job.variants.items()
        },
        "artifacts": variants[next(iter(variants))],
        "variants": variants,
        "versions": versions(),
    }
    folder = f"runs/{config.run.name}"
    made_plan.store.write(f"{folder}/run.json", json.dumps(record, indent=1).encode())
    report = next((result for result in done if result.node.stage.name == "report"), None)
    if report is not None:
        made_plan.store.write(
            f"{folder}/report.html", report.node.artifact.read_file(report.manifest.files[0])
        )
