"""What a selection rule reads, and its groups: a group is the rows that share a quota."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s2l_ray.config import FACILITY_LOCATION, RULES, Rule, Subset, expressions, group_kind
from s2l_ray.core.hashing import SUBSET


def rule_of(section: Subset) -> Rule:
    """The rule that `subset.rule` names or is.

    Facility location chooses without keys; for it this is the rule whose one group has the budget.
    """
    if section.rule == FACILITY_LOCATION:
        return Rule()
    return RULES[section.rule] if isinstance(section.rule, str) else section.rule


def needs(section: Subset) -> set[str]:
    """The stored columns that a rule reads, such as {"cluster"} or {"source", "el2n"}."""
    if section.rule == FACILITY_LOCATION:
        return {"losses"}
    rule = rule_of(section)
    kind = group_kind(rule.group)
    grouped = {name for name in ("source", "cluster") if name in kind}
    return grouped | {expressions.COLUMNS[name] for name in expressions.parse(rule.score).names}


def by_cluster(section: Subset) -> bool:
    """Whether the rule reads what k-means made, so that there must be clusters."""
    return bool(needs(section) & {"cluster", "distance"})


def uses_at(section: Subset) -> bool:
    """Whether `subset.at` matters to the rule."""
    return expressions.parse(rule_of(section).score).uses_at


def purpose(section: Subset) -> str:
    """What salts the hash that orders rows of equal score.

    It is the rule itself, however it is named, so that the subsets of two rules meet only by
    chance; with `subset.paired` it is the same for all rules.
    """
    if section.paired:
        return SUBSET
    rule = rule_of(section)
    return f"{SUBSET} by {rule.group}; {rule.score}; {rule.take}"


@dataclass(frozen=True)
class Groups:
    """The groups of a rule, numbered from 0.

    Attributes:
        kind: what rows are grouped by; see `group_kind`.
        names: name of each group, for people.
        sources: names of the sources; a source's number is its place.
        num_clusters: number of clusters, 0 if the rule reads none.
        clusters_have_source: every cluster lies within one source, so a cluster's number is also
            the number of its (source, cluster) pair.
        parents: number of each group's source, int64 [G], where quotas are nested; else None.
    """

    kind: str
    names: tuple[str, ...]
    sources: tuple[str, ...]
    num_clusters: int
    clusters_have_source: bool
    parents: np.ndarray | None

    def numbers(self, sources: np.ndarray | None, clusters: np.ndarray | None) -> np.ndarray | int:
        """Group number of each row, int64 [n], or 0 where all rows are one group.

        Args:
            sources, clusters: numbers of each row's source and cluster, int64 [n]; None where the
                groups do not depend on them.
        """
        if self.kind == "all":
            return 0
        if self.kind == "source":
            assert sources is not None
            return sources
        assert clusters is not None
        if self.kind == "cluster" or self.clusters_have_source:
            return clusters
        assert sources is not None
        return sources * self.num_clusters + clusters


def groups_of(
    rule: Rule, sources: Sequence[str], num_clusters: int, cluster_sources: Sequence[str] | None
) -> Groups:
    """The groups of a rule.

    Args:
        sources: names of the sources; a source's number is its place.
        cluster_sources: the source of each cluster, where clusters were made within sources.
    """
    kind = group_kind(rule.group)
    clusters = [str(number) for number in range(num_clusters)]
    parents = None
    if kind == "all":
        names = ["all"]
    elif kind == "source":
        names = list(sources)
    elif kind == "cluster":
        names = clusters
    else:
        if cluster_sources is None:
            pairs = list(itertools.product(sources, clusters))
        else:
            pairs = list(zip(cluster_sources, clusters, strict=True))
        names = [f"{source} / {cluster}" for source, cluster in pairs]
        if "/" in kind:
            # A source that is not listed has no row that can be chosen, and its clusters have none
            # either: any parent will do.
            number = {source: index for index, source in enumerate(sources)}
            parents = np.array([number.get(source, 0) for source, _ in pairs], np.int64)
    return Groups(
        kind, tuple(names), tuple(sources), num_clusters, cluster_sources is not None, parents
    )
