"""Evaluations of variants for the report: their results, and tests on the rows that they share."""

from itertools import combinations

from s2l_ray.contract.work import Work
from s2l_ray.core.answers.resampling import Resampled, difference, holm
from s2l_ray.core.report.data import ALL, Evaluation, PairedTest
from s2l_ray.core.storage.info import EvaluationInfo, TargetInfo, info_of
from s2l_ray.core.storage.manifest import Manifest

# Of more variants each is compared with the first alone.
MOST_IN_ALL_PAIRS = 5


def evaluation(variant: str, stages: dict[str, Manifest]) -> Evaluation:
    """Results of one variant."""
    info = info_of(stages["evaluation"], EvaluationInfo)
    everywhere = {ALL: info.macro, **info.by_source}
    return Evaluation(
        variant=variant,
        num_examples=stages["subset"].rows,
        target_steps=info_of(stages["target"], TargetInfo).total_steps,
        metrics={
            name: {
                source: own.metrics[name].mean
                for source, own in info.by_source.items()
                if name in own.metrics
            }
            for name in info.macro.metrics
        },
        intervals={
            name: {
                source: (own.metrics[name].low, own.metrics[name].high)
                for source, own in everywhere.items()
                if name in own.metrics
            }
            for name in info.macro.metrics
        },
        counts=info.counts,
        differ=info.differ,
        differing=info.differing,
    )


def paired_tests(work: Work, variants: dict[str, dict[str, Manifest]]) -> list[PairedTest]:
    """Every two variants whose targets answered the same rows, by each metric that both have."""
    manifests = {
        variant: stages["evaluation"]
        for variant, stages in variants.items()
        if "evaluation" in stages
    }
    found = {
        variant: _resampled(work, variant, manifest)
        for variant, manifest in manifests.items()
        if len(manifests) > 1
    }
    first = next(iter(found), None)
    pairs = [
        (one, other)
        for one, other in combinations(found, 2)
        if (len(found) <= MOST_IN_ALL_PAIRS or one == first)
        and found[one].same == found[other].same
        and manifests[one].fingerprint != manifests[other].fingerprint
    ]
    metrics = dict.fromkeys(name for resampled in found.values() for name in resampled.metrics)
    return [test for name in metrics for test in _tests(name, found, pairs)]


def _tests(
    metric: str, found: dict[str, Resampled], pairs: list[tuple[str, str]]
) -> list[PairedTest]:
    both = [
        (one, other)
        for one, other in pairs
        if metric in found[one].metrics and metric in found[other].metrics
    ]
    apart = [
        difference(found[other].macro_means(metric), found[one].macro_means(metric))
        for one, other in both
    ]
    corrected = holm([p for _, p in apart])
    return [
        PairedTest(
            metric=metric,
            first=other,
            second=one,
            difference=estimate.mean,
            low=estimate.low,
            high=estimate.high,
            p=p,
        )
        for (one, other), (estimate, _), p in zip(both, apart, corrected, strict=True)
    ]


def _resampled(work: Work, variant: str, manifest: Manifest) -> Resampled:
    """Resampled means of a variant, read part by part."""
    artifact, made = work.inputs[f"{variant}/evaluation"], Resampled()
    metrics = list(info_of(manifest, EvaluationInfo).macro.metrics)
    for part in manifest.parts:
        made.add_table(artifact.read_part(part, ["example_id", "source", *metrics]), metrics)
    return made
