"""Common parts of the figures. Each method has one line style, and the same numbers give the same bytes."""

import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from analysis.common import STYLES
from benchmark import scores
from benchmark.runs import CURVE_POINTS
from benchmark.scores import Scores

NAMES = STYLES | {
    "decoupled": ("decoupled PPO", "#999999", (0, (5, 1))),
    "sb3-ppo": ("PPO of Stable-Baselines3", "#D55E00", ":"),
    "sb3-sac": ("SAC of Stable-Baselines3", "#009E73", "-"),
    "vespo": ("VESPO", "#CC79A7", (0, (6, 2))),
    "random": ("random actions", "#000000", "-"),
}
STEPS_AXIS = "thousand environment steps"
SCALE = "random = 0, PPO-clip at K = 1 is 1"


@dataclass
class Panel:
    """Scores by (line, x), or for each line its last x and its learning curve (CURVE_POINTS,)."""

    title: str
    xlabel: str
    lines: dict[Hashable, Scores | tuple[float, np.ndarray]]
    log: bool = False  # the x axis


def figure(draw, panels: list[Panel], styles: dict, path: Path, ylabel: str, sharey: bool = False):
    """Panels with a common legend, two a row. The PNG omits the library's version, which would change its bytes."""
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    made = plt.figure(figsize=(4 * columns + 2, 3.8 * lines), layout="constrained")
    shown = {}
    places = made.subplots(lines, columns, squeeze=False, sharey=sharey)
    for axes, panel in itertools.zip_longest(places.flat, panels):
        if panel is None:
            axes.remove()
            continue
        shown |= draw(axes, panel.lines, styles)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.xlabel, fontsize=9)
        if panel.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[:, 0]:
        axes.set_ylabel(ylabel, fontsize=9)
    made.legend(shown.values(), shown.keys(), loc="outside right center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(made)


def against(panels: list[Panel], styles: dict, path: Path, ylabel: str = f"final return: {SCALE}"):
    """Interquartile mean and interval against the values of a dial, evenly spaced; one line for each style."""

    def draw(axes, found, styles):
        ticks = sorted({x for _, x in found})
        shown = [line for line in styles if any(line == own for own, _ in found)]
        handles = {}
        for i, line in enumerate(shown):
            label, color, dashes = styles[line]
            xs = [x for x in ticks if (line, x) in found]
            middle, low, high = np.array([scores.iqm_with_interval(found[line, x]) for x in xs]).T
            at = [ticks.index(x) + 0.05 * (i - (len(shown) - 1) / 2) for x in xs]  # so that intervals do not overlap
            (handles[label],) = axes.plot(at, middle, color=color, linestyle=dashes, marker="o", markersize=4)
            axes.vlines(at, low, high, color=color, linewidth=1)
        axes.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
        axes.axhline(1, color="0.8", linewidth=1, zorder=0)
        return handles

    figure(draw, panels, styles, path, ylabel, sharey=True)


def over_time(panels: list[Panel], styles: dict, path: Path, ylabel: str, mark: float | None = None):
    """Learning curves, with a vertical line at x = `mark` if one is given."""

    def draw(axes, lines, styles):
        handles = {}
        for line, (label, color, dashes) in styles.items():
            if line in lines:
                end, values = lines[line]
                x = (np.arange(CURVE_POINTS) + 0.5) / CURVE_POINTS * end
                (handles[label],) = axes.plot(x, values, color=color, linestyle=dashes)
        if mark:
            axes.axvline(mark, color="0.6", linewidth=0.8)
        return handles

    figure(draw, panels, styles, path, ylabel)
