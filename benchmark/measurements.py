"""The rows of planned runs as one table: what counts as 0 and as 1, and which runs are missing."""

import sys
from collections.abc import Iterable

import numpy as np
import pandas as pd

from benchmark import runner
from benchmark.runner import CURVE_POINTS, Missing, Run


def random_actions(column: str = "final_return") -> pd.Series:
    """Mean return, or success, of random actions by task."""
    path = runner.ROWS / "random.csv"
    if not path.exists():
        raise Missing("the returns of random actions are not known; run ./benchmark.sh random first.")
    return pd.read_csv(path, index_col="env_id")[column].dropna()


def measure(plan: Iterable[Run], column: str = "final_return") -> pd.DataFrame:
    """A line for each planned run: its line, method and given flags, its row, and its `value` of this column.

    A run that diverged counts as random actions. A run without a row has no value. A learning curve is an array.
    """
    planned = [{"command": run.command, "line": run.line, "method": run.method, **run.flags} for run in plan]
    rows = runner.read_rows().drop(columns=["method", "env_id", "seed", "flags"])
    table = pd.DataFrame(planned).merge(rows, on="command", how="left")
    table["value"] = table[column].astype(float)
    table["curve"] = [np.array(str(text).split(), dtype=float) for text in table.curve]
    diverged = table.index[table.diverged == 1]
    if len(diverged):
        zero = random_actions(column.replace("eval", "final"))
        unknown = set(table.env_id[diverged]) - set(zero.index)
        if unknown:
            raise Missing(f"{min(unknown)} has no row of random actions; run ./benchmark.sh random first.")
        table.loc[diverged, "value"] = table.env_id[diverged].map(zero)
        returns = random_actions()
        for i in diverged:
            table.at[i, "curve"] = np.full(CURVE_POINTS, returns[table.env_id[i]])
    return table


def complete(plan: Iterable[Run], experiment: str, column: str = "final_return") -> pd.DataFrame:
    """`measure`, but every run must have a value. Raises `Missing` with the command that brings them."""
    table = measure(plan, column)
    left = table[table.value.isna()].command.nunique()
    if left:
        raise Missing(f"{left} runs of {experiment} are missing; run ./benchmark.sh {experiment} first.")
    return table


def whole(table: pd.DataFrame, cells: list[str], experiment: str) -> pd.DataFrame:
    """The cells of a table that have all their runs; stderr names the others, and rows of different code.

    Raises `Missing` if no cell has all its runs.
    """
    missing = table.value.isna().groupby([table[name] for name in cells], sort=False).transform("sum")
    for name, count in table.assign(missing=missing)[missing > 0].groupby(cells, sort=False).missing.first().items():
        print(f"{experiment}: {name} is left out, because {count} of its runs are missing", file=sys.stderr)
    found = table[missing == 0]
    if found.empty:
        raise Missing("no cell has all its runs yet.")
    name_different_code(found, experiment)
    return found


def name_different_code(table: pd.DataFrame, experiment: str):
    """Print which scripts have rows of different, or of uncommitted code."""
    code = table.revision.astype(str) + " with " + table.versions.astype(str)
    for script, known in code.groupby(table.command.str.split().str[1]):
        if known.nunique() > 1 or known.str.contains("+ with", regex=False).any():
            shown = ", ".join(sorted(known.unique()))
            print(f"{experiment}: rows of {script} have different or uncommitted code: {shown}", file=sys.stderr)


def scale(reference: Iterable[Run], experiment: str, column: str = "final_return") -> pd.DataFrame:
    """What counts as 0 and as 1 by task: random actions, and the mean of these runs of the experiment."""
    one = complete(reference, experiment, column).groupby("env_id").value.mean()
    found = pd.DataFrame({"zero": random_actions(column.replace("eval", "final")), "one": one}).loc[one.index]
    if found.isna().any(axis=None) or (found.one <= found.zero).any():
        raise Missing(f"a task has no scale, because the runs of {experiment} are no better than random actions.")
    return found


def scored(table: pd.DataFrame, scale: pd.DataFrame) -> pd.DataFrame:
    """The table with values and learning curves in units of the scale."""
    low, unit = table.env_id.map(scale.zero), table.env_id.map(scale.one - scale.zero)
    return table.assign(value=(table.value - low) / unit, curve=(table.curve - low) / unit)
