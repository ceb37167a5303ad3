"""What a run leaves in <storage>/runs/<name>: run.json, files of the job, links to artifacts."""

import importlib
import importlib.metadata
import json
from dataclasses import dataclass
from typing import Any

from s2l_ray.core.storage.info import flops_of
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.storage.records import from_bytes, to_bytes
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError, without_credentials
from s2l_ray.pipeline.planning import Node, Plan

BEGUN = "begun.json"
PACKAGES = (
    "s2l_ray", "ray", "torch", "transformers", "deepspeed", "pyarrow", "faiss-cpu", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # s2l_ray itself, when a job runs it from its working directory.
            found[package] = importlib.import_module(package).__version__
    return found


@dataclass(frozen=True)
class Begun:
    """What a run that has not finished wants: (stage, fingerprint) of each of its artifacts."""

    artifacts: list[tuple[str, str]]


def write_begun(plan: Plan) -> None:
    """Note what a run will make, until its record names it: nobody deletes it meanwhile."""
    nodes = [node for node in plan.nodes if node.artifact.store.uri == plan.store.uri]
    wanted = Begun([(node.artifact.stage, node.artifact.fingerprint) for node in nodes])
    plan.store.write(f"runs/{plan.job.first.run.name}/{BEGUN}", to_bytes(wanted))


def begun(store: Store, name: str) -> set[tuple[str, str]]:
    """(stage, fingerprint) of what a run that has not finished wants.

    Raises:
        UserError: its note is damaged.
    """
    path = f"runs/{name}/{BEGUN}"
    try:
        return set(from_bytes(Begun, store.read(path)).artifacts)
    except FileNotFoundError:
        return set()
    except ValueError as error:
        raise UserError(
            f"reading {store.uri_of(path)}: {error}. Run that job again, or remove the file."
        ) from None


def write_record(plan: Plan, manifests: dict[str, Manifest]) -> None:
    """Write the run record, and beside it the files of what was made of the whole job, and links.

    Args:
        manifests: by label of the plan's nodes.
    """
    config = plan.job.first
    folder = f"runs/{config.run.name}"
    variants = {
        variant: {
            stage: _entry(node, manifests[node.label]) for stage, node in plan.of(variant).items()
        }
        for variant in plan.job.variants
    }
    record = {
        "name": config.run.name,
        "config": {name: each.model_dump(mode="json") for name, each in plan.job.variants.items()},
        "artifacts": variants[next(iter(variants))],
        "variants": variants,
        "versions": versions(),
    }
    text = without_credentials(json.dumps(record, indent=1))
    plan.store.write(f"{folder}/run.json", text.encode())
    plan.store.delete(f"{folder}/{BEGUN}")
    for node in plan.nodes:
        if node.stage.of_job:
            for entry in manifests[node.label].files:
                plan.store.write(f"{folder}/{entry.name}", node.artifact.read_file(entry))
    plan.store.link(folder, _links(plan))


def _links(plan: Plan) -> dict[str, str]:
    """Path of each artifact of this storage by a name that people can guess.

    It is the stage's, with the variant's where not all variants have the artifact in common.
    """
    links: dict[str, str] = {}
    for node in plan.nodes:
        if node.artifact.store.uri != plan.store.uri:
            continue
        everyone = len(node.variants) == len(plan.job.variants)
        names = [""] if everyone else [f"-{variant}" for variant in node.variants]
        links |= {f"{node.stage.name}{name}": node.artifact.path for name in names}
    return links


def _entry(node: Node, manifest: Manifest) -> dict[str, Any]:
    return {
        "uri": node.artifact.uri,
        "fingerprint": node.artifact.fingerprint,
        "rows": manifest.rows,
        "seconds": manifest.seconds,
        "flops": flops_of(manifest),
    }
