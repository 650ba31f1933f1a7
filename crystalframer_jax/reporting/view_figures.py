"""Figures of what the heads of a block see from an atom: neighbors by attention weight, and the frame of each head."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pymatgen.core
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from monty.serialization import loadfn
from pymatgen.core import Element

from crystalframer_jax.reporting.plots import BLUE, COLUMN, GREEN, VERMILION, style

AXES = (VERMILION, GREEN, BLUE)  # colours of e1, e2, e3
CAMERA = (0.62, -0.70, 0.35)  # direction from which the atom is seen, in the frame of the file
SHOWN = 0.99  # of the attention weight: neighbors beyond are left out


@functools.cache
def color_of(number: int) -> tuple[float, float, float]:
    """Returns the colour of an element (Jmol), red, green, blue from 0 to 1."""
    colors = loadfn(Path(pymatgen.core.__file__).parent / "ElementColorSchemes.yaml")["Jmol"]
    red, green, blue = colors.get(symbol_of(number), (200, 200, 200))
    return red / 255, green / 255, blue / 255


def symbol_of(number: int) -> str:
    """Returns the symbol of an element."""
    return Element.from_Z(int(number)).symbol


def shown_neighbors(weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Returns which neighbors of a head are drawn: those that have most of the weight, without the atom itself."""
    others = np.flatnonzero(np.linalg.norm(vectors, axis=1) > 1e-3)
    by_weight = np.sort(weights[others])[::-1]
    last = int(np.searchsorted(np.cumsum(by_weight), SHOWN * by_weight.sum()))
    smallest = by_weight[last : last + 1].min(initial=np.inf) * (1 - 1e-4)  # with all that are equal by symmetry
    return others[weights[others] >= smallest]


def frames_figure(view: Any, heads: Sequence[int], title: str, dark: bool = False) -> Figure:
    """Draws an atom and its neighbors, their areas by attention weight, with the three axes of each head's frame.

    `view` is an `inference.views.View`; a panel for each of the `heads` (numbers from 0).
    """
    columns = min(4, len(heads))
    rows = math.ceil(len(heads) / columns)
    side = COLUMN if len(heads) == 1 else 2 * COLUMN / columns
    with style(dark):
        figure = Figure(figsize=(side * columns, side * rows + 0.55), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat[len(heads) :]:
            axes.axis("off")
        for axes, head in zip(panels.flat, heads, strict=False):
            width = _panel(axes, view, head)
            axes.set_title(f"head {head}, {width:.0f} Å wide", fontsize=7, pad=1)
        figure.suptitle(title)
        marks = element_marks(view.species)
        if view.frames is not None:
            marks += [Line2D([], [], color=color, lw=2, label=f"e{n}") for n, color in enumerate(AXES, 1)]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 8), handlelength=1.2)
    return figure


def _panel(axes: Axes, view: Any, head: int) -> float:
    """Draws one head, seen from CAMERA without perspective, what is farther away paler; returns the width in Å."""
    to_screen = screen()
    neighbors, weights = shown_neighbors(view.weights[head], view.vectors), view.weights[head]
    share = weights / weights[neighbors].max(initial=1e-300)  # of the heaviest
    reach = 1.25 * np.linalg.norm(view.vectors[neighbors], axis=1).max(initial=1.0)
    spheres = [(to_screen @ view.vectors[m], 0.16 * reach * np.sqrt(share[m]), view.species[m]) for m in neighbors]
    spheres.append((np.zeros(3), 0.12 * reach, view.species[-1]))
    for (x, y, depth), radius, number in spheres:
        draw_sphere(axes, (x, y), radius, number, depth / reach)
    for m in neighbors:
        x, y, depth = to_screen @ view.vectors[m]
        axes.plot([0, x], [0, y], color="gray", lw=1.5 * share[m], alpha=0.5, zorder=3 + min(depth, 0) / reach)
    for axis, color in zip(view.frames[head] if view.frames is not None else (), AXES, strict=False):
        x, y, depth = 0.72 * reach * to_screen @ axis
        arrow: dict[str, Any] = {"arrowstyle": "-|>,head_width=0.25,head_length=0.45", "color": color, "lw": 1.8}
        order = 6 if depth >= 0 else 2.9
        axes.annotate("", (x, y), (0, 0), arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0}, zorder=order)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.axis("off")
    return 2 * reach


def screen() -> np.ndarray:
    """Returns the rows right, up and towards the viewer."""
    toward = np.array(CAMERA) / np.linalg.norm(CAMERA)
    right = np.cross([0, 0, 1], toward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(toward, right), toward])


def draw_sphere(axes: Axes, place: Any, radius: float, number: int, depth: float) -> None:
    """Draws an atom of an element; `depth` from -1, behind and paler, to 1, in front and drawn last."""
    paleness, ground = 0.3 * (1 - depth), np.array(axes.figure.get_facecolor()[:3])
    face = (1 - paleness) * np.array(color_of(number)) + paleness * ground
    axes.add_patch(Circle(place, radius, fc=np.clip(face, 0, 1), ec="black", lw=0.5, zorder=3 + 2 * depth))
    shine = place[0] - 0.3 * radius, place[1] + 0.3 * radius
    axes.add_patch(Circle(shine, 0.35 * radius, fc="white", ec="none", alpha=0.45, zorder=3 + 2 * depth))


def element_marks(species: np.ndarray) -> list[Line2D]:
    """Makes the entries of a legend that names the elements among atomic numbers."""
    return [
        Line2D([], [], ls="", marker="o", ms=6, mfc=color_of(z), mec="black", mew=0.4, label=symbol_of(z))
        for z in sorted({int(number) for number in species})
    ]


def attention_figure(view: Any, title: str, dark: bool = False) -> Figure:
    """Draws the attention weights of every head against the distance of the neighbors, those of a shell summed."""
    heads = len(view.weights)
    with style(dark):
        figure = Figure(figsize=(COLUMN, 2.5), layout="constrained")
        axes = figure.subplots()
        distance = np.round(np.linalg.norm(view.vectors, axis=1), 3)
        shells = np.unique(distance)
        colors = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.95, heads))
        for head in range(heads):
            sums = [view.weights[head, distance == shell].sum() for shell in shells]
            axes.plot(shells, sums, "-o", ms=2.5, lw=0.9, color=colors[head], label=str(head))
        axes.set(xlabel="distance (Å)", ylabel="attention weight of the shell", yscale="log", ylim=(1e-4, 1.3))
        axes.set_title(title)
        axes.legend(title="head", loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1.2)
    return figure
