"""The pictures of the report page: matplotlib SVGs in data URIs, from the numbers in data.py."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from s2l_ray.core.report.data import (
    Cell,
    Clustering,
    LossCurve,
    Metric,
    ReportData,
    StageCost,
    duration,
    label_of,
)
from s2l_ray.core.report.drawing import (
    COLORS,
    FAINT,
    INK,
    MARKERS,
    MUTED,
    OLD,
    WIDTH,
    Picture,
    as_picture,
    axis_limits,
    color_of,
    new_axes,
)

# Small multiples; beyond, panels are too small to read and the heat map takes over.
MAX_PANELS = 36
# Sources or stages in one picture; the tables have all.
MAX_PICTURED = 40
# Clusters whose numbers fit below their columns.
MAX_NUMBERED = 60
# Points drawn per loss curve.
MAX_CURVE = 500


def draw_proxies(curves: Sequence[LossCurve]) -> Picture:
    """Loss by step of every proxy; a long curve is averaged down to MAX_CURVE points."""
    figure, axes = new_axes(WIDTH, 2.8)
    for i, curve in enumerate(curves):
        group = -(-len(curve.steps) // MAX_CURVE) or 1
        starts = np.arange(0, len(curve.steps), group)
        counts = np.diff([*starts, len(curve.steps)])
        steps, losses = (
            np.add.reduceat(np.asarray(v, dtype=float), starts) / counts
            if len(starts)
            else np.zeros(0)
            for v in (curve.steps, curve.losses)
        )
        marker = "o" if len(starts) < 30 else ""
        axes.plot(
            steps,
            losses,
            color=color_of(i),
            label=label_of(curve.label),
            marker=marker,
            markersize=3,
        )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set(xlabel="optimiser step", ylabel="training loss (nats per token)")
    axes.margins(x=0.01)
    if len(curves) > 1:
        axes.legend(loc="upper right", ncols=min(len(curves), 4))
    return as_picture(figure, "Training loss of the proxy by optimiser step")


def draw_panels(clustering: Clustering) -> Picture:
    """Mean trajectory and band of the largest clusters, over the mean of all examples in grey."""
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
    overall = (
        np.average(clustering.mean[filled], axis=0, weights=sizes[filled]) if filled.any() else None
    )
    for panel, k in zip(grid.flat, shown, strict=False):
        if overall is not None:
            panel.plot(
                clustering.steps, overall, color="#b4bdc7", linewidth=1, linestyle=(0, (3, 2))
            )
        _draw_band(panel, clustering, k)
        panel.set_title(f"{k}", loc="left", fontweight="bold", pad=3, fontsize=8.5)
        panel.set_title(f"{sizes[k]:,}", loc="right", color=MUTED, pad=3, fontsize=8)
    for unused in range(len(shown), grid.size):
        grid.flat[unused].set_axis_off()
        grid.flat[unused - columns].tick_params(labelbottom=True)
    grid[0, 0].set_ylim(
        *axis_limits(clustering.low[shown], clustering.high[shown], clustering.mean[shown])
    )
    grid[0, 0].margins(x=0.03)
    grid[0, 0].locator_params(axis="x", nbins=3, integer=True)
    grid[0, 0].xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    grid[0, 0].locator_params(axis="y", nbins=4)
    figure.supxlabel("proxy step", fontsize=8.5, color=MUTED, y=0.04 / height)
    figure.supylabel(clustering.feature, fontsize=8.5, color=MUTED, x=0.004)
    return as_picture(
        figure, f"Mean {clustering.feature} by step and band of the {len(shown)} largest clusters"
    )


def _draw_band(panel: Axes, clustering: Clustering, k: int) -> None:
    low, mean, high = clustering.low[k], clustering.mean[k], clustering.high[k]
    if len(clustering.steps) == 1:
        panel.vlines(clustering.steps, low, high, color=COLORS[5], alpha=0.6, linewidth=5)
    else:
        panel.fill_between(clustering.steps, low, high, color=COLORS[5], alpha=0.32, linewidth=0)
    panel.plot(clustering.steps, mean, color=COLORS[0], marker="o", markersize=2.2)


def draw_overview(clustering: Clustering) -> Picture:
    """Sizes, quotas, mean trajectories and sources; one column a cluster, the smallest left."""
    sizes = np.asarray(clustering.sizes)
    order = np.argsort(sizes, kind="stable")
    has_sources = clustering.source_sizes is not None and len(clustering.sources) > 0
    heights = [1.9, max(1.1, min(0.16 * len(clustering.steps), 2.4))]
    if has_sources:
        heights.append(max(0.7, 0.17 * min(len(clustering.sources), MAX_PICTURED)))
    figure = Figure(
        figsize=(WIDTH, sum(heights) + 0.75 + 0.3 * len(heights)),
        layout=ConstrainedLayoutEngine(h_pad=0.07),
    )
    grid = figure.subplots(
        len(heights), 2, squeeze=False, height_ratios=heights, width_ratios=[1, 0.011]
    )
    _draw_sizes(grid[0, 0], clustering, order)
    grid[0, 1].set_axis_off()
    image = grid[1, 0].imshow(
        clustering.mean[order].T, aspect="auto", cmap="viridis", interpolation="nearest"
    )
    steps = [f"{s:,}" for s in clustering.steps]
    _style_heat(grid[1, 0], grid[1, 1], image, f"Mean {clustering.feature} by proxy step", steps)
    if has_sources:
        _draw_places(grid[2, 0], grid[2, 1], clustering, order)
    for axes in grid[:, 0]:
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_xticks([])
    if len(sizes) <= MAX_NUMBERED:
        grid[-1, 0].set_xticks(range(len(sizes)), [str(k) for k in order], fontsize=7)
    grid[-1, 0].set_xlabel("clusters, smallest first")
    return as_picture(figure, "Sizes, quotas, means and sources of all clusters, smallest first")


def _draw_sizes(axes: Axes, clustering: Clustering, order: np.ndarray) -> None:
    """Bars of sizes with quotas inside, on a log scale; one path each keeps K = 3000 small."""
    gap = 0.1 if len(order) <= 150 else 0.0
    edges = np.stack(
        [np.arange(len(order)) - 0.5 + gap, np.arange(len(order)) + 0.5 - gap], axis=1
    ).ravel()
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
    # room for the legend above the highest bar
    axes.set_ylim(0.7, largest * (largest / 0.7) ** 0.22)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="x", visible=False)
    axes.set_title("Cluster sizes and quotas, log scale", loc="left")
    axes.legend(loc="upper left", ncols=2)


def _draw_places(axes: Axes, bar: Axes, clustering: Clustering, order: np.ndarray) -> None:
    """Heat map of the largest sources over the clusters, in percent of a source's examples."""
    counts = np.asarray(clustering.source_sizes, dtype=float)
    top = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:MAX_PICTURED])
    top = top[np.argsort(-counts[top].sum(axis=1), kind="stable")]
    within = 100 * counts[top] / np.maximum(counts[top].sum(axis=1, keepdims=True), 1)
    positive, norm = within[within > 0], None
    if len(positive):
        least, most = float(positive.min()), float(positive.max())
        norm = LogNorm(max(most / 1000, least) * 0.999, most)
    shares = np.ma.masked_less_equal(within[:, order], 0)
    image = axes.imshow(shares, aspect="auto", cmap="YlGnBu", norm=norm, interpolation="nearest")
    labels = [label_of(clustering.sources[s]) for s in top]
    _style_heat(
        axes, bar, image, "Where each source lies: its examples by cluster, in percent", labels
    )


def _style_heat(axes: Axes, bar: Axes, image: AxesImage, title: str, labels: list[str]) -> None:
    """A heat map's title, colour bar, and labels of rows: 20 where there are more than 40."""
    every = 1 if len(labels) <= MAX_PICTURED else -(-len(labels) // 20)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=7.5)
    axes.set_title(title, loc="left")
    axes.grid(visible=False)
    axes.set_facecolor("#f4f6f8")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    ticks = None
    # powers of ten only, unless so narrow a scale might hold none
    if isinstance(image.norm, LogNorm):
        wide = (image.norm.vmax or 1) > 30 * (image.norm.vmin or 1)
        ticks = LogLocator(subs=(1,) if wide else (1, 2, 5))
    colorbar = axes.figure.colorbar(
        image, cax=bar, ticks=ticks, format=lambda value, _: f"{value:g}"
    )
    colorbar.minorticks_off()
    colorbar.outline.set_visible(False)
    bar.grid(visible=False)
    bar.tick_params(labelsize=7.5)


def draw_objective(clustering: Clustering) -> Picture:
    """The sum of squared distances after each round of k-means."""
    figure, axes = new_axes(WIDTH, 1.9)
    rounds = np.arange(1, len(clustering.objective) + 1)
    axes.plot(rounds, clustering.objective, color=COLORS[0], marker="o", markersize=3)
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.set(xlabel="round", ylabel="sum of squared distances")
    return as_picture(figure, "k-means objective by round")


def draw_sources(data: ReportData, variants: list[str]) -> Picture:
    """Share of every source in the data and in each subset; on a log scale, for the rare ones."""
    sizes = np.asarray(data.source_sizes, dtype=float)
    order = np.argsort(-sizes, kind="stable")[:MAX_PICTURED][::-1]
    marks = [("all data", INK, "|", sizes)]
    for subset in data.subsets:
        counts = np.asarray(subset.source_sizes, dtype=float)
        # A subset of all rows would be the same mark again.
        if subset.source_sizes is not None and not np.array_equal(counts, sizes):
            i = variants.index(subset.variant)
            marks.append((subset.variant, color_of(i), MARKERS[i % len(MARKERS)], counts))
    shares = np.stack([100 * counts[order] / max(counts.sum(), 1) for *_, counts in marks])
    floor = 0.5 * float(shares[shares > 0].min()) if (shares > 0).any() else 0.1
    drawn = np.maximum(shares, floor)
    figure, axes = new_axes(WIDTH, 0.21 * len(order) + 1.0)
    axes.hlines(
        range(len(order)),
        drawn.min(axis=0),
        drawn.max(axis=0),
        color=FAINT,
        linewidth=1.5,
        zorder=1,
    )
    for (_, color, marker, _), share, places in zip(marks, shares, drawn, strict=True):
        for y, (value, x) in enumerate(zip(share, places, strict=True)):
            _draw_mark(axes, x, y, color, marker, hollow=value == 0)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * drawn.min(), min(1.25 * drawn.max(), 106))
    # powers of ten alone may all lie outside
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.minorticks_off()
    axes.set_yticks(range(len(order)), [label_of(data.sources[s]) for s in order])
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlabel("share, log scale" + (" (hollow: none)" if (shares == 0).any() else ""))
    _legend_above(figure, [(name, color, marker) for name, color, marker, _ in marks])
    return as_picture(figure, "Share of each source in the data and in the subsets")


def _draw_mark(
    axes: Axes, x: float, y: float, color: str, marker: str, *, hollow: bool = False
) -> None:
    """One point of a variant; the bar of all data is taller, to be seen behind the marks."""
    size, edge = (14.0, 2.0) if marker == "|" else (6.6, 0.8)
    edge_color = color if hollow or marker == "|" else "white"
    face = "white" if hollow else color
    axes.plot(
        x,
        y,
        marker,
        color=face,
        markersize=size,
        markeredgecolor=edge_color,
        markeredgewidth=edge,
        zorder=3,
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
            label=label_of(name),
        )
        for name, color, marker in entries
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(len(handles), 6), handletextpad=0.2
    )


def draw_evaluations(
    metrics: Sequence[Metric], evaluated: list[str], variants: list[str]
) -> Picture:
    """One panel a metric, one line a source with a marker per variant, the macro mean on top.

    `evaluated` names the variant of each cell of a row; its place in `variants` gives colour and
    marker.
    """
    names = list(dict.fromkeys(name for metric in metrics for name, _ in metric.rows))[
        : MAX_PICTURED - 1
    ]
    figure = Figure(figsize=(WIDTH, 0.21 * (len(names) + 1) + 1.0), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    index = [variants.index(name) for name in evaluated]
    places = {name: len(names) - 1 - i for i, name in enumerate(names)}
    for panel, metric in zip(panels, metrics, strict=True):
        rows = [(places[name], cells) for name, cells in metric.rows if name in places]
        rows.append((len(names), metric.macro))
        for y, cells in rows:
            _draw_results(panel, y, cells, index)
        panel.axhline(len(names) - 0.5, color="#9aa5b1", linewidth=0.7)
        panel.set_title(metric.title, loc="left")
        panel.margins(x=0.04)
    panels[0].set_yticks([*places.values(), len(names)], [*map(label_of, names), "macro mean"])
    panels[0].set_ylim(-0.7, len(names) + 0.6)
    _legend_above(figure, [(variants[i], color_of(i), MARKERS[i % len(MARKERS)]) for i in index])
    return as_picture(figure, "Held-out results of the variants by source")


def _draw_results(panel: Axes, y: int, cells: Sequence[Cell], index: Sequence[int]) -> None:
    points = [(c.value, i) for c, i in zip(cells, index, strict=True) if c.value is not None]
    if points:
        values = [x for x, _ in points]
        panel.hlines(y, min(values), max(values), color=FAINT, linewidth=1.5, zorder=1)
    for x, i in points:
        _draw_mark(panel, x, y, color_of(i), MARKERS[i % len(MARKERS)])


def draw_stages(stages: Sequence[StageCost]) -> Picture:
    """Bars of the seconds of the longest stages; at least one stage has seconds."""
    timed = [(cost, cost.seconds) for cost in stages if cost.seconds]
    least = sorted(seconds for _, seconds in timed)[-MAX_PICTURED:][0]
    shown = [(cost, seconds) for cost, seconds in timed if seconds >= least][::-1]
    figure, axes = new_axes(WIDTH, 0.23 * len(shown) + 0.9)
    for y, (cost, seconds) in enumerate(shown):
        axes.barh(y, seconds, height=0.68, color=OLD if cost.reused else COLORS[0])
        text = duration(seconds)
        axes.annotate(
            text,
            (seconds, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=MUTED,
        )
    labels = [
        label_of(" \u00b7 ".join(filter(None, (cost.stage, cost.variant)))) for cost, _ in shown
    ]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlim(0, 1.12 * max(seconds for _, seconds in shown))
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("seconds")
    _legend_above(figure, [("made in this run", COLORS[0], "s"), ("reused", OLD, "s")])
    return as_picture(figure, "Seconds per stage")
