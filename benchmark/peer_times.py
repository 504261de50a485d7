"""How long GIPO, PPO-clip and the methods of Stable-Baselines3 take for an environment step, on one core.

./benchmark.sh peers-time    # on an idle machine; writes benchmark/rows/peer-times.csv

The methods take turns, so that a machine that changes its speed changes all of them. Each run is timed at two lengths,
and the difference leaves out what a start costs. The table has medians of each method's time, divided by GIPO's in the
same turn.
"""

import os
import subprocess
import sys
import tempfile
import time

import pandas as pd
import tyro

from benchmark import runner
from benchmark.experiments import LOCOMOTION, peer
from benchmark.methods import run

# of the shorter run; the longer one has twice as many
STEPS = {"gipo": 20_480, "clip": 20_480, "sb3-ppo": 20_480, "sb3-sac": 2_000}
REPETITIONS = 3


def seconds(method: str, env_id: str, steps: int) -> float:
    """The time that a run of this length takes with one thread."""
    peers = method.startswith("sb3-")
    one = peer(method[4:], env_id, 1, steps) if peers else run(method, env_id, 1, total_timesteps=steps)
    command = [*one.program, *one.arguments]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        single = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=folder, env=single, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {one.command} failed:\n{result.stderr}")
    return time.perf_counter() - start


def main():
    """Time the methods in turn on each task and write benchmark/rows/peer-times.csv."""
    turns = [
        {method: (seconds(method, env_id, 2 * n) - seconds(method, env_id, n)) / n for method, n in STEPS.items()}
        for _ in range(REPETITIONS)
        for env_id in LOCOMOTION
    ]
    times = pd.DataFrame(turns)
    ratios = times.div(times.gipo, axis=0).median()
    runner.ROWS.mkdir(exist_ok=True)
    ratios.to_csv(runner.ROWS / "peer-times.csv", index_label="method", header=["ratio"], float_format="%.3g")


if __name__ == "__main__":
    tyro.cli(main)
