"""GIPO against PPO-clip on fresh and stale data, in about five minutes on two cores.

./benchmark.sh quick        # draws runs/benchmark/quick.png and prints a verdict

Both take the scripts' defaults. Hopper stands for continuous control and an empty room for MiniGrid. No Atari game is
learned in that time; see ./benchmark.sh atari. Three seeds show a large difference, but not a small one.
"""

import sys

import matplotlib
import tyro

from benchmark import experiments
from benchmark.report import by_place, draw_raw, raw_cells, raw_verdict
from benchmark.runs import WORK


def main(dry_run: bool = False) -> int:
    """Run what is missing, draw the figure and print the verdicts.

    Args:
        dry_run: print the commands of the missing runs, and run none of them
    """
    code = experiments.main(experiments.Args("quick", dry_run))
    if code or dry_run:
        return code
    matplotlib.use("Agg")
    cells = raw_cells("quick")
    draw_raw(cells, WORK / "quick.png", "return")
    for env_id, digits in zip(experiments.QUICK, (0, 2)):
        own = {key: known for key, known in cells.items() if key[1] == env_id}
        print(raw_verdict(by_place(own, "final_return", pool=False), digits))
    print(f"learning curves: {WORK / 'quick.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
