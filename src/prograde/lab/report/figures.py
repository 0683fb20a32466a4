"""The style of all figures.

Colours are those of Okabe and Ito: colour-blind readers can tell them apart.
"""

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from prograde.lab.report import Figure

matplotlib.use("Agg")

BLACK, ORANGE, GREEN, BLUE = "#000000", "#D55E00", "#009E73", "#0072B2"
PINK, YELLOW, SKY, GREY = "#CC79A7", "#E69F00", "#56B4E9", "#777777"

STYLE: Any = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "prograde",
    "svg.fonttype": "path",
}


def svg(figure: Figure) -> str:
    """Draws a figure as SVG text. The same records give the same bytes."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(layout="constrained")
        figure.draw(canvas)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def legend_below(canvas: Canvas, axes: Any, columns: int | None = None) -> None:
    """Draws one legend for all panels, below them, in at most so many columns."""
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), columns or len(labels)),
        fontsize=9,
        handlelength=3.5,
    )
