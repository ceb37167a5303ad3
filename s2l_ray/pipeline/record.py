"""What a run leaves in <storage>/runs/<name>: run.json, files of the job, links to artifacts."""

import importlib
import importlib.metadata
import json
from typing import Any

from s2l_ray.core.storage.info import flops_of
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.errors import without_credentials
from s2l_ray.pipeline.planning import Node, Plan

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
