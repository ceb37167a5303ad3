"""Features of a trajectory: chosen steps, perhaps without level, spread or scale, perhaps weighted.

Every row's features depend on that row alone, and on each value by float64 arithmetic that is
rounded once to float32: so their bits are the same however rows are cut into parts. Columns are
found by their labels (member, step), never by their place.

Shapes: N rows, S stored (member, step) columns, F features; per member the t chosen steps make t
features (differences: t - 1).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from s2l_ray.config import Clusters
from s2l_ray.errors import UserError

# Float64 [N] each: the chosen steps of one member.
Columns = list[np.ndarray]
# A first loss counts as at least this share of the row's largest loss, so that relative features
# are at most its inverse.
SMALLEST_FIRST = 2.0**-10

AXES: Mapping[str, str] = MappingProxyType(
    {
        "raw": "loss",
        "centred": "loss less its mean",
        "differences": "change of the loss",
        "zscored": "z-scored loss",
        "relative": "loss / first loss",
    }
)


def feature_steps(steps: Sequence[Sequence[int]], section: Clusters) -> list[list[int]]:
    """The label [member, step] of every feature column, member by member in step order.

    A difference has the label of its later step.

    Args:
        steps: [member, step] of every stored column, step 0 included.

    Raises:
        UserError: a step that is asked for and not there, too few steps for the features, or
        another number of weights.
    """
    first = 1 if section.features == "differences" else 0
    labels = [
        list(steps[column]) for columns in _columns(steps, section) for column in columns[first:]
    ]
    if section.weights is not None and len(section.weights) != len(labels):
        raise UserError(
            f"making clusters: clusters.weights has {len(section.weights)} numbers, but there are "
            f"{len(labels)} feature columns, {_named(labels)}. Give one weight for each."
        )
    return labels


def features(
    losses_NS: np.ndarray, steps: Sequence[Sequence[int]], section: Clusters
) -> np.ndarray:
    """Features float32 [N, F] of losses float32 [N, S], in the order of `feature_steps`.

    Of each row, and each member's chosen steps by themselves:

    - raw: the losses;
    - centred: less their mean;
    - differences: each less the one before;
    - zscored: less their mean, divided by their standard deviation (of all t, not t - 1); a
      constant row gives zeros;
    - relative: divided by the first one, which counts as at least a 1024th of the row's largest
      value, so that no feature exceeds 1024 (a row of zeros gives ones, as every constant row
      does).

    With weights, every column is multiplied by the root of its weight: k-means' squared distance is
    then weighted. Losses must be finite (`check_finite`): others give features that are not finite
    either, and so do features beyond float32 (huge losses or weights); k-means refuses both.

    Raises:
        UserError: as `feature_steps`.
    """
    labels = feature_steps(steps, section)
    result = np.empty((len(losses_NS), len(labels)), dtype=np.float32)
    weights = [1.0] * len(labels) if section.weights is None else section.weights
    with np.errstate(over="ignore", invalid="ignore"):
        made: Columns = []
        for columns in _columns(steps, section):
            made += _FEATURES[section.features](
                [losses_NS[:, column].astype(np.float64) for column in columns]
            )
        for place, (column, weight) in enumerate(zip(made, weights, strict=True)):
            result[:, place] = column * np.sqrt(weight)
    return result


def bytes_of_row(num_features: int) -> int:
    """Memory of a row in a shard that holds its rows: features, id, place in its part and label.

    An id takes 8 bytes at most, mostly 4. Where k is small, a Hamerly bound takes the other 4.
    """
    return 4 * num_features + 8 + 4 + 2


def check_finite(ids: np.ndarray, losses_NS: np.ndarray, steps: Sequence[Sequence[int]]) -> None:
    """Refuse losses that are NaN or infinite.

    As numbers they would move a whole cluster, as zeros they would make one up.

    Raises:
        UserError: naming the first such example and step.
    """
    wrong = ~np.isfinite(losses_NS)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        member, step = steps[column]
        raise UserError(
            f"making clusters: expected finite losses, got {losses_NS[row, column]} for example_id "
            f"{ids[row]} at step {step} of proxy number {member} (from 0). Rows that cannot be "
            "scored must be left out; score this part again."
        )


def _columns(steps: Sequence[Sequence[int]], section: Clusters) -> list[list[int]]:
    """Per member, the stored columns of its chosen steps in ascending order of step."""
    stored: dict[int, dict[int, int]] = {}
    for column, (member, step) in enumerate(steps):
        stored.setdefault(member, {})[step] = column
    return [
        [stored[member][step] for step in _chosen(member, sorted(stored[member]), section)]
        for member in sorted(stored)
    ]


def _chosen(member: int, stored: list[int], section: Clusters) -> list[int]:
    """The step numbers that make the trajectory of a member, ascending, out of the stored ones."""
    begin = [0] if section.initial else []
    if isinstance(section.steps, list):
        chosen = sorted({*begin, *section.steps})
    else:
        trained = [step for step in stored if step > 0]
        wanted = len(begin) + len(trained) if section.steps is None else section.steps
        chosen = begin + _evenly(trained, wanted - len(begin), member)
    absent = [step for step in chosen if step not in stored]
    if absent:
        raise UserError(
            f"making clusters: clusters.steps and clusters.initial ask for the steps {chosen}, but "
            f"proxy number {member} (from 0) has no step {', '.join(map(str, absent))}; it has "
            f"{', '.join(map(str, stored))}. Name steps that every proxy has."
        )
    if section.features != "raw" and len(chosen) < 2:
        raise UserError(
            f"making clusters: clusters.features = {section.features} needs at least 2 steps of "
            f"every proxy, got {len(chosen)}: with one, all rows are alike. Use features: "
            "raw, or more steps."
        )
    return chosen


def _evenly(trained: list[int], count: int, member: int) -> list[int]:
    """Exactly `count` of the steps and the last one, as evenly spaced as their places allow."""
    if not 1 <= count <= len(trained):
        raise UserError(
            f"making clusters: clusters.steps leaves {count} steps after step 0 to choose, but "
            f"proxy number {member} (from 0) has {len(trained)} of them. Expected "
            f"between 1 and {len(trained)}."
        )
    return [trained[-(-(place + 1) * len(trained) // count) - 1] for place in range(count)]


def _named(labels: list[list[int]]) -> str:
    text = ", ".join(f"step {step} of proxy {member}" for member, step in labels[:12])
    return text + (", ..." if len(labels) > 12 else "")


def _raw(losses: Columns) -> Columns:
    return losses


def _centred(losses: Columns) -> Columns:
    # One column after the other: there is no reduction whose order numpy could choose, and a
    # constant row gives exact zeros.
    mean = sum(losses[1:], losses[0]) / len(losses)
    return [column - mean for column in losses]


def _differences(losses: Columns) -> Columns:
    return [later - earlier for earlier, later in pairwise(losses)]


def _zscored(losses: Columns) -> Columns:
    centred = _centred(losses)
    squares = [column * column for column in centred]
    deviation = np.sqrt(sum(squares[1:], squares[0]) / len(squares))
    divisor = np.where(deviation == 0, 1.0, deviation)
    return [column / divisor for column in centred]


def _relative(losses: Columns) -> Columns:
    largest = np.max(np.abs(losses), axis=0)
    first = np.maximum(np.abs(losses[0]), SMALLEST_FIRST * largest)
    # Not NaN, which must come through.
    zeros = first == 0
    divisor = np.where(zeros, 1.0, first)
    return [np.where(zeros, 1.0, column / divisor) for column in losses]


_FEATURES: Mapping[str, Callable[[Columns], Columns]] = MappingProxyType(
    {
        "raw": _raw,
        "centred": _centred,
        "differences": _differences,
        "zscored": _zscored,
        "relative": _relative,
    }
)
