"""`report` from every artifact of a job: small numbers and sample rows become one page."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.kmeans.features import AXES
from s2l_ray.core.report.data import (
    ClusterExample,
    Clustering,
    LeftOut,
    LossCurve,
    ReportData,
    StageCost,
    Subset,
)
from s2l_ray.core.report.page import render
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import (
    ClustersInfo,
    ExamplesInfo,
    Moved,
    ProxyInfo,
    SubsetInfo,
    TrajectoriesInfo,
    flops_of,
    info_of,
)
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.text.turns import prompt_and_answer
from s2l_ray.errors import without_credentials
from s2l_ray.stages.report.evaluations import evaluation, paired_tests


def make(work: Work) -> Outcome:
    """Render the page. Inputs are named `variant/stage`."""
    variants: dict[str, dict[str, Manifest]] = {}
    for name, manifest in work.manifests.items():
        variant, stage = name.split("/")
        variants.setdefault(variant, {})[stage] = manifest
    first = next(iter(variants.values()))
    examples, trajectories = first["examples"], first.get("trajectories")
    about = info_of(examples, ExamplesInfo)
    sources = list(about.sources)
    data = ReportData(
        run=work.config.run.name,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        num_examples=examples.rows,
        versions=examples.versions,
        subsets=[
            _subset(work, v, stages["subset"], sources)
            for v, stages in variants.items()
            if "subset" in stages
        ],
        sources=sources,
        source_sizes=list(about.sources.values()),
        new_files=about.new_files,
        dropped_files=about.dropped_files,
        columns=about.columns,
        passed_over={
            without_credentials(uri): why
            for section in work.passed_over.values()
            for uri, why in section.items()
        },
        proxies=_curves(variants),
        clusterings=_clusterings(work, variants),
        left_out=_left_out(about, trajectories),
        evaluations=[evaluation(v, s) for v, s in variants.items() if "evaluation" in s],
        paired_tests=paired_tests(work, variants),
        stages=_costs(work, variants),
    )
    return Outcome(files=[work.artifact.write_named("report.html", render(data).encode())])


def _subset(work: Work, variant: str, manifest: Manifest, sources: list[str]) -> Subset:
    info = info_of(manifest, SubsetInfo)
    after = {source: chosen for source, (_, chosen) in info.sources.items()}
    return Subset(
        variant=variant,
        rule=info.rule,
        num_examples=manifest.rows,
        uri=without_credentials(work.inputs[f"{variant}/subset"].uri),
        source_sizes=[after.get(source, 0) for source in sources],
    )


def _curves(variants: dict[str, dict[str, Manifest]]) -> list[LossCurve]:
    proxies = {
        stages["proxy"].fingerprint: stages["proxy"]
        for stages in variants.values()
        if "proxy" in stages
    }
    return [
        LossCurve(
            label=f"proxy {number}" if number else "proxy",
            steps=member.curve.step,
            losses=member.curve.loss,
        )
        for manifest in proxies.values()
        for number, member in enumerate(info_of(manifest, ProxyInfo).members)
    ]


def _clusterings(work: Work, variants: dict[str, dict[str, Manifest]]) -> list[Clustering]:
    found: dict[tuple[str, str], tuple[str, dict[str, Manifest]]] = {}
    for variant, stages in variants.items():
        if "clusters" in stages:
            key = (
                stages["clusters"].fingerprint,
                stages["subset"].fingerprint if "subset" in stages else "",
            )
            found.setdefault(key, (variant, stages))
    return [_clustering(work, variant, stages) for variant, stages in found.values()]


def _clustering(work: Work, variant: str, stages: dict[str, Manifest]) -> Clustering:
    clusters, subset = info_of(stages["clusters"], ClustersInfo), stages.get("subset")
    mean, spread = np.array(clusters.centroids), np.array(clusters.spread)
    steps = clusters.steps
    several = steps[0][0] != steps[-1][0]
    return Clustering(
        variant=variant,
        steps=list(range(1, len(steps) + 1)) if several else [step for _, step in steps],
        mean=mean,
        low=mean - spread,
        high=mean + spread,
        band="mean plus and minus one standard deviation",
        sizes=clusters.sizes,
        quotas=info_of(subset, SubsetInfo).clusters if subset is not None else None,
        objective=clusters.objectives,
        feature=AXES[clusters.features],
        moved=_moved(clusters),
        examples=_members(work, variant, stages),
    )


def _moved(clusters: ClustersInfo) -> Moved | None:
    """What moved, with nothing for the clusters of new sources, which come last."""
    moved = clusters.moved
    if moved is None:
        return None
    new = clusters.k - len(moved.base_sizes)
    return replace(
        moved,
        base_sizes=moved.base_sizes + new * [0],
        before=moved.before + new * [0],
        shifts=moved.shifts + new * [0.0],
    )


def _members(work: Work, variant: str, stages: dict[str, Manifest]) -> list[ClusterExample]:
    """The first rows of each cluster, from as few parts as have them."""
    wanted = work.config.report.sample_rows
    per_cluster: dict[int, int] = {}
    shown: list[ClusterExample] = []
    sizes = info_of(stages["clusters"], ClustersInfo).sizes
    enough = sum(min(wanted, size) for size in sizes)
    examples, clusters = work.inputs[f"{variant}/examples"], work.inputs[f"{variant}/clusters"]
    for part, labels in zip(stages["examples"].parts, stages["clusters"].parts, strict=True):
        if len(shown) == enough:
            break
        assigned = clusters.read_part(labels)
        taken = []
        for row, cluster in enumerate(assigned["cluster"].to_pylist()):
            if cluster is not None and per_cluster.get(cluster, 0) < wanted:
                per_cluster[cluster] = per_cluster.get(cluster, 0) + 1
                taken.append(row)
        if taken:
            shown += _examples(examples, part, assigned, taken)
    return sorted(shown, key=lambda example: example.cluster)


def _examples(
    artifact: Artifact, part: Any, assigned: Any, taken: list[int]
) -> list[ClusterExample]:
    rows = artifact.read_part(part, ["example_id", "source", "messages"]).take(taken).to_pylist()
    near = assigned.take(taken).to_pylist()
    asked = [prompt_and_answer(row["messages"]) for row in rows]
    return [
        ClusterExample(
            cluster=place["cluster"],
            example_id=row["example_id"],
            source=row["source"],
            prompt=prompt,
            completion=answer,
            distance=place["distance"],
        )
        for row, place, (prompt, answer) in zip(rows, near, asked, strict=True)
    ]


def _left_out(examples: ExamplesInfo, trajectories: Manifest | None) -> list[LeftOut]:
    rows = [
        LeftOut(
            stage="examples",
            reason=reason,
            count=count,
            examples=examples.places.get(reason, []),
        )
        for reason, count in examples.rejects.items()
    ]
    if trajectories is not None:
        rows += [
            LeftOut(stage="trajectories", reason=r, count=c)
            for r, c in info_of(trajectories, TrajectoriesInfo).left_out.items()
        ]
    return rows


def _costs(work: Work, variants: dict[str, dict[str, Manifest]]) -> list[StageCost]:
    owners: dict[tuple[str, str], list[str]] = {}
    manifests = {}
    for variant, stages in variants.items():
        for stage, manifest in stages.items():
            owners.setdefault((stage, manifest.fingerprint), []).append(variant)
            manifests[stage, manifest.fingerprint] = manifest
    return [
        StageCost(
            stage=stage,
            variant="" if len(names) == len(variants) else ", ".join(names),
            reused=manifests[stage, name].run != work.run,
            rows=manifests[stage, name].rows or None,
            seconds=manifests[stage, name].seconds,
            flops=flops_of(manifests[stage, name]),
        )
        for (stage, name), names in owners.items()
    ]
