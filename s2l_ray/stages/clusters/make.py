"""`clusters` from trajectories: sharded k-means on their features, K x F in the driver.

A round sends the centroids to all shard actors and adds up the members. After each round the state
is stored, so a run that dies loses one round at most. With clusters.within = source, one source
after the other is fitted so. With clusters.use, centroids come from another artifact, the base.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from s2l_ray.config import Clusters
from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.kmeans.features import feature_steps
from s2l_ray.core.kmeans.process_rows import View, in_view
from s2l_ray.core.kmeans.queries import SquaredDeviations
from s2l_ray.core.kmeans.sources import fit_source, moved
from s2l_ray.core.kmeans.state import FitResult, FitState
from s2l_ray.core.storage.info import ClustersInfo, Moved, TrajectoriesInfo
from s2l_ray.core.storage.manifest import fingerprint
from s2l_ray.core.storage.records import from_bytes, to_bytes
from s2l_ray.edge.user_errors import reraise_user_errors
from s2l_ray.errors import UserError
from s2l_ray.progress import Tracker, track
from s2l_ray.stages.clusters.shards import ShardActors, Source

log = logging.getLogger("s2l_ray")
# Fields of the section that must be those of the base, for its centroids to mean anything here.
MUST_MATCH = ("k", "within", "features", "steps", "initial", "weights")


def make(work: Work) -> Outcome:
    """Find the centroids, then write every part's assignments.

    Raises:
        UserError: k is larger than the number of scored rows or of distinct trajectories; features
            that cannot be made of the trajectories; a base that is made in another way.
    """
    section, trajectories = work.config.clusters, work.info("trajectories", TrajectoriesInfo)
    labels = feature_steps(trajectories.steps, section)
    base = _base(work, labels)
    if section.within == "all" and not base and section.k > trajectories.scored:
        raise UserError(
            f"making clusters: clusters.k = {section.k}, but only {trajectories.scored} rows have "
            "a trajectory. Lower k."
        )
    sources = _sources(section, trajectories, base)
    saved = _saved_states(work, sources)
    with ShardActors(work, sources) as shards, reraise_user_errors():
        shards.wait_until_up()
        work.rows_began(time.time())
        found = _fits(work, shards, sources, base, saved)
        deviations = [_deviations(shards, number, own) for number, own in enumerate(found)]
        changes = _moved(work, shards, sources, base, found) if base else None
        parts = shards.write([own.centroids for own in found], work.artifact.finished_parts())
    fewer = _with_fewer_clusters(section, sources, base, found)
    _warn(work, found, fewer)
    info = ClustersInfo(
        k=sum(len(own.centroids) for own in found),
        cluster_sources=[
            source for source, own in zip(sources, found, strict=True) for _ in own.sizes
        ],
        fewer=fewer,
        centroids=_joined(own.centroids for own in found),
        spread=_joined(deviations),
        sizes=_joined(own.sizes for own in found),
        objective=sum(own.objective for own in found),
        **_history(found),
        converged=all(own.converged for own in found),
        features=section.features,
        steps=labels,
        moved=changes,
    )
    return Outcome(parts, info=info)


def _fits(
    work: Work,
    shards: ShardActors,
    sources: list[Source],
    base: dict[Source, np.ndarray],
    saved: dict[Source, FitState],
) -> list[FitResult]:
    """The clusters of every source, one source after the other."""
    section = work.config.clusters
    done = sum(state.round for state in saved.values())
    with track(work.label, section.max_rounds * len(sources), "rounds", done) as tracker:
        return [
            fit_source(
                shards.ask,
                number,
                section,
                base=base.get(source),
                resume=saved.get(source),
                on_round=_on_round(work, source, tracker),
            )
            for number, source in enumerate(sources)
        ]


def _with_fewer_clusters(
    section: Clusters,
    sources: list[Source],
    base: dict[Source, np.ndarray],
    found: list[FitResult],
) -> dict[str, int]:
    """The number of clusters of every new source that has fewer than k."""
    counts = {source: len(own.sizes) for source, own in zip(sources, found, strict=True)}
    new = _new_sources(sources, base)
    return {source: counts[source] for source in new if counts[source] < section.k}


def _new_sources(sources: list[Source], base: dict[Source, np.ndarray]) -> list[str]:
    return [source for source in sources if source is not None and source not in base]


def state_name(source: Source) -> str:
    """Where the state of a source's fit is stored until the artifact is committed.

    Names of sources may be any text, so they are hashed.
    """
    return "rounds/latest.json" if source is None else f"rounds/{fingerprint(source)}.json"


def _saved_states(work: Work, sources: list[Source]) -> dict[Source, FitState]:
    """What an earlier run, that did not end, has found of each source."""
    there = {f"rounds/{name}" for name in work.artifact.list("rounds")}
    saved = {}
    for source in sources:
        if state_name(source) not in there:
            continue
        what = f"{work.label}{_of(source)}"
        try:
            state = from_bytes(FitState, work.artifact.read(state_name(source)))
        except ValueError as error:
            log.warning("%s: begins anew, its saved state cannot be read: %s", what, error)
            continue
        saved[source] = state
        log.info("%s: going on after round %d of an earlier run", what, state.round)
    return saved


def _of(source: Source) -> str:
    return "" if source is None else f" of {source}"


def _on_round(work: Work, source: Source, tracker: Tracker) -> Callable[[FitState], None]:
    def store(state: FitState) -> None:
        work.artifact.write(state_name(source), to_bytes(state))
        last = state.history[-1]
        tracker.advance(1, f"objective{_of(source)} {last.objective:.6g}, {last.moves:,} moved")

    return store


def _base(work: Work, labels: list[list[int]]) -> dict[Source, np.ndarray]:
    """The centroids of clusters.use by source, as that artifact numbers them; empty without it.

    Raises:
        UserError: naming every field in which the two differ.
    """
    section = work.config.clusters
    if section.use is None:
        return {}
    manifest, mine = work.manifests["base"], section.model_dump(mode="json")
    differ = [
        f"{name} is {manifest.section.get(name)} there and {mine[name]} here"
        for name in MUST_MATCH
        if manifest.section.get(name) != mine[name]
    ]
    info = work.info("base", ClustersInfo)
    if not differ and info.steps != labels:
        differ = [f"the steps [proxy, step] are {info.steps} there and {labels} here"]
    if differ:
        raise UserError(
            f"making clusters from those of {section.use}: expected the same features of the same "
            f"trajectories, but {'; '.join(differ)}. Set these fields of clusters as they are "
            "there, or leave clusters.use out."
        )
    centroids = np.array(info.centroids, dtype=np.float32)
    return {
        source: centroids[[own == source for own in info.cluster_sources]]
        for source in dict.fromkeys(info.cluster_sources)
    }


def _sources(
    section: Clusters, trajectories: TrajectoriesInfo, base: dict[Source, np.ndarray]
) -> list[Source]:
    """Whose rows are clustered together, in the order of the cluster numbers.

    Those of the base come first, then the new ones, sorted.
    """
    if section.within == "all":
        return [None]
    counts = trajectories.sources
    return [*base, *sorted(source for source in counts if counts[source] and source not in base)]


def _moved(
    work: Work,
    shards: ShardActors,
    sources: list[Source],
    base: dict[Source, np.ndarray],
    found: list[FitResult],
) -> Moved:
    """How the base's clusters changed."""
    all_moved = [
        moved(shards.ask, number, base[source], found[number].centroids)
        for number, source in enumerate(sources)
        if source in base
    ]
    sizes = work.info("base", ClustersInfo).sizes
    return Moved(
        base_sizes=sizes,
        before=_joined(own.before for own in all_moved),
        changed=sum(own.changed for own in all_moved),
        shifts=_joined(own.shifts for own in all_moved),
        new_rows=sum(int(own.sizes.sum()) for own in found) - sum(sizes),
        new_sources=_new_sources(sources, base),
    )


def _joined(arrays: Iterable[np.ndarray]) -> list[Any]:
    return [value for array in arrays for value in array.tolist()]


def _history(found: list[FitResult]) -> dict[str, Any]:
    """Objective and moves by round, added up over the sources.

    A source that has converged keeps its last objective.
    """
    histories = [own.history for own in found if own.history]
    rounds = range(max((len(history) for history in histories), default=0))
    return {
        "objectives": [
            sum(h[min(number, len(h) - 1)].objective for h in histories) for number in rounds
        ],
        "moves": [sum(h[number].moves for h in histories if number < len(h)) for number in rounds],
        "reseeded": sum(entry.reseeded for history in histories for entry in history),
    }


def _warn(work: Work, found: list[FitResult], fewer: dict[str, int]) -> None:
    section = work.config.clusters
    if fewer:
        log.warning(
            "%s: %d source(s) have fewer distinct trajectories than clusters.k = %d and get one "
            "cluster for each: %s",
            work.label,
            len(fewer),
            section.k,
            ", ".join(f"{source} ({count})" for source, count in list(fewer.items())[:10]),
        )
    moving = sum(not own.converged for own in found)
    if moving:
        log.warning(
            "%s: stopped after clusters.max_rounds = %d rounds, before the centroids%s "
            "came to rest",
            work.label,
            section.max_rounds,
            f" of {moving} source(s)" if section.within == "source" else "",
        )


def _deviations(shards: ShardActors, number: int, found: FitResult) -> np.ndarray:
    """Standard deviation of each cluster's members around its centroid, [K, F]; for pictures."""
    squares = in_view(shards.ask, View(number))(SquaredDeviations(found.centroids))
    return np.round(np.sqrt(squares / np.maximum(found.sizes, 1)[:, None]), 6)
