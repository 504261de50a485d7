"""Rows of runs that have not been run."""

import pandas as pd

from benchmark import runner


def row(run: runner.Run, final: float, **more) -> dict:
    """A row whose returns are all `final`, and whose diagnostics are 0.5."""
    found = dict.fromkeys(runner.COLUMNS) | dict.fromkeys(runner.DIAGNOSTICS, 0.5)
    found |= {"command": run.command, "method": run.method, "env_id": run.flags.get("env_id", "sorting")}
    found |= {"final_return": final, "mean_return": final, "eval_return": final, "final_success": 0.5}
    found["eval_start"] = final / 2
    found |= {"seed": run.flags.get("seed", 1), "diverged": 0, "revision": "abc", "versions": "torch=1"}
    return found | {"curve": " ".join([f"{final}"] * runner.CURVE_POINTS)} | more


def write(experiment: str, rows: list[dict]):
    runner.ROWS.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(runner.ROWS / f"{experiment}.csv", index=False)


def write_random(returns: dict[str, float], success: float = 0.25):
    rows = [{"env_id": env_id, "final_return": x, "final_success": success} for env_id, x in returns.items()]
    write("random", rows)
