"""The periodic table with a number for each element, such as the mean error of the crystals that hold it."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter
from pymatgen.core import Element

from crystalframer_jax.reporting.plots import COLUMN, style
from crystalframer_jax.structures.crystal import MAX_ATOMIC_NUMBER


@style()
def periodic_table(values: Mapping[int, float], label: str, title: str = "") -> Figure:
    """Draws positive `values` by atomic number as colours of the periodic table; elements without one stay empty.

    The scale is logarithmic if the largest is more than ten times the smallest. Raises ValueError if there are none.
    """
    if not values:
        raise ValueError("there is no element with a value")
    found = np.array([*values.values()])
    limits = found.min(), found.max() if found.max() > found.min() else found.min() + 1e-12
    norm = (LogNorm if 0 < 10 * limits[0] < limits[1] else Normalize)(*limits)
    colors: Any = ScalarMappable(norm, matplotlib.colormaps["viridis_r"])
    figure = Figure(figsize=(2 * COLUMN, 3.6), layout="constrained")
    axes = figure.subplots()
    for number in range(1, MAX_ATOMIC_NUMBER + 1):
        element = Element.from_Z(number)
        column, row = _place(element)
        face = colors.to_rgba(values[number]) if number in values else "none"
        axes.add_patch(Rectangle((column, row), 0.94, 0.94, fc=face, ec="lightgray", lw=0.5))
        is_dark = number in values and np.dot(face[:3], (0.3, 0.6, 0.1)) < 0.45
        ink = "white" if is_dark else "black" if number in values else "silver"
        axes.text(column + 0.47, row + 0.36, element.symbol, ha="center", va="center", fontsize=7.5, color=ink)
        if number in values:
            text = f"{values[number]:.2g}"
            axes.text(column + 0.47, row + 0.74, text, ha="center", va="center", fontsize=4.5, color=ink)
    axes.set(xlim=(0.8, 19), ylim=(10.4, 0.8), aspect="equal", title=title)
    axes.axis("off")
    bar = figure.colorbar(colors, ax=axes, label=label, shrink=0.6, aspect=30, location="bottom", pad=0.01)
    bar.ax.xaxis.set_major_formatter("{x:,.10g}")
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _place(element: Element) -> tuple[float, float]:
    """Returns column and row of an element, lanthanides and actinides below the others."""
    if element.is_lanthanoid or element.is_actinoid:
        first, row = (57, 8.4) if element.is_lanthanoid else (89, 9.4)
        return 3 + element.Z - first, row
    return element.group, element.row
