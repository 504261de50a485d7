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

from benchmark.runs import Missing, Run, rows, run_all
from benchmark.scripts import ROOT

GIPO = {"continuous": "gipo_continuous.py", "atari": "gipo_atari.py", "minigrid": "gipo_minigrid_vision.py"}
STEPS = 150_000
ATARI_STEPS = 1_000_000
RLLIB_STEPS = 100_000
METAWORLD_STEPS = 300_000
QUICK_STEPS = 100_000
QUICK_STEPS_MINIGRID = 20_000
LOCOMOTION = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")

FREEZE_AT = 24 * 2048  # 24 rollouts of 2048 steps hold all that is collected until then

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
# script and its surrogate; every other method is a surrogate of ppo_baseline.py
OWN_SCRIPTS = {
    "decoupled": ("benchmark/ppo_decoupled.py", "clip"),
    "scaled-rate": ("benchmark/ppo_scaled_rate.py", "none"),
}
PEERS, RLLIB = (ROOT / f".venv-{name}" / "bin" / "python" for name in ("peers", "rllib"))
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
        script, surrogate = OWN_SCRIPTS.get(method, ("ppo_baseline.py", method))
        arguments = (domain, "--surrogate", surrogate)
    arguments += ("--env-id", env_id, "--seed", seed, *flags, "--eval-episodes", 0)
    return Run(method, script, tuple(map(str, arguments)))


def tune() -> Iterator[Run]:
    for method in METHODS:
        for env_id, epochs, flags in itertools.product(TUNING, TUNING_EPOCHS, candidates(method)):
            yield run(method, env_id, TUNING_SEED, "--total-timesteps", STEPS, "--buffer-epochs", epochs, *flags)


def tuning_scores() -> dict[tuple[str, tuple[str, ...]], float]:
    """The score of every candidate (method, flags): the mean over K and tuning environments, scaled to [0, 1].

    0 and 1 are the worst and the best final return that any method reached in that environment while tuning; a run
    that diverged counts as 0.
    """
    found = {known["command"]: known for known in rows("tune")}
    runs = list(tune())
    missing = [one.command for one in runs if one.command not in found]
    if missing:
        raise Missing(f"{len(missing)} runs of the tuning are missing; run ./benchmark.sh tune first.")
    returns = defaultdict(list)
    for one in runs:
        known = found[one.command]
        if known["final_return"]:
            returns[known["env_id"]].append(float(known["final_return"]))

    def scaled(known):
        low, high = min(returns[known["env_id"]]), max(returns[known["env_id"]])
        return (float(known["final_return"]) - low) / (high - low) if known["final_return"] else 0.0

    def score(method, flags):
        own = [one for one in runs if one.method == method and one.arguments[-2 - len(flags) : -2] == flags]
        return mean(scaled(found[one.command]) for one in own)

    return {(method, flags): score(method, flags) for method in METHODS for flags in candidates(method)}


def tuned(method: str) -> tuple[str, ...]:
    """The best of a method's candidates."""
    known = tuning_scores()
    return max(candidates(method), key=lambda flags: known[method, flags])


def bandwidth(method: str) -> tuple[str, ...]:
    """A method's tuned flags without the learning rate, which other domains have their own of."""
    return tuned(method)[:-2]


def grid(methods, seeds, *dials, envs=LOCOMOTION, steps=STEPS) -> Iterator[Run]:
    """Tuned methods on the environments under every dial, a tuple of flags; all methods of a seed side by side."""
    flags = {method: tuned("gipo" if method == "scaled-rate" else method) for method in methods}
    for seed, dial, env_id, method in itertools.product(seeds, dials, envs, methods):
        yield run(method, env_id, seed, "--total-timesteps", steps, *dial, *flags[method])


def buffers(*sizes: int) -> list[tuple[str, int]]:
    """Dials: the size K of the replay buffer."""
    return [("--buffer-epochs", k) for k in sizes]


def staleness() -> Iterator[Run]:
    yield from grid(COMPARED, SEEDS, *buffers(1, 8, 32))
    yield from grid(("scaled-rate",), SEEDS, *buffers(1, 8, 32))
    yield from grid(("dual-clip", "spo"), SEEDS, *buffers(1, 8))
    yield from grid(COMPARED, SEEDS, *buffers(2, 4, 16))


def ant() -> Iterator[Run]:
    yield from grid(("gipo", "clip", "sapo", "tis"), SEEDS, *buffers(1, 8, 32), envs=("Ant-v5",), steps=2 * STEPS)


def freeze() -> Iterator[Run]:
    yield from grid(COMPARED, SEEDS, *(("--buffer-epochs", k, "--freeze-buffer-at", FREEZE_AT) for k in (8, 24)))


def lag() -> Iterator[Run]:
    yield from grid(("gipo", "clip", "tis", "decoupled"), SEEDS[:3], *(("--policy-lag", n) for n in (0, 2, 8, 16)))


def sigma() -> Iterator[Run]:
    widths, rate = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 2), tuned("gipo")[-2:]
    for seed, k, env_id, width, share in itertools.product(SEEDS[:3], (1, 8), LOCOMOTION, widths, (1, 0.5)):
        flags = ("--total-timesteps", STEPS, "--buffer-epochs", k, *rate)
        yield run("gipo", env_id, seed, *flags, "--sigma", width, "--sigma-neg", f"{width * share:g}")


def discrete(method: str, env_id: str, seed: int, k: int, domain: str, *flags) -> Run:
    """A run with discrete actions: the bandwidth that tuning chose, and the domain's common learning rate."""
    return run(method, env_id, seed, *flags, "--buffer-epochs", k, *bandwidth(method), domain=domain)


def minigrid() -> Iterator[Run]:
    for seed, k, method in itertools.product(SEEDS[:3], (1, 8, 32), COMPARED):
        yield discrete(method, "MiniGrid-Fetch-5x5-N2-v0", seed, k, "minigrid")
    envs = ("MiniGrid-GoToObject-6x6-N2-v0", "MiniGrid-GoToDoor-5x5-v0")
    for seed, env_id, method in itertools.product(SEEDS[:3], envs, ("gipo", "clip")):
        yield discrete(method, env_id, seed, 8, "minigrid")


def metaworld() -> Iterator[Run]:
    # the stale regime of the method's authors: a buffer of 20,000 transitions, rollouts of an episode, batches of 512
    regime = ("--num-envs", 1, "--num-steps", 512, "--num-minibatches", 1, "--buffer-epochs", 40)
    tasks = ("reach-v3", "button-press-topdown-v3", "drawer-close-v3", "window-open-v3")
    envs = [f"Meta-World/{task}" for task in tasks]
    yield from grid(("gipo", "clip"), SEEDS[:3], regime, envs=envs, steps=METAWORLD_STEPS)


def atari() -> Iterator[Run]:
    for seed, game in ((SEEDS[0], "Pong"), (SEEDS[1], "Pong"), (SEEDS[0], "Breakout"), (SEEDS[0], "Freeway")):
        for k, method in itertools.product((1, 8), ("gipo", "clip")):
            yield discrete(method, f"ALE/{game}-v5", seed, k, "atari", "--total-timesteps", ATARI_STEPS)


def peers() -> Iterator[Run]:
    for seed, env_id, algorithm in itertools.product(SEEDS[:3], LOCOMOTION, ("ppo", "sac")):
        arguments = ("--algorithm", algorithm, "--env-id", env_id, "--seed", seed, "--total-timesteps", STEPS)
        yield Run(f"sb3-{algorithm}", "benchmark/sb3_agent.py", tuple(map(str, arguments)), PEERS)


def rllib() -> Iterator[Run]:
    """Two actors on CartPole: both losses at growing buffers; the lag by size and reuse; a single actor."""

    def distributed(surrogate, seed, batches, reuse, actors=2):
        flags = ("--surrogate", surrogate, "--seed", seed, "--buffer-batches", batches, "--buffer-reuse", reuse)
        flags += ("--env-id", "CartPole-v1", "--num-env-runners", actors, "--total-timesteps", RLLIB_STEPS)
        return Run(surrogate, "gipo_rllib.py", tuple(map(str, flags)), RLLIB)

    sizes = (1, 8, 32)
    for seed, batches, surrogate in itertools.product(SEEDS[:3], sizes, ("gipo", "clip")):
        yield distributed(surrogate, seed, batches, 8)
    for batches, reuse in itertools.product(sizes, (1, 2)):
        yield distributed("gipo", SEEDS[0], batches, reuse)
    yield distributed("gipo", SEEDS[0], 8, 8, actors=1)


def quick() -> Iterator[Run]:
    """What fits into ten minutes of two cores; no Atari game is learned in that time."""
    yield from grid(("gipo", "clip"), SEEDS[:3], *buffers(1, 8), envs=("Hopper-v5",), steps=QUICK_STEPS)
    for seed, k, method in itertools.product(SEEDS[:3], (1, 8), ("gipo", "clip")):
        flags = ("--total-timesteps", QUICK_STEPS_MINIGRID)
        yield discrete(method, "MiniGrid-Empty-5x5-v0", seed, k, "minigrid", *flags)


ALL = (tune, staleness, ant, freeze, lag, sigma, minigrid, metaworld, atari, peers, rllib, quick)
EXPERIMENTS = {experiment.__name__: experiment for experiment in ALL}


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
    """Returns the exit code: 1 if a run failed, 2 if tuning is missing or --only fits none, 130 after Ctrl-C."""
    try:
        chosen = [one for one in EXPERIMENTS[args.experiment]() if args.only in one.command]
    except Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not chosen:
        print(f"error: --only {args.only}: give a part of a command that --dry-run prints.", file=sys.stderr)
        return 2
    try:
        workers = 1 if args.experiment == "rllib" else None  # each run has processes of its own
        return min(run_all(args.experiment, chosen, args.dry_run, workers), 1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
