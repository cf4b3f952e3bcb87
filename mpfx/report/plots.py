"""Pictures, for those who have matplotlib (the extra `plots`)."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_MARKERS = "osD^vX"


class Line(NamedTuple):
    """Points that belong together: stored bits per weight and perplexity."""

    name: str
    points: Sequence[tuple[float, float]]


def plot_sizes(lines: Sequence[Line], dense: float, path: str | os.PathLike[str]) -> str | None:
    """Draw perplexity against stored bits, one line per name, the dense model as a horizontal line.

    Returns:
        Why there is no picture; None if there is one.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture was drawn: that takes matplotlib; pip install 'mpfx[plots]'."
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, max(5.0, 0.24 * len(lines))), layout="constrained")
    axes = figure.add_subplot()
    for index, line in enumerate(lines):
        points = sorted(line.points)
        marker = _MARKERS[index // 10 % len(_MARKERS)]  # colours come round every 10 lines
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=line.name)
    axes.axhline(dense, color="black", linestyle="--", label="dense")
    axes.set(xlabel="stored bits per weight", ylabel="perplexity", yscale="log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(FuncFormatter(lambda value, position: f"{value:.4g}"))
    figure.legend(loc="outside right upper", fontsize="small")
    temporary = Path(path).with_name(f".{Path(path).name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return None
