"""One look for every plot: a palette that colour-blind readers can tell apart, intervals drawn, alt text always."""

from __future__ import annotations

import ast
import base64
import html
import inspect
import io
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from midstream.measure.intervals import t_interval

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC3311", "#8E4585", "#6B6B6B"
"""Okabe and Ito's blue, vermilion and green, with a red, a purple and a grey of similar contrast on white."""

PALETTE = [BLUE, ORANGE, GREEN, PURPLE, RED, GREY]


def use_style() -> None:
    """Sets the book's plot style for the current process."""
    sns.set_theme(style="ticks", palette=PALETTE)
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 3.6),
            "figure.dpi": 100,
            "savefig.dpi": 170,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
        }
    )


def show(figure: Figure, alt: str, caption: str = "") -> None:
    """Displays a figure as an image with alt text and, where given, a caption; then closes it."""
    display(HTML(f'<figure class="midstream">{_image(figure, alt)}{_caption(caption)}</figure>'))


def explore(render: Callable[..., tuple[Figure, str]], **knobs: Sequence[Any]) -> None:
    """An explorer: `render(**values)` returns a figure and its alt text for one choice of every knob.

    In a live kernel the knobs are ipywidgets and every choice is drawn when asked for. In an executed notebook or the
    book, where no kernel answers, the first knob becomes a slider over pictures drawn beforehand, the others keep
    their first value.
    """
    if os.environ.get("MIDSTREAM_STATIC") or os.environ.get("MIDSTREAM_RUN_DIR"):
        _film(render, knobs)
        return
    import ipywidgets

    def redraw(**values: Any) -> None:
        show(*render(**values))

    controls = {
        name: ipywidgets.SelectionSlider(options=list(values), value=values[0], continuous_update=False)
        for name, values in knobs.items()
    }
    display(ipywidgets.interactive(redraw, **controls))


def source(*functions: Callable[..., Any]) -> None:
    """Displays the code of library functions without their docstrings, so that a page shows what really runs."""
    for function in functions:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        body = tree.body[0]
        lines = textwrap.dedent(inspect.getsource(function)).splitlines()
        if isinstance(body, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(body) is not None:
            text = body.body[0]
            del lines[text.lineno - 1 : text.end_lineno]
        display(Markdown("```python\n" + "\n".join(lines) + "\n```"))


def _film(render: Callable[..., tuple[Figure, str]], knobs: Mapping[str, Sequence[Any]]) -> None:
    knob, values = next(iter(knobs.items()))
    fixed = {name: options[0] for name, options in list(knobs.items())[1:]}
    pictures = [_image(*render(**{knob: value}, **fixed)) for value in values]
    frames = "".join(
        f'<div class="frame" data-value="{html.escape(str(value))}"{" hidden" if i else ""}>{picture}</div>'
        for i, (value, picture) in enumerate(zip(values, pictures, strict=True))
    )
    move = (
        "const f=this.closest('figure');f.querySelectorAll('.frame').forEach((e,i)=>{e.hidden=i!=this.value;"
        "if(!e.hidden)f.querySelector('output').textContent=e.dataset.value})"
    )
    label = html.escape(knob.replace("_", " "))
    control = (
        f'<label>{label} <input type="range" min="0" max="{len(values) - 1}" value="0" step="1" oninput="{move}">'
        f"</label> <output>{html.escape(str(values[0]))}</output>"
    )
    display(HTML(f'<figure class="midstream explorer">{frames}<figcaption>{control}</figcaption></figure>'))


def _image(figure: Figure, alt: str) -> str:
    if not alt.strip():
        raise ValueError("a figure needs alt text that says what is seen")
    data = io.BytesIO()
    figure.savefig(data, format="png", facecolor="white")
    plt.close(figure)
    code = base64.b64encode(data.getvalue()).decode()
    width = round(figure.get_figwidth() * 100)
    return f'<img src="data:image/png;base64,{code}" alt="{html.escape(alt)}" style="width:{width}px;max-width:100%">'


def _caption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>" if text else ""


# ------------------------------------------------------------------------------------------------ kinds of plots


def mean_band(axes: Axes, table: pd.DataFrame, x: str, y: str, label: str, color: str, unit: str = "seed") -> None:
    """A line of means over `unit`s with its 95 % t interval as a band, labelled where the line ends.

    On a logarithmic axis mean and interval are those of the logarithms, as for any quantity that varies by factors.
    """
    on_log_axis = axes.get_yscale() == "log"
    forth, back = (np.log, np.exp) if on_log_axis else (np.asarray, np.asarray)
    per_unit = table.groupby([x, unit])[y].mean().reset_index()
    where = sorted(per_unit[x].unique())
    intervals = [t_interval(forth(per_unit[per_unit[x] == at][y])) for at in where]
    means = back([interval.estimate for interval in intervals])
    ends = np.array([(i.low, i.high) if np.isfinite(i.low) else (np.nan, np.nan) for i in intervals])
    axes.plot(where, means, color=color, lw=2)
    axes.fill_between(where, back(ends[:, 0]), back(ends[:, 1]), color=color, alpha=0.18, lw=0)
    axes.annotate(
        label, (where[-1], means[-1]), xytext=(6, 0), textcoords="offset points", color=color, va="center", fontsize=10
    )


def bars(
    axes: Axes, table: pd.DataFrame, value: str, by: str, order: Mapping[str, str], colors: Mapping[str, str]
) -> None:
    """Horizontal bars of means over seeds with 95 % t intervals and one dot a seed; `order` maps arm → its label."""
    for row, arm in enumerate(order):
        seeds = table[table[by] == arm].groupby("seed")[value].mean()
        interval = t_interval(seeds)
        color = colors.get(arm, GREY)
        axes.barh(row, interval.estimate, color=color, alpha=0.35, height=0.65)
        if np.isfinite(interval.low):
            axes.plot([interval.low, interval.high], [row, row], color=color, lw=2.5)
        axes.plot(seeds, np.full(len(seeds), row), "o", color=color, ms=4, mec="white", mew=0.5)
        axes.annotate(
            f"{interval.estimate:.2f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", color=color
        )
    axes.set_yticks(range(len(order)), list(order.values()))
    axes.set_ylim(len(order) - 0.5, -0.5)


def heatmap(axes: Axes, matrix: np.ndarray, labels: Sequence[str], title: str, span: tuple[float, float]) -> None:
    """A square matrix with its values written in; NaN cells stay empty."""
    sns.heatmap(
        matrix, ax=axes, vmin=span[0], vmax=span[1], cmap="cividis", annot=True, fmt=".2f", square=True, cbar=False,
        xticklabels=list(labels), yticklabels=list(labels), annot_kws={"fontsize": 10},
    )  # fmt: skip
    axes.set_title(title)
    axes.tick_params(axis="y", rotation=0)


def arcs(
    axes: Axes, tokens: Sequence[str], weights: np.ndarray, marked: Mapping[int, str], strongest: int = 60
) -> None:
    """Draws a flow over a prompt's own tokens: arcs from column (source) to row (target) of `weights`.

    Only the `strongest` entries are drawn, opacity and width by strength. `marked` maps a position to its colour.
    Tokens stand on the left, one a line; arcs bend to the right, from the earlier token down to the later one.
    """
    count = len(tokens)
    rows, columns = np.unravel_index(np.argsort(weights, axis=None)[::-1][:strongest], weights.shape)
    top = weights.max() or 1.0
    for target, source in zip(rows, columns, strict=True):
        strength = weights[target, source] / top
        if strength <= 0:
            continue
        reach = 0.25 + 2.2 * (target - source) / count
        path = Path([(0, source), (reach, source), (reach, target), (0, target)], [1, 4, 4, 4])
        color = marked.get(int(source)) or marked.get(int(target)) or GREY
        axes.add_patch(PathPatch(path, fill=False, lw=0.4 + 3 * strength, alpha=0.15 + 0.8 * strength, color=color))
    for position, token in enumerate(tokens):
        written = token.replace("\n", "↵").strip() or "␣"
        heavy = "bold" if position in marked else "normal"
        color = marked.get(position, "#333333")
        axes.text(-0.05, position, written, ha="right", va="center", fontsize=8, color=color, fontweight=heavy)
    axes.set(xlim=(-1.0, 2.2), ylim=(count, -1))
    axes.axis("off")
