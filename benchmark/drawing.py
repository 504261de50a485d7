"""The three kinds of figures. A method has one color, its first line is solid, and equal rows give equal bytes.

A table has a row for each run, with `command`, `line`, `method`, `env_id`, `value` and `curve`, and `x` for a dial. A
figure has a panel for each table, by its title.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from benchmark import methods
from benchmark.intervals import iqm, iqm_interval
from benchmark.runner import CURVE_POINTS

DASHES = ("-", "--", ":", "-.")
Panels = dict[str, pd.DataFrame]


def figure(draw, panels: Panels, path: Path, xlabel: str, ylabel: str, sharey: bool):
    """Panels with one legend, two or three a row. The PNG omits the library's version, which would change its bytes."""
    styles, known = {}, pd.concat(panels.values())
    for method, lines in known.groupby("method", sort=False).line.unique().items():
        color = methods.style(method)[1]
        styles |= {line: {"color": color, "linestyle": DASHES[i % 4]} for i, line in enumerate(lines)}
    columns = 3 if len(panels) % 3 == 0 else min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    made = plt.figure(figsize=(4 * min(columns, 2) + 2.5, 3.4 * rows), layout="constrained")
    places = made.subplots(rows, columns, squeeze=False, sharey=sharey)
    handles = {}
    for axes, (title, table) in zip(places.flat, panels.items()):
        handles |= draw(axes, table, {line: style for line, style in styles.items() if line in set(table.line)})
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places.flat[len(panels) :]:
        axes.remove()
    for axes in places[:, 0]:
        axes.set_ylabel(ylabel, fontsize=9)
    names = [f"{line}, n = {runs_per_task(known[known.line == line])}" for line in handles]
    if handles:
        made.legend(handles.values(), names, loc="outside right center", frameon=False, fontsize=8, handlelength=3.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(made)


def runs_per_task(table: pd.DataFrame) -> str:
    """The number of runs of a line in each task and place; a range if it differs."""
    counts = table.groupby(["env_id", *(["x"] if "x" in table else [])]).command.nunique()
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"


def against(panels: Panels, path: Path, xlabel: str, ylabel: str):
    """Interquartile mean and interval against the values `x` of a dial, evenly spaced.

    The grey line is where PPO-clip's first line starts. A panel without PPO-clip has that of all panels.
    """

    def draw(axes, table, styles):
        ticks, handles = sorted(table.x.unique()), {}
        for i, (line, style) in enumerate(styles.items()):
            own = table[table.line == line].set_index("env_id")
            found = np.array([[x, *iqm_interval(values)] for x, values in own.groupby("x").value])
            shift = 0.05 * (i - (len(styles) - 1) / 2)  # so that intervals do not overlap
            at = [ticks.index(x) + shift for x in found[:, 0]]
            (handles[line],) = axes.plot(at, found[:, 1], marker="o", markersize=4, **style)
            axes.vlines(at, found[:, 2], found[:, 3], color=style["color"], linewidth=1)
        axes.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
        known = table if "clip" in set(table.method) else pd.concat(panels.values())
        clip = known[(known.method == "clip") & (known.x == ticks[0])]
        if len(clip):
            axes.axhline(iqm(clip[clip.line == clip.line.iloc[0]].value), color="0.8", linewidth=1, zorder=0)
        return handles

    figure(draw, panels, path, xlabel, ylabel, sharey=True)


def over_time(panels: Panels, path: Path, xlabel: str, ylabel: str, sharey=False, mark: float | None = None):
    """Learning curves up to x = `end`: every run is thin, the mean is thick. `mark` is a vertical line."""

    def draw(axes, table, styles):
        handles = {}
        for line, style in styles.items():
            own = table[table.line == line]
            x = (np.arange(CURVE_POINTS) + 0.5) / CURVE_POINTS * own.end.iloc[0]
            runs = np.stack(own.curve)
            axes.plot(x, runs.T, linewidth=0.5, alpha=0.4, **style)
            (handles[line],) = axes.plot(x, runs.mean(0), linewidth=1.8, **style)
        if mark:
            axes.axvline(mark, color="0.6", linewidth=0.8)
        return handles

    figure(draw, panels, path, xlabel, ylabel, sharey)


def forest(panels: Panels, path: Path, xlabel: str):
    """Interquartile mean and interval of each line, one below the other. The first line is the reference."""

    def draw(axes, table, styles):
        names = list(styles)
        for i, line in enumerate(names):
            value, low, high = iqm_interval(table[table.line == line].set_index("env_id").value)
            axes.plot(value, i, "o", color=styles[line]["color"])
            axes.hlines(i, low, high, color=styles[line]["color"])
            if i == 0:
                axes.axvline(value, color="0.8", zorder=0)
        counts = [runs_per_task(table[table.line == line]) for line in names]
        axes.set_yticks(range(len(names)), [f"{line}, n = {n}" for line, n in zip(names, counts)], fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        return {}

    figure(draw, panels, path, xlabel, "", sharey=True)
