"""GIPO against PPO-clip in about ten minutes of two cores: fresh and stale data, one environment for each domain.

./benchmark.sh quick        # draws runs/benchmark/quick.png and prints a verdict

Hopper stands for continuous control and an empty room for MiniGrid; no Atari game is learned in ten minutes, see
./benchmark.sh atari. Three seeds show a large difference and no small one.
"""

import sys

import matplotlib
import tyro

from benchmark import experiments
from benchmark.evidence import complete
from benchmark.report import compared, draw_lines, env_and_k
from benchmark.runs import WORK

STEPS = {"Hopper-v5": experiments.QUICK_STEPS, "MiniGrid-Empty-5x5-v0": experiments.QUICK_STEPS_MINIGRID}


def main(dry_run: bool = False) -> int:
    """Run what is missing, draw the figure and print the verdicts.

    Args:
        dry_run: print the commands of the runs that are missing, and run none
    """
    code = experiments.main(experiments.Args("quick", dry_run))
    if code or dry_run:
        return code
    matplotlib.use("Agg")
    cells = complete("quick", env_and_k)
    draw_lines(cells, STEPS, WORK / "quick.png", "mean return")
    for env_id, digits in zip(STEPS, (0, 2), strict=True):
        own = {key: known for key, known in cells.items() if key[1][0] == env_id}
        print(f"{env_id}, return: {compared(own, 'final_return', digits)}")
    print(f"learning curves: {WORK / 'quick.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
