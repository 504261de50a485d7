"""Turns the rows of benchmark/results/ into scores: what counts as 0 and as 1, and which cells are complete."""

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

import numpy as np

from benchmark import scores
from benchmark.experiments import EXPERIMENTS
from benchmark.runs import CURVE_POINTS, Missing, Run, finished, rows
from benchmark.scores import Scores

Rows = list[dict[str, str]]


def complete(experiment: str, key: Callable[[Run], Hashable]) -> dict[Hashable, Rows]:
    """The rows of an experiment by key(run), for the keys that have all their runs; stderr names the others.

    Raises `Missing` if no key has all its runs.
    """
    done, found = finished(), defaultdict(list)
    for run in dict.fromkeys(EXPERIMENTS[experiment]()):
        found[key(run)].append(done.get(run.command))
    missing = {name: known.count(None) for name, known in found.items() if None in known}
    for name, count in missing.items():
        print(f"{experiment}: {name} is left out, because {count} of its runs are missing", file=sys.stderr)
    whole = {name: known for name, known in found.items() if name not in missing}
    if not whole:
        raise Missing("no cell has all its runs yet.")
    code = defaultdict(set)
    for row in itertools.chain(*whole.values()):
        code[row["command"].split()[1]].add(f"{row['revision']} with {row['versions']}")
    for script, versions in code.items():
        if len(versions) > 1 or any("+" in version.split()[0] for version in versions):
            print(
                f"{experiment}: rows of {script} have different or uncommitted code: {', '.join(sorted(versions))}",
                file=sys.stderr,
            )
    return whole


def kl_of(run: Run) -> float:
    """The weight of a run's KL term."""
    return float(run.value("--kl-coef"))


def stand_in(row: dict, diverged: dict[str, float]) -> float:
    """What a run that diverged counts as: the value of `diverged` for its environment."""
    if row["env_id"] not in diverged:
        raise Missing(f"{row['env_id']} has no row of random actions; run ./benchmark.sh random first.")
    return diverged[row["env_id"]]


def values(known: Iterable[dict], column: str, diverged: dict[str, float]) -> Scores:
    """A column by environment. A run that diverged counts as `diverged` of its environment."""
    found = defaultdict(list)
    for row in known:
        found[row["env_id"]].append(stand_in(row, diverged) if row["diverged"] == "1" else float(row[column]))
    return {env_id: np.array(x) for env_id, x in found.items()}


def zeros(column: str = "final_return") -> dict[str, float]:
    """Mean return, or success, of random actions by environment."""
    return {row["env_id"]: float(row[column]) for row in rows("random") if row[column]}


class Scale:
    """Scores of the final return. Random actions score 0, and the mean of PPO-clip at K = 1 without KL scores 1."""

    def __init__(self):
        self.zero, done, on_policy = zeros(), finished(), []
        for run in EXPERIMENTS["staleness"]():
            if run.method == "clip" and run.value("--buffer-epochs") == "1" and kl_of(run) == 0:
                if run.command not in done or run.value("--env-id") not in self.zero:
                    raise Missing("the scale is not known yet; run ./benchmark.sh random and staleness first.")
                on_policy.append(done[run.command])
        self.one = {env_id: x.mean() for env_id, x in values(on_policy, "final_return", self.zero).items()}
        for env_id, one in self.one.items():
            if one <= self.zero[env_id]:
                raise Missing(f"{env_id} has no scale, because PPO-clip at K = 1 is no better than random actions.")

    def __call__(self, *cells: Rows) -> Scores:
        """The scores of several cells together. Each environment of each cell is a stratum of its own."""
        found = [scores.normalize(values(known, "final_return", self.zero), self.zero, self.one) for known in cells]
        return {f"{env_id} {i}": x for i, own in enumerate(found) for env_id, x in own.items()}

    def curve(self, known: Rows) -> np.ndarray:
        """Learning curve (CURVE_POINTS,): interquartile mean of all runs at each point."""
        low, unit = np.array([(self.zero[row["env_id"]], self.one[row["env_id"]]) for row in known]).T[..., None]
        return scores.iqm((curves(known, self.zero) - low) / (unit - low), axis=0)


def curves(known: Rows, diverged: dict[str, float]) -> np.ndarray:
    """Learning curves (runs, CURVE_POINTS). A run that diverged is flat at `diverged` of its environment."""

    def curve(row):
        lost = row["diverged"] == "1"
        return [stand_in(row, diverged)] * CURVE_POINTS if lost else [float(value) for value in row["curve"].split()]

    return np.array([curve(row) for row in known])


def age(actors: int, reuse: int, costs: dict[str, float]) -> float:
    """Rule for RLlib: the mean age of a sample, in gradient steps, if the learner keeps up.

    While one actor plays a message, every actor delivers one. Filling the batch and sending weights take the time of
    another batch. Each batch is learned from `reuse` times.
    """
    return reuse * (actors * costs["message_steps"] / costs["batch_steps"] + 1) + (reuse - 1) / 2


def speed(actors: int, costs: dict[str, float]) -> tuple[float, bool]:
    """Estimate for RLlib: steps/s, and whether the learner limits them. The learner does its tasks one by one."""
    played = actors * costs["message_steps"] / costs["play_seconds"]
    batch = costs["batch_seconds"] + costs["reuse"] * costs["update_seconds"]
    learned = 1 / (costs["receive_seconds"] / costs["message_steps"] + batch / costs["batch_steps"])
    return min(played, learned), played > learned
