"""The loop that reuses or makes the artifacts of a plan."""

import contextlib
import importlib
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.model.architecture import check_architecture, check_positions
from s2l_ray.core.model.loading import check_weights, load_encoder
from s2l_ray.core.model.places import at_hand
from s2l_ray.core.storage.info import stored
from s2l_ray.core.storage.manifest import FORMAT, Manifest
from s2l_ray.edge.failures import of_system
from s2l_ray.pipeline import task_graph
from s2l_ray.pipeline.planning import Node, Plan
from s2l_ray.pipeline.record import versions, write_begun, write_record

log = logging.getLogger("s2l_ray")


@dataclass(frozen=True)
class Done:
    """What became of a node: its manifest, whether this run made it, and how long that took."""

    node: Node
    manifest: Manifest
    made: bool
    seconds: float


def run(plan: Plan, only: set[str] | None = None) -> list[Done]:
    """Reuse or make every artifact of a plan. Ray starts only if something is made that needs it.

    Args:
        only: labels of the nodes to look at; with them given, no run record is written.
    """
    nodes = [node for node in plan.nodes if only is None or node.label in only]
    committed = {node.label: node.artifact.committed() for node in nodes}
    missing = [node for node in nodes if committed[node.label] is None]
    on_ray = [node for node in missing if node.request.kind != "nothing"]
    if missing:
        write_begun(plan)
    if on_ray:
        _begin(plan, on_ray)
    making = _Making(plan, missing)
    for node in nodes:
        found = committed[node.label]
        if found is not None:
            making.take(Done(node, found, False, found.seconds))
    with _idle_workers_ended() if on_ray else contextlib.nullcontext():
        task_graph.in_order(
            {node.label: node.made_from() for node in missing},
            making.make,
            plan.job.first.scaling.side_by_side,
        )
    results = [making.done[node.label] for node in nodes]
    if only is None:
        try:
            write_record(plan, {result.node.label: result.manifest for result in results})
        except OSError as error:
            # All is there, as on a storage that may only be read.
            if missing or of_system(error) is None:
                raise
            log.warning("run.json is not written: %s", of_system(error))
    return results


class _Making:
    """What of a run is done and what is not begun. `make` is called in several threads."""

    def __init__(self, plan: Plan, missing: list[Node]) -> None:
        self.plan = plan
        self.run_id = uuid.uuid4().hex[:12]
        self.done: dict[str, Done] = {}
        self._not_begun = {node.label: node for node in missing}

    def make(self, label: str) -> None:
        node = self._not_begun.pop(label)

        def remaining() -> int:
            left = list(self._not_begun.values())
            return sum(other.request == node.request for other in left)

        self.take(_make(node, self, remaining))

    def take(self, result: Done) -> None:
        rows = f"{result.manifest.rows:,} rows, " if result.manifest.parts else ""
        state = "made" if result.made else "reused"
        log.info("%s: %s, %s%.1f s", result.node.label, state, rows, result.seconds)
        self.done[result.node.label] = result


def _begin(plan: Plan, missing: list[Node]) -> None:
    """Refuse models that cannot be used, join or start Ray, and refuse what does not fit there."""
    check_models(missing)
    from s2l_ray.edge import placement, session

    modules = sorted({node.stage.make for node in missing})
    importing = threading.Thread(target=_import, args=(modules,))
    importing.start()
    session.connect(plan.job.first.scaling)
    # Not beside the stages: two threads must not begin modules that import each other.
    importing.join()
    share(missing)
    hosts = placement.hosts()
    for node in missing:
        placement.check_placement(node.request, node.at_once, hosts)
    session.check_storage(plan.store)


def check_models(missing: list[Node], assume: bool = False) -> None:
    """Load config and tokenizer of every model that will be used, build it, check weights' headers.

    Args:
        assume: pass over models and tokenizers that are not at hand.

    Raises:
        UserError: one that cannot be used.
    """
    for node in missing:
        for section in node.stage.models(node.config):
            if assume and not at_hand(section.model, section.tokenizer):
                continue
            load_encoder(section)
            if section.trained:
                check_architecture(section.model)
                check_weights(section.model)
        for section, tokens, field in node.stage.texts(node.config):
            if assume and not at_hand(section.model):
                continue
            check_positions(section.model, tokens, field)


def _import(modules: list[str]) -> None:
    """Import stages, which takes seconds. An error comes again where the stage is used."""
    with contextlib.suppress(Exception):
        for module in modules:
            importlib.import_module(module)


def share(missing: list[Node]) -> None:
    """Say how many artifacts may be made at the same time as each that asks for workers.

    Those with equal requests get equal shares, so that the workers of one can do another.
    """
    needs = {node.label: node.made_from() for node in missing}
    trainings = [node for node in missing if node.request.kind == "workers"]
    labels = {node.label for node in trainings}
    for node in trainings:
        others = task_graph.unrelated(node.label, needs, labels)
        node.at_once = min(node.config.scaling.side_by_side, 1 + len(others))
    most = {
        node.request: max(other.at_once for other in trainings if other.request == node.request)
        for node in trainings
    }
    for node in trainings:
        node.at_once = most[node.request]


def _make(node: Node, making: _Making, remaining: Callable[[], int]) -> Done:
    with _lease(node):
        waited_for = node.artifact.committed()
        if waited_for is not None:
            return Done(node, waited_for, False, waited_for.seconds)
        log.info("%s: making", node.label)
        began = time.monotonic()
        _make_room(node)
        work = Work(
            config=node.config,
            artifact=node.artifact,
            inputs=node.inputs,
            manifests=_manifests(node, making.done),
            run=making.run_id,
            ranges=node.ranges,
            section=node.section,
            version=node.stage.version,
            request=node.request,
            at_once=node.at_once,
            remaining=remaining,
            passed_over=making.plan.passed_over,
        )
        outcome = importlib.import_module(node.stage.make).make(work)
        seconds = round(time.monotonic() - began, 3)
        manifest = _manifest(node, work, outcome, seconds)
        node.artifact.commit(manifest)
    return Done(node, manifest, True, seconds)


def _manifests(node: Node, done: dict[str, Done]) -> dict[str, Manifest]:
    """Of what it is made from; what is not in the plan was made elsewhere."""
    return {
        name: done[artifact.label].manifest if artifact.label in done else artifact.manifest()
        for name, artifact in node.inputs.items()
    }


def _manifest(node: Node, work: Work, outcome: Outcome, seconds: float) -> Manifest:
    return Manifest(
        format=FORMAT,
        stage=node.stage.name,
        fingerprint=node.artifact.fingerprint,
        inputs={name: artifact.fingerprint for name, artifact in node.inputs.items()},
        section=node.section,
        parts=outcome.parts,
        files=outcome.files,
        info=stored(outcome.info),
        seconds=seconds,
        run=work.run,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        scaling=node.config.scaling.model_dump(),
        versions=versions(),
        version=node.stage.version,
        start_seconds=work.start_seconds,
    )


# Ray is imported in the functions below only, so that a run that reuses everything never does.


def _idle_workers_ended() -> contextlib.AbstractContextManager[None]:
    from s2l_ray.edge import worker_pool

    return worker_pool.ended()


def _lease(node: Node) -> contextlib.AbstractContextManager[None]:
    """What needs no Ray is quick to make, and two writers write the same."""
    if node.request.kind == "nothing":
        return contextlib.nullcontext()
    from s2l_ray.edge import lease

    return lease.lease(node.artifact)


def _make_room(node: Node) -> None:
    if node.request.kind != "nothing":
        from s2l_ray.edge import placement

        placement.make_room(node.request)
