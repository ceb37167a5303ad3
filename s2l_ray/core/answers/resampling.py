"""Bootstrap over rows, within each source: intervals of means, and paired tests between models.

Each row counts Poisson(1) times in each resample, drawn by its example_id alone. As the number of
rows grows this is the ordinary bootstrap, but sums can be added up part by part, and two models
that answered the same rows have the same resamples, which pairs them (Chamandy et al. 2012,
"Estimating uncertainty for massive data streams").
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from s2l_ray.core.hashing import BOOTSTRAP, keyed_hash
from s2l_ray.core.storage.info import Estimate

RESAMPLES = 1_000
INTERVAL = (2.5, 97.5)
# P(count <= k) for k = 0, 1, ... as parts of 2^64; larger counts do not come up.
_CUMULATIVE = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)])
_BORDERS = (_CUMULATIVE * 2.0**64).clip(max=2.0**64 - 2048).astype(np.uint64)


def counts(example_ids: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each row counts in each resample: float64 [n, R]."""
    drawn = [keyed_hash(BOOTSTRAP, number, example_ids) for number in range(resamples)]
    return np.searchsorted(_BORDERS, np.stack(drawn, 1), side="right").astype(np.float64)


class Resampled:
    """Means of metrics by source, of all rows and of each resample.

    Attributes:
        rows: of each source.
        same: a number for each source that tells which rows it has.
    """

    def __init__(self, resamples: int = RESAMPLES) -> None:
        self.resamples = resamples
        self.rows: dict[str, int] = defaultdict(int)
        self.same: dict[str, int] = defaultdict(int)
        # [2, 1 + R]: sums of counted values and of counts; the first column counts each row once.
        self._sums: dict[tuple[str, str], np.ndarray] = {}

    def add_table(self, table: pa.Table, metrics: Sequence[str]) -> None:
        """Add rows of an `evaluation`: its columns example_id, source and those of the metrics."""
        values = {
            name: table[name].cast(pa.float32()).to_numpy(zero_copy_only=False) for name in metrics
        }
        self.add(table["example_id"].to_numpy(), table["source"].to_pylist(), values)

    def add(
        self, example_ids: np.ndarray, sources: Sequence[str], metrics: Mapping[str, np.ndarray]
    ) -> None:
        """Add rows; a value that is NaN is left out."""
        drawn_NR = counts(example_ids, self.resamples)
        drawn_NR = np.concatenate([np.ones((len(drawn_NR), 1)), drawn_NR], 1)
        own = np.asarray(sources, object)
        for source in dict.fromkeys(sources):
            here = own == source
            self.rows[source] += int(here.sum())
            self.same[source] ^= int(
                np.bitwise_xor.reduce(keyed_hash(BOOTSTRAP, -1, example_ids[here]))
            )
            for name, values in metrics.items():
                known = here & ~np.isnan(values)
                if known.any():
                    times = drawn_NR[known]
                    sums = np.stack([values[known].astype(float) @ times, times.sum(0)])
                    self._sums[source, name] = self._sums.get((source, name), 0.0) + sums

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self._sums))

    def means(self, source: str, metric: str) -> np.ndarray | None:
        """[1 + R]: the mean of all rows, then of each resample; NaN where that has no row."""
        sums = self._sums.get((source, metric))
        if sums is None:
            return None
        with np.errstate(invalid="ignore"):
            return np.asarray(sums[0] / sums[1])

    def macro_means(self, metric: str) -> np.ndarray:
        """The same of the mean over the sources that have the metric."""
        found = [self.means(source, metric) for source in sorted(self.rows)]
        return np.asarray(np.mean([means for means in found if means is not None], 0))


def estimate(means: np.ndarray) -> Estimate:
    """From [1 + R]: the mean, and the ends of the interval by percentiles."""
    drawn = means[1:][np.isfinite(means[1:])]
    low, high = np.percentile(drawn, INTERVAL) if len(drawn) else (means[0], means[0])
    return Estimate(float(means[0]), float(low), float(high))


def difference(means: np.ndarray, others: np.ndarray) -> tuple[Estimate, float]:
    """How much larger the first mean is, and the two-sided p-value of no difference.

    Both are [1 + R] over the same resamples.
    """
    apart = means - others
    drawn = apart[1:][np.isfinite(apart[1:])]
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    return estimate(apart), min(1.0, 2 * (1 + min(below, above)) / (1 + len(drawn)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected by Holm's step-down procedure (1979)."""
    corrected, most = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = most
    return corrected
