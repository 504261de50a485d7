"""How long GIPO, PPO-clip and the methods of Stable-Baselines3 take for an environment step, on one core.

./benchmark.sh peers-time    # on an idle machine; writes benchmark/results/peer-times.csv

The methods take turns, so that a machine that changes its speed changes all of them. Each run is timed at two lengths,
and the difference leaves out what a start costs. The table has medians of each method's time, divided by GIPO's in the
same turn.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time

import tyro

from benchmark import runs
from benchmark.experiments import LOCOMOTION, Run, peer, run
from benchmark.scripts import ROOT

# of the shorter run; the longer one has twice as many
STEPS = {"gipo": 20_480, "clip": 20_480, "sb3-ppo": 20_480, "sb3-sac": 2_000}
REPETITIONS = 3
COLUMNS = ("method", "ratio")


def command(method: str, env_id: str, steps: int) -> Run:
    """A run of this length; only its duration matters."""
    if method.startswith("sb3-"):
        return peer(method.removeprefix("sb3-"), env_id, 1, steps)
    return run(method, env_id, 1, total_timesteps=steps)


def seconds(one: Run) -> float:
    """The time that a run takes with one thread."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(one.python), str(ROOT / one.script), *one.arguments]
        single = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(arguments, cwd=folder, env=single, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {one.command} failed:\n{result.stderr}")
    return time.perf_counter() - start


def main():
    """Time the methods in turn on each task and write benchmark/results/peer-times.csv."""
    ratios = {method: [] for method in STEPS}
    for _ in range(REPETITIONS):
        for env_id in LOCOMOTION:
            found = {
                method: (seconds(command(method, env_id, 2 * n)) - seconds(command(method, env_id, n))) / n
                for method, n in STEPS.items()
            }
            for method, time_per_step in found.items():
                ratios[method].append(time_per_step / found["gipo"])
    known = [[method, f"{statistics.median(found):.3g}"] for method, found in ratios.items()]
    runs.RESULTS.mkdir(exist_ok=True)
    with (runs.RESULTS / "peer-times.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *known])


if __name__ == "__main__":
    tyro.cli(main)
