"""Figures and tables from benchmark/results/*.csv and nothing else; the same files give the same bytes.

./benchmark.sh report        # rewrites the figures in docs/figures and the marked tables of README and docs
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro

from analysis.common import STYLES
from benchmark import scores
from benchmark.experiments import EXPERIMENTS
from benchmark.runs import rows
from benchmark.scripts import ROOT

FIGURES = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md"]
NAMES = STYLES | {"decoupled": ("decoupled PPO", "#999999", (0, (5, 1)))}


@dataclass
class References:
    """What counts as 0 and as 1 in each environment: random actions, and PPO-clip on-policy."""

    zero: dict[str, float]
    one: dict[str, float]


def references() -> References:
    """Random returns, and the mean final return of PPO-clip at K = 1 in the staleness experiment."""
    done, on_policy = {row["command"]: row for row in rows("staleness")}, defaultdict(list)
    zero = {row["env_id"]: float(row["final_return"]) for row in rows("random")}
    for run in EXPERIMENTS["staleness"]():
        if run.method == "clip" and run.value("--buffer-epochs") == "1":
            if run.command not in done or run.value("--env-id") not in zero:
                raise SystemExit("error: 0 and 1 are not known; run ./benchmark.sh random and staleness first.")
            on_policy[run.value("--env-id")].append(float(done[run.command]["final_return"]))
    return References(zero, {env: float(np.mean(values)) for env, values in on_policy.items()})


def by_dial(experiment: str, dial: str, column: str, known: References) -> dict[tuple[str, int], scores.Scores]:
    """Normalised scores of an experiment by method and value of a dial (a flag), for those whose runs are all there.

    A run that diverged counts as random actions do.
    """
    cells, missing = defaultdict(list), set()
    done = {row["command"]: row for row in rows(experiment)}
    for run in EXPERIMENTS[experiment]():
        cell = run.method, int(run.value(dial))
        cells[cell].append(done.get(run.command))
        if run.command not in done:
            missing.add(cell)
    found = {}
    for cell in cells.keys() - missing:
        values = defaultdict(list)
        for row in cells[cell]:
            values[row["env_id"]].append(float(row[column] or known.zero[row["env_id"]]))
        found[cell] = scores.normalize({env: np.array(x) for env, x in values.items()}, known.zero, known.one)
    for method, value in sorted(missing):
        print(f"{experiment}: left out, for runs are missing: {method} at {dial} {value}", file=sys.stderr)
    return found


def cell(sample: scores.Scores | None) -> str:
    """An interquartile mean with its interval; empty for what was not run."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*scores.iqm_with_interval(sample)) if sample else ""


def table(found: dict[tuple[str, int], scores.Scores], dial: str) -> str:
    """Markdown: a row for each method and a column for each dial value."""
    values = sorted({value for _, value in found})
    lines = ["| | " + " | ".join(f"{dial} = {value}" for value in values) + " |", "|---|" + "---|" * len(values)]
    for method, (label, *_) in NAMES.items():
        cells = [cell(found.get((method, value))) for value in values]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(found: dict[tuple[str, int], scores.Scores], dial: str, path: Path):
    """Interquartile mean and interval against the dial, a line for each method."""
    axes = plt.figure(figsize=(7, 4.2), layout="constrained").subplots()
    for method, (label, color, line) in NAMES.items():
        values = sorted(value for name, value in found if name == method)
        if values:
            middle, low, high = np.array([scores.iqm_with_interval(found[method, value]) for value in values]).T
            axes.plot(values, middle, color=color, linestyle=line, marker="o", markersize=4, label=label)
            axes.fill_between(values, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    ticks = sorted({value for _, value in found})
    axes.set_xticks(ticks, [str(value) for value in ticks])
    axes.axhline(1, color="0.8", linewidth=1, zorder=0)
    axes.set(xlabel=dial, ylabel="final return: random = 0, PPO on-policy = 1")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    FIGURES.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(axes.figure)


def fill(name: str, text: str):
    """Put a text between the markers of that name, wherever a page has them; `ValueError` if none has."""
    between, filled = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", 0
    for page in PAGES:
        old = page.read_text()
        new, count = re.subn(between, lambda match: match[1] + text + "\n" + match[2], old, flags=re.DOTALL)
        page.write_text(new)
        filled += count
    if not filled:
        raise ValueError(f"no page has the marker <!-- {name} -->")


def main():
    """Rewrite every figure and table from benchmark/results."""
    matplotlib.use("Agg")
    known = references()
    found = by_dial("staleness", "--buffer-epochs", "final_return", known)
    figure(found, "rollouts K in the replay buffer", FIGURES / "staleness.png")
    fill("staleness", table(found, "K"))


if __name__ == "__main__":
    tyro.cli(main)
