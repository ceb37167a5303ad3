"""The run report: one self-contained HTML page from small numbers that the report stage gathered.

`render` is a pure function: the same ReportData gives the same text. Pictures are SVGs inside
data URIs and there is no script. The page forbids itself every outside source, because prompts,
completions and source names are written by others.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from s2l_ray.core.report.data import (
    ALL,
    FORBIDDEN,
    Cell,
    Clustering,
    Evaluation,
    Metric,
    ReportData,
    clip,
    duration,
)
from s2l_ray.core.report.drawing import color_of, drawing
from s2l_ray.core.report.pictures import (
    MAX_PANELS,
    draw_evaluations,
    draw_objective,
    draw_overview,
    draw_panels,
    draw_proxies,
    draw_sources,
    draw_stages,
)

# clusters in the table of what moved
MAX_MOVES = 12
# metrics in the picture
MAX_METRICS = 4
TITLES = {
    "loss": "Held-out loss",
    "exact": "Exact match",
    "published": "Published rules",
    "numeric": "Numeric",
    "math_verify": "Math-Verify",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "bert_score": "BERTScore",
}
# min or max: which of several values of a metric is the best
Best = Callable[[list[float]], float]


def render(data: ReportData) -> str:
    """The page as one string of HTML, UTF-8 when written; it needs no other file and no network."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "num": _num,
        "decimal": _decimal,
        "share": _share,
        "duration": duration,
        "flops": _flops,
        "clip": clip,
        "title_of": title_of,
    }
    variants = _variants(data)
    metrics, evaluated = _metrics(data.evaluations), [e.variant for e in data.evaluations]
    with drawing():
        page = env.get_template("page.html.j2").render(
            data=data,
            colors={name: color_of(i) for i, name in enumerate(variants)},
            seconds_now=sum(c.seconds or 0 for c in data.stages if not c.reused),
            proxy_picture=draw_proxies(data.proxies) if data.proxies else None,
            clusterings=[_clustering_view(c) for c in data.clusterings if len(c.sizes)],
            source_picture=draw_sources(data, variants) if _has_sources(data) else None,
            source_rows=_source_rows(data),
            metrics=metrics,
            evaluation_picture=draw_evaluations(metrics[:MAX_METRICS], evaluated, variants)
            if metrics
            else None,
            stage_picture=draw_stages(data.stages) if any(c.seconds for c in data.stages) else None,
        )
    return FORBIDDEN.sub("\ufffd", page)


# ---- Numbers and words


def _known(value: float | None) -> float | None:
    """The value as a float, or None where there is none or it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def _num(value: int | None) -> str:
    return f"{value:,}" if value is not None else "\u2013"


def _decimal(value: float | None, digits: int = 3) -> str:
    return "\u2013" if _known(value) is None else f"{value:,.{digits}f}"


def _share(part: float, whole: float) -> str:
    """part / whole in percent, three significant digits at most; a dash where there is no whole."""
    if not whole:
        return "\u2013"
    percent = 100 * part / whole
    return f"{percent:.{1 if percent >= 9.95 or percent == 0 else 2}f} %"


def _flops(value: float | None) -> str:
    if not value or not math.isfinite(value):
        return "\u2013"
    power = min(max(int(math.log10(value)) // 3, 0), 8)
    return f"{value / 1000**power:,.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y')[power]}FLOP"


def _variants(data: ReportData) -> list[str]:
    """Names of all variants in order of appearance.

    So each keeps one colour and marker on the whole page.
    """
    named = [*(s.variant for s in data.subsets), *(e.variant for e in data.evaluations)]
    return list(dict.fromkeys([*named, *(c.variant for c in data.clusterings)]))


# ---- What the template shows, worked out


def _clustering_view(clustering: Clustering) -> dict:
    """Pictures and cards of one clustering.

    Clusters are drawn smallest first, the order in which the rule fills quotas.
    """
    sizes = np.asarray(clustering.sizes)
    quotas = None if clustering.quotas is None else np.asarray(clustering.quotas)
    cards = []
    for k in np.argsort(sizes, kind="stable"):
        if examples := [e for e in clustering.examples if e.cluster == k]:
            first, last = clustering.mean[k, 0], clustering.mean[k, -1]
            quota = None if quotas is None else int(quotas[k])
            cards.append(
                {
                    "cluster": int(k),
                    "size": int(sizes[k]),
                    "quota": quota,
                    "first": first,
                    "last": last,
                    "examples": examples,
                }
            )
    return {
        "clustering": clustering,
        "num_clusters": len(sizes),
        "num_panels": min(len(sizes), MAX_PANELS),
        "num_whole": None if quotas is None else int(((quotas == sizes) & (sizes > 0)).sum()),
        "num_taken": None if quotas is None else int(quotas.sum()),
        "num_members": int(sizes.sum()),
        "panels": draw_panels(clustering),
        "overview": draw_overview(clustering),
        "objective": draw_objective(clustering) if len(clustering.objective) else None,
        "cards": cards,
        "moves": _moves(clustering),
    }


def _moves(clustering: Clustering) -> list[dict]:
    """The clusters whose centroids went furthest, the first of equals first."""
    moved = clustering.moved
    if moved is None:
        return []
    order = np.argsort(-np.asarray(moved.shifts, dtype=float), kind="stable")[:MAX_MOVES]
    return [
        {
            "cluster": int(k),
            "base": moved.base_sizes[k],
            "before": moved.before[k],
            "size": clustering.sizes[k],
            "shift": moved.shifts[k],
        }
        for k in order
    ]


def _has_sources(data: ReportData) -> bool:
    return bool(len(data.sources)) and any(s.source_sizes is not None for s in data.subsets)


def _source_rows(data: ReportData) -> list[dict]:
    """One row a source, largest first.

    It holds the source's rows and, per subset that counts sources, the rows chosen and the gain
    in share.
    """
    total = sum(data.source_sizes)
    rows = []
    for s in np.argsort(-np.asarray(data.source_sizes, dtype=np.int64), kind="stable"):
        size, chosen = int(data.source_sizes[s]), []
        for subset in data.subsets:
            if subset.source_sizes is not None:
                count, budget = int(subset.source_sizes[s]), sum(subset.source_sizes)
                gain = count / budget / (size / total) if budget and size else None
                chosen.append({"count": count, "budget": budget, "gain": gain})
        rows.append({"source": data.sources[s], "size": size, "chosen": chosen})
    return rows


def _metrics(evaluations: Sequence[Evaluation]) -> list[Metric]:
    """Held-out loss and scores, each only if some variant has it."""
    names = dict.fromkeys(name for e in evaluations for name in e.metrics)
    tables = [_metric(name, evaluations) for name in names]
    return [table for table in tables if table.rows]


def title_of(metric: str) -> str:
    return TITLES.get(metric, metric)


def _metric(metric: str, evaluations: Sequence[Evaluation]) -> Metric:
    """A table over the sources that some variant has a finite value for; NaN counts as no value."""
    best: Best = min if metric == "loss" else max
    values = [e.metrics.get(metric, {}) for e in evaluations]
    ends = [e.intervals.get(metric, {}) for e in evaluations]
    names = dict.fromkeys(name for column in values for name in column)
    by_source = {name: [_known(column.get(name)) for column in values] for name in names}
    by_source = {name: row for name, row in by_source.items() if any(v is not None for v in row)}
    shared = [row for row in by_source.values() if None not in row]
    macro: list[float | None] = (
        [float(v) for v in np.mean(np.array(shared, dtype=float), axis=0)]
        if shared
        else [None] * len(values)
    )
    rows = [
        (name, _cells(row, best, [own.get(name) for own in ends]))
        for name, row in by_source.items()
    ]
    all_shared = len(shared) == len(by_source)
    of_macro = [own.get(ALL) if all_shared else None for own in ends]
    return Metric(title_of(metric), rows, _cells(macro, best, of_macro), len(shared))


def _cells(
    values: Sequence[float | None], best: Best, ends: Sequence[tuple[float, float] | None]
) -> list[Cell]:
    """Cells of one row.

    Values that read the same are equally good, and a lone variant is not called the best.
    """
    numbers = [round(v, 3) for v in values if v is not None]
    top = best(numbers) if len(numbers) > 1 else None
    return [
        Cell(
            v,
            _decimal(v),
            v is not None and round(v, 3) == top,
            "" if own is None else f"{own[0]:.3f} to {own[1]:.3f}",
        )
        for v, own in zip(values, ends, strict=True)
    ]
