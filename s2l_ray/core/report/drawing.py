"""Style, colours and axes of all pictures, and how a figure becomes an image of the page.

Draw inside `drawing()`. The same numbers give the same bytes: no date, and a fixed salt for ids.
"""

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Inches of a full-width picture, 72 points each; the page is laid out for it.
WIDTH = 10.6

# Okabe and Ito's colours differ under common kinds of colour blindness; markers differ in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4B8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, MUTED, FAINT, OLD = "#1f2933", "#66727f", "#d5dbe1", "#b9c2cb"

# svg.fonttype none: text stays text, in the reader's fonts and scripts.
# parse_math off: a source named "$" is not TeX.
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
    **dict.fromkeys(("xtick.color", "ytick.color"), "#9aa5b1"),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 3),
    **dict.fromkeys(("xtick.major.width", "ytick.major.width"), 0.7),
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Picture(NamedTuple):
    """An SVG as a data URI and what it shows in words."""

    uri: str
    alt: str


@contextmanager
def drawing() -> Iterator[None]:
    """One style for all pictures; the browser draws glyphs that matplotlib's own font lacks."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def color_of(index: int) -> str:
    """The colour of the variant or curve at this place; they repeat after seven."""
    return COLORS[index % len(COLORS)]


def as_picture(figure: Figure, alt: str) -> Picture:
    """The figure as a data URI: an image has its own name space, so ids of two cannot meet."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        dpi=144,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("'DejaVu Sans'", _FONTS)
    return Picture("data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(), alt)


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def axis_limits(*arrays: np.ndarray) -> tuple[float, float]:
    """Lower and upper end of an axis that holds all finite values; never equal."""
    values = np.concatenate([np.ravel(np.asarray(a, dtype=float)) for a in arrays])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    margin = 0.05 * float(np.ptp(values)) or 0.5
    return float(values.min()) - margin, float(values.max()) + margin
