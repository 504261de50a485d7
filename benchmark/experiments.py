"""The experiments: which runs each of them consists of.

    ./benchmark.sh staleness --dry-run     # print the commands
    ./benchmark.sh staleness               # run what is missing, one run per core

TUNING_SEED chooses bandwidths and learning rates, on environments of their own; neither is ever reported.
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Literal

import tyro

from benchmark.runs import Run, rows, run_all

GIPO = {"continuous": "gipo_continuous.py", "atari": "gipo_atari.py", "minigrid": "gipo_minigrid_vision.py"}
STEPS = 150_000
LOCOMOTION = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")

TUNING = ("Swimmer-v5", "Reacher-v5", "InvertedDoublePendulum-v5")
TUNING_SEED = 101
TUNING_EPOCHS = (1, 8)
RATES = ("3e-4", "1e-3")
# three bandwidths and two learning rates each; what has no bandwidth tries six learning rates
GRID: dict[str, list[tuple[str, ...]]] = {
    "gipo": [("--sigma", width) for width in ("0.2", "0.5", "1.0")],
    "clip": [("--clip-coef", width) for width in ("0.1", "0.2", "0.3")],
    "sapo": [("--sapo-tau", tau, "--sapo-tau-neg", f"{1.05 * float(tau):g}") for tau in ("0.5", "1", "2")],
    "tis": [("--tis-cap", cap) for cap in ("1", "2", "5")],
    "none": [()],
    "decoupled": [
        ("--clip-coef", width, "--tis-cap", cap) for width, cap in (("0.1", "1"), ("0.2", "1"), ("0.2", "2"))
    ],
    "dual-clip": [("--clip-coef", width) for width in ("0.1", "0.2", "0.3")],
    "spo": [("--spo-eps", width) for width in ("0.1", "0.2", "0.3")],
}
RATES_WITHOUT_BANDWIDTH = ("1e-4", "2e-4", "3e-4", "5e-4", "1e-3", "2e-3")
METHODS = tuple(GRID)
COMPARED = ("gipo", "clip", "sapo", "tis", "none", "decoupled")
# nothing was ever chosen on them; far enough apart that no two runs share an environment's seed
SEEDS = (11, 31, 51, 71, 91)


def candidates(method: str) -> list[tuple[str, ...]]:
    """The flags that tuning chooses from: six settings of a method."""
    rates = RATES if GRID[method] != [()] else RATES_WITHOUT_BANDWIDTH
    return [(*bandwidth, "--learning-rate", rate) for bandwidth, rate in itertools.product(GRID[method], rates)]


def run(method: str, env_id: str, seed: int, *flags, domain: str = "continuous") -> Run:
    """One run of a method with the flags given, without the evaluation at its end."""
    if method == "gipo":
        script, arguments = GIPO[domain], ()
    else:
        script = "benchmark/ppo_decoupled.py" if method == "decoupled" else "ppo_baseline.py"
        arguments = (domain, "--surrogate", "clip" if method == "decoupled" else method)
    arguments += ("--env-id", env_id, "--seed", seed, *flags, "--eval-episodes", 0)
    return Run(method, script, tuple(map(str, arguments)))


def tune() -> Iterator[Run]:
    for method in METHODS:
        for env_id, epochs, flags in itertools.product(TUNING, TUNING_EPOCHS, candidates(method)):
            yield run(method, env_id, TUNING_SEED, "--total-timesteps", STEPS, "--buffer-epochs", epochs, *flags)


def tuned(method: str) -> tuple[str, ...]:
    """The best of a method's candidates: by the mean over K and tuning environments of scores scaled to [0, 1].

    0 and 1 are the worst and the best final return that any method reached in that environment while tuning; a run
    that diverged counts as 0.
    """
    found = {known["command"]: known for known in rows("tune")}
    runs = list(tune())
    missing = [one.command for one in runs if one.command not in found]
    if missing:
        raise SystemExit(f"error: {len(missing)} runs of the tuning are missing; run ./benchmark.sh tune first.")
    returns = defaultdict(list)
    for one in runs:
        known = found[one.command]
        if known["final_return"]:
            returns[known["env_id"]].append(float(known["final_return"]))

    def scaled(known):
        low, high = min(returns[known["env_id"]]), max(returns[known["env_id"]])
        return (float(known["final_return"]) - low) / (high - low) if known["final_return"] else 0.0

    def score(flags):
        own = [one for one in runs if one.method == method and one.arguments[-2 - len(flags) : -2] == flags]
        return mean(scaled(found[one.command]) for one in own)

    return max(candidates(method), key=score)


def rate(method: str) -> tuple[str, str]:
    """The learning rate among a method's tuned flags."""
    flags = tuned(method)
    at = flags.index("--learning-rate")
    return flags[at : at + 2]


def grid(methods, seeds, *dials) -> Iterator[Run]:
    """Tuned methods on the locomotion tasks under every dial, a tuple of flags; all methods of a seed side by side."""
    flags = {method: tuned(method) for method in methods}
    for seed, dial, env_id, method in itertools.product(seeds, dials, LOCOMOTION, methods):
        yield run(method, env_id, seed, "--total-timesteps", STEPS, *dial, *flags[method])


def staleness() -> Iterator[Run]:
    dials = {k: ("--buffer-epochs", k) for k in (1, 2, 4, 8, 16, 32)}
    yield from grid(COMPARED, SEEDS, dials[1], dials[8], dials[32])
    yield from grid(("dual-clip", "spo"), SEEDS, dials[1], dials[8])
    yield from grid(COMPARED, SEEDS, dials[2], dials[4], dials[16])


def freeze() -> Iterator[Run]:
    # 24 rollouts of 2048 steps hold all that is collected until then
    yield from grid(COMPARED, SEEDS, *(("--buffer-epochs", k, "--freeze-buffer-at", 24 * 2048) for k in (8, 24)))


def lag() -> Iterator[Run]:
    yield from grid(("gipo", "clip", "tis", "decoupled"), SEEDS[:3], *(("--policy-lag", n) for n in (0, 2, 8, 16)))


def sigma() -> Iterator[Run]:
    widths = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 2)
    for seed, k, env_id, width, share in itertools.product(SEEDS[:3], (1, 8), LOCOMOTION, widths, (1, 0.5)):
        flags = ("--total-timesteps", STEPS, "--buffer-epochs", k, *rate("gipo"))
        yield run("gipo", env_id, seed, *flags, "--sigma", width, "--sigma-neg", f"{width * share:g}")


EXPERIMENTS = {"tune": tune, "staleness": staleness, "freeze": freeze, "lag": lag, "sigma": sigma}


@dataclass
class Args:
    """Run what is missing of an experiment, and keep a row of each run in benchmark/results/."""

    experiment: tyro.conf.Positional[Literal[*EXPERIMENTS]]
    """which experiment"""
    dry_run: bool = False
    """print the commands of the runs that are missing, and run none"""
    only: str = ""
    """run only those whose command contains this"""


def main(args: Args) -> int:
    """Returns the exit code: 1 if a run failed, 2 if --only fits none, 130 after Ctrl-C."""
    chosen = [one for one in EXPERIMENTS[args.experiment]() if args.only in one.command]
    if not chosen:
        print(f"error: --only {args.only}: give a part of a command that --dry-run prints.", file=sys.stderr)
        return 2
    try:
        return min(run_all(args.experiment, chosen, args.dry_run), 1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
