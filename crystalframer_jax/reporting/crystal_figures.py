"""A figure of a crystal: its cell, and the atoms in it and on its faces."""

import itertools

import numpy as np
from matplotlib.figure import Figure

from crystalframer_jax.reporting.plots import COLUMN, style
from crystalframer_jax.reporting.view_figures import draw_sphere, element_marks, screen
from crystalframer_jax.structures.bonds import covalent_radii
from crystalframer_jax.structures.crystal import Crystal

ON_FACE = 1e-3  # of a lattice vector: atoms so close to a face are drawn on the opposite one, too


def crystal_figure(crystal: Crystal, title: str, dark: bool = False) -> Figure:
    """Draws the cell and its atoms, with 0.4 of their covalent radii, seen without perspective."""
    to_screen = screen()
    fractions = crystal.positions @ np.linalg.inv(crystal.lattice) % 1
    fractions[fractions > 1 - ON_FACE] = 0
    places: list[np.ndarray] = []
    numbers: list[int] = []
    for fraction, number in zip(fractions, crystal.species, strict=True):
        on = [(0, 1) if x < ON_FACE else (0,) for x in fraction]
        places += [to_screen @ ((fraction + image) @ crystal.lattice) for image in itertools.product(*on)]
        numbers += [int(number)] * (len(places) - len(numbers))
    corners = {
        corner: to_screen @ (np.array(corner) @ crystal.lattice) for corner in itertools.product((0, 1), repeat=3)
    }
    depths = np.array([corner[2] for corner in corners.values()])
    middle, half = (depths.max() + depths.min()) / 2, max((depths.max() - depths.min()) / 2, 1e-9)
    radii = covalent_radii()
    with style(dark):
        figure = Figure(figsize=(COLUMN, COLUMN), layout="constrained")
        axes = figure.subplots()
        for place, number in zip(places, numbers, strict=True):
            draw_sphere(axes, place[:2], 0.4 * radii[number], number, (place[2] - middle) / half)
        for start, end in itertools.combinations(corners, 2):
            if np.abs(np.subtract(start, end)).sum() == 1:
                ends = np.array([corners[start], corners[end]])
                order = 3 + 2 * (ends[:, 2].min() - middle) / half - 0.01
                axes.plot(ends[:, 0], ends[:, 1], color="gray", lw=0.8, zorder=order)
        axes.set(aspect="equal", title=title)
        axes.margins(0.1)
        axes.axis("off")
        figure.legend(handles=element_marks(crystal.species), loc="outside lower center", ncols=8, handlelength=1.2)
    return figure
