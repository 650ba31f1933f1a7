"""A page to turn around what the heads of a block see from an atom: one file, that needs no network."""

from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from crystalframer_jax.files import replacing
from crystalframer_jax.reporting.view_figures import AXES, color_of, shown_neighbors, symbol_of

LARGEST = 46  # pixels: diameter of the neighbor with most weight


def write_frames_page(view: Any, title: str, file: Path, first: int = 0) -> None:
    """Writes the page of an `inference.views.View` (4 MB, mostly plotly.js) with a menu of its heads from `first`."""
    heads = len(view.weights)
    traces = [_traces(view, head) for head in range(heads)]
    figure = go.Figure([trace for of_head in traces for trace in of_head])
    owner = np.repeat(np.arange(heads), [len(of_head) for of_head in traces])
    buttons = [
        {"label": f"head {head}", "method": "update", "args": [{"visible": (owner == head).tolist()}]}
        for head in range(heads)
    ]
    for trace, head in zip(figure.data, owner, strict=True):
        trace.visible = bool(head == first)
    hidden: dict[str, Any] = {"visible": False, "showspikes": False}
    figure.update_layout(
        title=title,
        updatemenus=[{"buttons": buttons, "active": first, "x": 0, "xanchor": "left", "y": 1, "yanchor": "top"}],
        scene={"xaxis": hidden, "yaxis": hidden, "zaxis": hidden, "aspectmode": "data"},
        legend={"orientation": "h", "y": 0},
        margin={"l": 0, "r": 0, "b": 0, "t": 50},
    )
    page = figure.to_html(include_plotlyjs=True, config={"displaylogo": False})
    with replacing(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _traces(view: Any, head: int) -> list[Any]:
    """Makes what is seen of a head: neighbors, the lines to them, and the axes."""
    neighbors, weights = shown_neighbors(view.weights[head], view.vectors), view.weights[head]
    share = weights / weights[neighbors].max(initial=1e-300)
    vectors = view.vectors[neighbors]
    reach = np.linalg.norm(vectors, axis=1).max(initial=1.0)
    found: list[Any] = []
    lines = np.full((3 * len(vectors), 3), np.nan)  # from the atom to each neighbor, and a gap
    lines[0::3], lines[1::3] = 0, vectors
    thin = {"color": "gray", "width": 2}
    found.append(_scatter(lines, mode="lines", line=thin, hoverinfo="skip", showlegend=False))
    for number in sorted({int(z) for z in view.species[neighbors]}):
        of_element = neighbors[view.species[neighbors] == number]
        told = [f"{np.linalg.norm(view.vectors[m]):.3f} Å, weight {weights[m]:.4f}" for m in of_element]
        marker: dict[str, Any] = {"size": LARGEST * np.sqrt(share[of_element]), "color": _rgb(number), "opacity": 1}
        marker["line"] = {"color": "black", "width": 1}
        name = symbol_of(number)
        found.append(_scatter(view.vectors[of_element], mode="markers", marker=marker, text=told, name=name))
    own = {"size": 26, "color": _rgb(view.species[-1]), "symbol": "diamond", "line": {"color": "black", "width": 1}}
    name = f"the atom, {symbol_of(view.species[-1])}"
    found.append(_scatter(np.zeros((1, 3)), mode="markers", marker=own, name=name))
    for number, (axis, color) in enumerate(
        zip(view.frames[head] if view.frames is not None else (), AXES, strict=False), 1
    ):
        ends = np.stack([np.zeros(3), 0.75 * reach * axis])
        style: dict[str, Any] = {"mode": "lines", "line": {"color": color, "width": 9}, "hoverinfo": "name"}
        found.append(_scatter(ends, name=f"e{number}", **style))
    return found


def _scatter(points: np.ndarray, **others: Any) -> Any:
    x, y, z = points.T
    return go.Scatter3d(x=x, y=y, z=z, **others)


def _rgb(number: int) -> str:
    red, green, blue = (round(255 * share) for share in color_of(int(number)))
    return f"rgb({red},{green},{blue})"
