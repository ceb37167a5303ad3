"""The run report: one self-contained HTML page made from small numbers that the report stage gathered.

`render` is a pure function: the same ReportData gives the same text. Pictures are matplotlib SVGs inside data URIs, there is
no script, and the page forbids itself every outside source, because prompts, completions and source names are written by others.
"""

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

# Shapes: T steps, K clusters, S sources.
MAX_PANELS = 36  # small multiples; beyond, panels are too small to read and the heat map takes over
MAX_PICTURED = 40  # sources or stages in one picture; the tables have all
MAX_NUMBERED = 60  # clusters whose numbers fit below their columns
MAX_TEXT = 600  # characters shown of a prompt or completion
MAX_LABEL = 28  # characters shown of a source or variant in a picture
MAX_CURVE = 500  # points drawn per loss curve
WIDTH = 10.6  # inches of a full-width picture, 72 points each; the page is laid out for it

# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness; markers tell them apart in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4B8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, MUTED, FAINT, OLD = "#1f2933", "#66727f", "#d5dbe1", "#b9c2cb"

# svg.fonttype none: text stays text, in the reader's fonts and scripts. parse_math off: a source named "$" is not TeX.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "s2l_ray",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.7,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ecf0",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": "#9aa5b1",
    "ytick.color": "#9aa5b1",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
Best = Callable[[list[float]], float]  # min or max: which of several values of a metric is the best
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"
)  # not allowed in XML or UTF-8


@dataclass(frozen=True, kw_only=True, eq=False)
class Subset:
    """What one variant chose. `source_sizes` [S] follows ReportData.sources; None leaves the variant out of that section."""

    variant: str
    rule: str
    num_examples: int
    uri: str
    source_sizes: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LossCurve:
    """Training loss of one proxy: as many losses as steps; long curves are averaged down to MAX_CURVE points when drawn."""

    label: str
    steps: Sequence[int]
    losses: Sequence[float]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterExample:
    """One example shown on the card of its cluster; prompt and completion are trimmed by the renderer."""

    cluster: int
    example_id: int
    source: str
    prompt: str
    completion: str
    distance: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustering:
    """The clusters of one variant: trajectories, sizes, what was taken of each, and some members.

    mean, low and high are [K, T]; NaN where a cluster is empty; `band` says in words what low and high are. steps is [T],
    sizes and quotas (None: not drawn from) are [K], objective has one value per round. sources and source_sizes [S, K] are
    optional together. Raises ValueError if the shapes disagree.
    """

    variant: str
    steps: Sequence[int]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    band: str
    sizes: Sequence[int]
    quotas: Sequence[int] | None = None
    objective: Sequence[float] = ()
    sources: Sequence[str] = ()
    source_sizes: np.ndarray | None = None
    examples: Sequence[ClusterExample] = ()

    def __post_init__(self) -> None:
        shape = (len(self.sizes), len(self.steps))
        expected: dict[str, tuple[int, ...]] = {"mean": shape, "low": shape, "high": shape}
        if self.quotas is not None:
            expected["quotas"] = shape[:1]
        if self.source_sizes is not None:
            expected["source_sizes"] = (len(self.sources), shape[0])
        for name, want in expected.items():
            if (got := np.shape(getattr(self, name))) != want:
                raise ValueError(
                    f"report, clusters of {self.variant}: {name} has shape {got}, expected {want}"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class LeftOut:
    """Rows that a stage left out for one reason; `examples` are a few ids or places such as data.jsonl:17."""

    stage: str
    reason: str
    count: int
    examples: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Held-out results of one variant's target: source -> mean loss in nats, source -> exact match in 0..1.

    A source without a value is absent or None. Macro means are taken here, over the sources that every variant has.
    """

    variant: str
    num_examples: int
    target_steps: int
    losses: Mapping[str, float | None] = field(default_factory=dict)
    exact_match: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class StageCost:
    """One artifact of the plan. `seconds` and `flops` are those of making it, also where it was reused from an earlier run.

    `variant` is empty where all variants share the artifact, else the names of those that use it.
    """

    stage: str
    variant: str
    reused: bool
    rows: int | None = None
    seconds: float | None = None
    flops: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportData:
    """Everything on the page: nothing per example but a few samples. Sections whose data are empty are not shown.

    `num_examples` counts the rows of the examples artifact; sources [S] and source_sizes [S] are its sources and their rows.
    """

    run: str
    created: str
    num_examples: int
    versions: Mapping[str, str] = field(default_factory=dict)
    subsets: Sequence[Subset] = ()
    sources: Sequence[str] = ()
    source_sizes: Sequence[int] = ()
    proxies: Sequence[LossCurve] = ()
    clusterings: Sequence[Clustering] = ()
    left_out: Sequence[LeftOut] = ()
    evaluations: Sequence[Evaluation] = ()
    stages: Sequence[StageCost] = ()


class Picture(NamedTuple):
    """An SVG as a data URI and what it shows in words."""

    uri: str
    alt: str


class Cell(NamedTuple):
    """One number of a comparison, its text, and whether it is the best of its row."""

    value: float | None
    text: str
    best: bool


class Metric(NamedTuple):
    """One metric by source and variant: rows of (source, cells), the macro means and over how many sources they are."""

    title: str
    rows: list[tuple[str, list[Cell]]]
    macro: list[Cell]
    num_macro: int


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
        "duration": _duration,
        "flops": _flops,
        "clip": _clip,
    }
    variants = _variants(data)
    # One style for all pictures, set for the time of drawing; glyphs that matplotlib's own font lacks are drawn by the browser.
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        page = env.get_template("report.html.j2").render(
            data=data,
            colors={name: _color(i) for i, name in enumerate(variants)},
            seconds_now=sum(c.seconds or 0 for c in data.stages if not c.reused),
            proxy_picture=_draw_proxies(data.proxies) if data.proxies else None,
            clusterings=[_clustering_view(c) for c in data.clusterings if len(c.sizes)],
            source_picture=_draw_sources(data, variants) if _has_sources(data) else None,
            source_rows=_source_rows(data),
            metrics=_metrics(data.evaluations),
            evaluation_picture=_draw_evaluations(data.evaluations, variants)
            if _metrics(data.evaluations)
            else None,
            stage_picture=_draw_stages(data.stages) if any(c.seconds for c in data.stages) else None,
        )
    return _FORBIDDEN.sub("\ufffd", page)


# ---- Numbers and words


def _known(value: float | None) -> float | None:
    """The value as a float, or None where there is none or it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def _num(value: int | None) -> str:
    return f"{value:,}" if value is not None else "\u2013"


def _decimal(value: float | None, digits: int = 3) -> str:
    return "\u2013" if _known(value) is None else f"{value:,.{digits}f}"


def _share(part: float, whole: float) -> str:
    """part / whole in percent with three significant digits at most; a dash where there is no whole."""
    if not whole:
        return "\u2013"
    percent = 100 * part / whole
    return f"{percent:.{1 if percent >= 9.95 or percent == 0 else 2}f} %"


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "\u2013"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _flops(value: float | None) -> str:
    if not value or not math.isfinite(value):
        return "\u2013"
    power = min(max(int(math.log10(value)) // 3, 0), 8)
    return f"{value / 1000**power:,.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y')[power]}FLOP"


def _clip(text: str, limit: int = MAX_TEXT) -> str:
    text = text.replace("\r\n", "\n").strip()
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "\u2026"


def _label(text: str) -> str:
    """Text for a picture: one line, short, and only characters that XML allows."""
    return _FORBIDDEN.sub("\ufffd", _clip(" ".join(text.split()), MAX_LABEL)) or "(no name)"


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _variants(data: ReportData) -> list[str]:
    """Names of all variants in order of appearance, so that each keeps one colour and marker on the whole page."""
    named = [*(s.variant for s in data.subsets), *(e.variant for e in data.evaluations)]
    return list(dict.fromkeys([*named, *(c.variant for c in data.clusterings)]))


# ---- What the template shows, worked out


def _clustering_view(clustering: Clustering) -> dict:
    """Pictures and cards of one clustering; clusters are drawn smallest first, the order in which the rule fills quotas."""
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
        "panels": _draw_panels(clustering),
        "overview": _draw_overview(clustering),
        "objective": _draw_objective(clustering) if len(clustering.objective) else None,
        "cards": cards,
    }


def _has_sources(data: ReportData) -> bool:
    return bool(len(data.sources)) and any(s.source_sizes is not None for s in data.subsets)


def _source_rows(data: ReportData) -> list[dict]:
    """One row a source, largest first: its rows, and per subset that counts sources the rows chosen and the gain in share."""
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
    """Held-out loss and exact match, each only if some variant has it."""
    tables = [
        _metric("Held-out loss", [e.losses for e in evaluations], min),
        _metric("Exact match", [e.exact_match for e in evaluations], max),
    ]
    return [table for table in tables if table.rows]


def _metric(title: str, values: list[Mapping[str, float | None]], best: Best) -> Metric:
    """A table over the sources that some variant has a finite value for; NaN counts as no value."""
    names = dict.fromkeys(name for column in values for name in column)
    by_source = {name: [_known(column.get(name)) for column in values] for name in names}
    by_source = {name: row for name, row in by_source.items() if any(v is not None for v in row)}
    shared = [row for row in by_source.values() if None not in row]
    macro: list[float | None] = (
        [float(v) for v in np.mean(np.array(shared, dtype=float), axis=0)] if shared else [None] * len(values)
    )
    rows = [(name, _cells(row, best)) for name, row in by_source.items()]
    return Metric(title, rows, _cells(macro, best), len(shared))


def _cells(values: Sequence[float | None], best: Best) -> list[Cell]:
    """Cells of one row; values that read the same are equally good, and a lone variant is not called the best."""
    numbers = [round(v, 3) for v in values if v is not None]
    top = best(numbers) if len(numbers) > 1 else None
    return [Cell(v, _decimal(v), v is not None and round(v, 3) == top) for v in values]


# ---- Pictures


def _picture(figure: Figure, alt: str) -> Picture:
    """The figure as a data URI; an image has its own name space, so ids of two pictures cannot meet."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", dpi=144, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("'DejaVu Sans'", _FONTS)
    return Picture("data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(), alt)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _limits(*arrays: np.ndarray) -> tuple[float, float]:
    """Lower and upper end of an axis that holds all finite values, a little apart even if they are all one value."""
    values = np.concatenate([np.ravel(np.asarray(a, dtype=float)) for a in arrays])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    margin = 0.05 * float(np.ptp(values)) or 0.5
    return float(values.min()) - margin, float(values.max()) + margin


def _draw_proxies(curves: Sequence[LossCurve]) -> Picture:
    figure, axes = _axes(WIDTH, 2.8)
    for i, curve in enumerate(curves):
        group = -(-len(curve.steps) // MAX_CURVE) or 1
        starts = np.arange(0, len(curve.steps), group)
        counts = np.diff([*starts, len(curve.steps)])
        steps, losses = (
            np.add.reduceat(np.asarray(v, dtype=float), starts) / counts if len(starts) else np.zeros(0)
            for v in (curve.steps, curve.losses)
        )
        axes.plot(
            steps,
            losses,
            color=_color(i),
            label=_label(curve.label),
            marker="o" if len(starts) < 30 else "",
            markersize=3,
        )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set(xlabel="optimiser step", ylabel="training loss (nats per token)")
    axes.margins(x=0.01)
    if len(curves) > 1:
        axes.legend(loc="upper right", ncols=min(len(curves), 4))
    return _picture(figure, "Training loss of the proxy by optimiser step")


def _draw_panels(clustering: Clustering) -> Picture:
    """Mean trajectory and band of the largest clusters on one scale, each over the mean of all examples in grey."""
    sizes = np.asarray(clustering.sizes)
    shown = np.argsort(-sizes, kind="stable")[:MAX_PANELS]
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    height = (1.25 if rows > 1 else 1.6) * rows + 0.55
    figure = Figure(figsize=(WIDTH, height))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=0.05, right=0.98, top=1 - 0.28 / height, bottom=0.42 / height, hspace=0.36, wspace=0.1
    )
    filled = sizes > 0
    overall = np.average(clustering.mean[filled], axis=0, weights=sizes[filled]) if filled.any() else None
    for panel, k in zip(grid.flat, shown, strict=False):
        if overall is not None:
            panel.plot(clustering.steps, overall, color="#b4bdc7", linewidth=1, linestyle=(0, (3, 2)))
        _draw_band(panel, clustering, k)
        panel.set_title(f"{k}", loc="left", fontweight="bold", pad=3, fontsize=8.5)
        panel.set_title(f"{sizes[k]:,}", loc="right", color=MUTED, pad=3, fontsize=8)
    for unused in range(len(shown), grid.size):
        grid.flat[unused].set_axis_off()
        grid.flat[unused - columns].tick_params(labelbottom=True)
    grid[0, 0].set_ylim(*_limits(clustering.low[shown], clustering.high[shown], clustering.mean[shown]))
    grid[0, 0].margins(x=0.03)
    grid[0, 0].locator_params(axis="x", nbins=3, integer=True)
    grid[0, 0].xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    grid[0, 0].locator_params(axis="y", nbins=4)
    figure.supxlabel("proxy step", fontsize=8.5, color=MUTED, y=0.04 / height)
    figure.supylabel("loss", fontsize=8.5, color=MUTED, x=0.004)
    return _picture(figure, f"Mean loss trajectory and band of the {len(shown)} largest clusters")


def _draw_band(panel: Axes, clustering: Clustering, k: int) -> None:
    low, mean, high = clustering.low[k], clustering.mean[k], clustering.high[k]
    if len(clustering.steps) == 1:
        panel.vlines(clustering.steps, low, high, color=COLORS[5], alpha=0.6, linewidth=5)
    else:
        panel.fill_between(clustering.steps, low, high, color=COLORS[5], alpha=0.32, linewidth=0)
    panel.plot(clustering.steps, mean, color=COLORS[0], marker="o", markersize=2.2)


def _draw_overview(clustering: Clustering) -> Picture:
    """Sizes and quotas, all mean trajectories and the sources of all clusters, one column a cluster, smallest left."""
    sizes = np.asarray(clustering.sizes)
    order = np.argsort(sizes, kind="stable")
    has_sources = clustering.source_sizes is not None and len(clustering.sources) > 0
    num_sources = min(len(clustering.sources), MAX_PICTURED) if has_sources else 0
    heights = [
        1.9,
        max(1.1, min(0.16 * len(clustering.steps), 2.4)),
        *([max(0.7, 0.17 * num_sources)] if has_sources else []),
    ]
    figure = Figure(
        figsize=(WIDTH, sum(heights) + 0.75 + 0.3 * len(heights)), layout=ConstrainedLayoutEngine(h_pad=0.07)
    )
    grid = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights, width_ratios=[1, 0.011])
    _draw_sizes(grid[0, 0], clustering, order)
    grid[0, 1].set_axis_off()
    image = grid[1, 0].imshow(
        clustering.mean[order].T, aspect="auto", cmap="viridis", interpolation="nearest"
    )
    _style_heat(
        grid[1, 0], grid[1, 1], image, "Mean loss by proxy step", [f"{s:,}" for s in clustering.steps]
    )
    if has_sources:
        counts = np.asarray(clustering.source_sizes, dtype=float)
        top = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:num_sources])
        top = top[np.argsort(-counts[top].sum(axis=1), kind="stable")]
        within = 100 * counts[top] / np.maximum(counts[top].sum(axis=1, keepdims=True), 1)
        positive = within[within > 0]
        norm = (
            LogNorm(max(float(positive.max()) / 1000, float(positive.min())) * 0.999, float(positive.max()))
            if len(positive)
            else None
        )
        image = grid[2, 0].imshow(
            np.ma.masked_less_equal(within[:, order], 0),
            aspect="auto",
            cmap="YlGnBu",
            norm=norm,
            interpolation="nearest",
        )
        labels = [_label(clustering.sources[s]) for s in top]
        _style_heat(
            grid[2, 0],
            grid[2, 1],
            image,
            "Where each source lies: its examples by cluster, in percent",
            labels,
        )
    for axes in grid[:, 0]:
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_xticks([])
    if len(sizes) <= MAX_NUMBERED:
        grid[-1, 0].set_xticks(range(len(sizes)), [str(k) for k in order], fontsize=7)
    grid[-1, 0].set_xlabel("clusters, smallest first")
    return _picture(figure, "Sizes, quotas, mean losses and sources of all clusters, smallest first")


def _draw_sizes(axes: Axes, clustering: Clustering, order: np.ndarray) -> None:
    """Bars of sizes with the quotas inside, on a log scale; one path each, so that K = 3000 stays small."""
    gap = 0.1 if len(order) <= 150 else 0.0
    edges = np.stack([np.arange(len(order)) - 0.5 + gap, np.arange(len(order)) + 0.5 - gap], axis=1).ravel()
    for counts, color, label in (
        (clustering.sizes, FAINT, "cluster size"),
        (clustering.quotas, COLORS[0], "taken"),
    ):
        if counts is not None:
            bars = np.full(2 * len(order) - 1, np.nan)
            bars[::2] = np.asarray(counts, dtype=float)[order]
            bars[bars < 1] = np.nan
            axes.stairs(bars, edges, baseline=0.7, fill=True, color=color, linewidth=0, label=label)
    axes.set_yscale("log")
    axes.minorticks_off()
    largest = max(2, int(np.max(clustering.sizes)))
    axes.set_ylim(0.7, largest * (largest / 0.7) ** 0.22)  # room for the legend above the highest bar
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="x", visible=False)
    axes.set_title("Cluster sizes and quotas, log scale", loc="left")
    axes.legend(loc="upper left", ncols=2)


def _style_heat(axes: Axes, bar: Axes, image: AxesImage, title: str, labels: list[str]) -> None:
    """A heat map's title, its rows' labels (thinned to 20 where there are more than 40) and its colour bar."""
    every = 1 if len(labels) <= MAX_PICTURED else -(-len(labels) // 20)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=7.5)
    axes.set_title(title, loc="left")
    axes.grid(visible=False)
    axes.set_facecolor("#f4f6f8")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    ticks = None
    if isinstance(image.norm, LogNorm):  # powers of ten only, unless so narrow a scale might hold none
        wide = (image.norm.vmax or 1) > 30 * (image.norm.vmin or 1)
        ticks = LogLocator(subs=(1,) if wide else (1, 2, 5))
    colorbar = axes.figure.colorbar(image, cax=bar, ticks=ticks, format=lambda value, _: f"{value:g}")
    colorbar.minorticks_off()
    colorbar.outline.set_visible(False)
    bar.grid(visible=False)
    bar.tick_params(labelsize=7.5)


def _draw_objective(clustering: Clustering) -> Picture:
    figure, axes = _axes(WIDTH, 1.9)
    rounds = np.arange(1, len(clustering.objective) + 1)
    axes.plot(rounds, clustering.objective, color=COLORS[0], marker="o", markersize=3)
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.set(xlabel="round", ylabel="sum of squared distances")
    return _picture(figure, "k-means objective by round")


def _draw_sources(data: ReportData, variants: list[str]) -> Picture:
    """Share of every source in the data and in each subset, joined by a line; log scale, as the rare sources are the point."""
    sizes = np.asarray(data.source_sizes, dtype=float)
    order = np.argsort(-sizes, kind="stable")[:MAX_PICTURED][::-1]
    marks = [("all data", INK, "|", sizes)]
    for subset in data.subsets:
        counts = np.asarray(subset.source_sizes, dtype=float)
        if subset.source_sizes is not None and not np.array_equal(
            counts, sizes
        ):  # all rows: the same mark again
            i = variants.index(subset.variant)
            marks.append((subset.variant, _color(i), MARKERS[i % len(MARKERS)], counts))
    shares = np.stack([100 * counts[order] / max(counts.sum(), 1) for *_, counts in marks])
    floor = 0.5 * float(shares[shares > 0].min()) if (shares > 0).any() else 0.1
    drawn = np.maximum(shares, floor)
    figure, axes = _axes(WIDTH, 0.21 * len(order) + 1.0)
    axes.hlines(range(len(order)), drawn.min(axis=0), drawn.max(axis=0), color=FAINT, linewidth=1.5, zorder=1)
    for (_, color, marker, _), share, places in zip(marks, shares, drawn, strict=True):
        for y, (value, x) in enumerate(zip(share, places, strict=True)):
            _draw_mark(axes, x, y, color, marker, hollow=value == 0)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * drawn.min(), min(1.25 * drawn.max(), 106))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # powers of ten alone may all lie outside
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.minorticks_off()
    axes.set_yticks(range(len(order)), [_label(data.sources[s]) for s in order])
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlabel("share, log scale" + (" (hollow: none)" if (shares == 0).any() else ""))
    _legend_above(figure, [(name, color, marker) for name, color, marker, _ in marks])
    return _picture(figure, "Share of each source in the data and in the subsets")


def _draw_mark(axes: Axes, x: float, y: float, color: str, marker: str, *, hollow: bool = False) -> None:
    """One point of a variant; the bar that stands for all data is taller than the marks, to be seen behind them."""
    size, edge = (14.0, 2.0) if marker == "|" else (6.6, 0.8)
    edge_color = color if hollow or marker == "|" else "white"
    face = "white" if hollow else color
    axes.plot(
        x, y, marker, color=face, markersize=size, markeredgecolor=edge_color, markeredgewidth=edge, zorder=3
    )


def _legend_above(figure: Figure, entries: list[tuple[str, str, str]]) -> None:
    """A legend over the whole width; its markers are filled whatever the first point looks like."""
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            color=color,
            markersize=9 if marker == "|" else 5.5,
            markeredgewidth=2 if marker == "|" else 1,
            label=_label(name),
        )
        for name, color, marker in entries
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 6), handletextpad=0.2)


def _draw_evaluations(evaluations: Sequence[Evaluation], variants: list[str]) -> Picture:
    """One panel a metric, one line a source with a marker per variant, the macro mean on top."""
    metrics = _metrics(evaluations)
    names = list(dict.fromkeys(name for metric in metrics for name, _ in metric.rows))[: MAX_PICTURED - 1]
    figure = Figure(figsize=(WIDTH, 0.21 * (len(names) + 1) + 1.0), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    places = {name: len(names) - 1 - i for i, name in enumerate(names)}
    for panel, metric in zip(panels, metrics, strict=True):
        rows = [(places[name], cells) for name, cells in metric.rows if name in places]
        rows.append((len(names), metric.macro))
        for y, cells in rows:
            _draw_results(panel, y, cells, [variants.index(e.variant) for e in evaluations])
        panel.axhline(len(names) - 0.5, color="#9aa5b1", linewidth=0.7)
        panel.set_title(metric.title, loc="left")
        panel.margins(x=0.04)
    panels[0].set_yticks([*places.values(), len(names)], [*map(_label, names), "macro mean"])
    panels[0].set_ylim(-0.7, len(names) + 0.6)
    index = [variants.index(e.variant) for e in evaluations]
    _legend_above(figure, [(variants[i], _color(i), MARKERS[i % len(MARKERS)]) for i in index])
    return _picture(figure, "Held-out results of the variants by source")


def _draw_results(panel: Axes, y: int, cells: Sequence[Cell], index: Sequence[int]) -> None:
    points = [(c.value, i) for c, i in zip(cells, index, strict=True) if c.value is not None]
    if points:
        values = [x for x, _ in points]
        panel.hlines(y, min(values), max(values), color=FAINT, linewidth=1.5, zorder=1)
    for x, i in points:
        _draw_mark(panel, x, y, _color(i), MARKERS[i % len(MARKERS)])


def _draw_stages(stages: Sequence[StageCost]) -> Picture:
    timed = [(cost, cost.seconds) for cost in stages if cost.seconds]
    least = sorted(seconds for _, seconds in timed)[-MAX_PICTURED:][0]
    shown = [(cost, seconds) for cost, seconds in timed if seconds >= least][::-1]
    figure, axes = _axes(WIDTH, 0.23 * len(shown) + 0.9)
    for y, (cost, seconds) in enumerate(shown):
        axes.barh(y, seconds, height=0.68, color=OLD if cost.reused else COLORS[0])
        axes.annotate(
            _duration(seconds),
            (seconds, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=MUTED,
        )
    labels = [_label(" \u00b7 ".join(filter(None, (cost.stage, cost.variant)))) for cost, _ in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlim(0, 1.12 * max(seconds for _, seconds in shown))
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("seconds")
    _legend_above(figure, [("made in this run", COLORS[0], "s"), ("reused", OLD, "s")])
    return _picture(figure, "Seconds per stage")
