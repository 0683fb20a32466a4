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


def bars(
    axes: Any,
    names: list[str],
    values: list[float],
    label: str,
    form: str,
    colours: dict[str, str],
    room: float = 1.25,
) -> None:
    """Draws a horizontal bar for each name, the first on top, with its value beside it.

    Names without a colour are blue. The axis ends at `room` times the largest value.
    """
    axes.barh(names, values, color=[colours.get(name, BLUE) for name in names], height=0.65)
    for i, value in enumerate(values):
        axes.annotate(
            form.format(value),
            (value, i),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
        )
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_axisbelow(True)
    axes.set(xlabel=label, xlim=(0, room * max(values)))
