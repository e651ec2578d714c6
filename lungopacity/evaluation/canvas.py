"""Common parts of all figures: size, colours, title, footer, and writing to a file.

pyplot is not used: plain figure objects share no state between threads and need no closing.
"""

from __future__ import annotations

import io
import textwrap
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lungopacity.errors import NOTICE

_DPI = 100
WIDTH_INCHES = 8.0

# From the palette of Okabe & Ito 2008 (Color Universal Design), those that stand out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
GREY = "#595959"


def new_figure(title: str, note: str, height_inches: float = 7.5) -> Figure:
    """An empty figure with its title and the notice; constrained layout keeps plots off both."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=_DPI)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    figure.suptitle(plain(textwrap.fill(title, 70)), fontsize=13, fontweight="bold")
    foot = f"{NOTICE} · {note}" if note else NOTICE
    figure.supxlabel(plain(textwrap.fill(foot, 110)), x=0.01, ha="left", fontsize=9, color=GREY)
    return figure


def describe(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Set the title and axis labels of one plot."""
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.tick_params(labelsize=10)


def line(index: int) -> dict[str, Any]:
    """Colour and dash of the curve of class `index`: no two of the first four share either."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "linewidth": 2,
    }


def short(name: str) -> str:
    """A name cut to 28 letters for a legend. Both ends are kept, because names may differ there."""
    return plain(name if len(name) <= 28 else f"{name[:15]}…{name[-12:]}")


def wrapped(name: str) -> str:
    """A name in lines of about 18 letters, broken at spaces, hyphens or underscores."""
    return plain(textwrap.fill(name.replace("_", "_ "), 18).replace("_ ", "_"))


def plain(text: str) -> str:
    """The text with dollar signs escaped: matplotlib reads text between two of them as maths."""
    return text.replace("$", r"\$")


def figure_png(figure: Figure) -> bytes:
    """The figure as a PNG file, 800 pixels wide."""
    sink = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(sink, format="png", dpi=_DPI)
    return sink.getvalue()


def figure_svg(figure: Figure) -> bytes:
    """The figure as an SVG file that keeps text as text. The same figure gives the same bytes."""
    sink = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lungopacity"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()
