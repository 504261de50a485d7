"""The figures' common parts: lines in one style for each method, the same bytes for the same numbers."""

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
    "scaled-rate": ("plain IS, slowed by GIPO's weight", "#000000", "-"),
    "sb3-ppo": ("PPO of Stable-Baselines3", "#D55E00", ":"),
    "sb3-sac": ("SAC of Stable-Baselines3", "#009E73", "-"),
    "random": ("random actions", "#000000", "-"),
}
STEPS_AXIS = "thousand environment steps"
SCALE = "random = 0, PPO-clip at K = 1 is 1"


def save(figure: plt.Figure, path: Path):
    """Write a PNG without the version of the library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def against(found: dict[tuple[Hashable, float], Scores], styles: dict, path: Path, xlabel: str):
    """Interquartile mean and interval against the values of a dial, evenly spaced; a line for each of `styles`."""
    axes = plt.figure(figsize=(8, 4.2), layout="constrained").subplots()
    ticks = sorted({x for _, x in found})
    lines = {line: [x for x in ticks if (line, x) in found] for line in styles}
    shown = [line for line, xs in lines.items() if xs]
    for i, line in enumerate(shown):
        label, color, dashes = styles[line]
        middle, low, high = np.array([scores.iqm_with_interval(found[line, x]) for x in lines[line]]).T
        at = [ticks.index(x) + 0.05 * (i - (len(shown) - 1) / 2) for x in lines[line]]  # beside each other
        axes.plot(at, middle, color=color, linestyle=dashes, marker="o", markersize=4, label=label)
        axes.vlines(at, low, high, color=color, linewidth=1)
    axes.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
    axes.axhline(1, color="0.8", linewidth=1, zorder=0)
    axes.set(xlabel=xlabel, ylabel=f"final return: {SCALE}")
    axes.figure.legend(loc="outside right center", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(axes.figure, path)


@dataclass
class Panel:
    """Learning curves: each line has the x at its end and the values (CURVE_POINTS,)."""

    title: str
    xlabel: str
    lines: dict[Hashable, tuple[float, np.ndarray]]


def over_time(panels: list[Panel], styles: dict, path: Path, ylabel: str, mark: float | None = None):
    """Panels side by side, with an x to mark in each of them."""
    figure = plt.figure(figsize=(4 * len(panels) + 1.5, 3.6), layout="constrained")
    shown = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line, (label, color, dashes) in styles.items():
            if line in panel.lines:
                end, values = panel.lines[line]
                x = (np.arange(CURVE_POINTS) + 0.5) / CURVE_POINTS * end
                (shown[label],) = axes.plot(x, values, color=color, linestyle=dashes)
        if mark:
            axes.axvline(mark, color="0.6", linewidth=0.8)
        axes.set_title(panel.title, fontsize=10)
        axes.set(xlabel=panel.xlabel, ylabel=ylabel)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(shown.values(), shown.keys(), loc="outside right center", frameon=False, fontsize=8)
    save(figure, path)
