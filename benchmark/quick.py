"""GIPO against PPO-clip on fresh and stale data, in about five minutes on two cores.

./benchmark.sh quick        # draws runs/benchmark/quick.png and prints a verdict

Both take the scripts' defaults. Hopper stands for continuous control and an empty room for MiniGrid. No Atari game is
learned in that time; see ./benchmark.sh pong. Three seeds show a large difference, but not a small one.
"""

import sys

import matplotlib
import tyro

from benchmark import experiments, pages, runner


def main(dry_run: bool = False) -> int:
    """Run what is missing, draw the figure and print the verdicts.

    Args:
        dry_run: print the commands of the missing runs, and run none of them
    """
    code = experiments.main(experiments.Args("quick", dry_run))
    if code or dry_run:
        return code
    matplotlib.use("Agg")
    table = pages.of_each_task("quick", dial={"buffer_epochs": "K ="})
    pages.draw_each_task(table, runner.WORK / "quick.png")
    for x, own in table.groupby("x", sort=False):
        digits = 0 if own.value.max() > 10 else 2
        print(pages.verdict(own[own.method == "gipo"], own[own.method == "clip"], x, digits))
    print(f"learning curves: {runner.WORK / 'quick.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
