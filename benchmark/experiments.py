"""The experiments: which runs each of them consists of.

    ./benchmark.sh staleness --dry-run     # print the commands
    ./benchmark.sh staleness               # run what is missing, one run per core

TUNING_SEED chooses bandwidths and learning rates, on environments of their own; neither is ever reported.
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
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

DIMENSIONS = {"HalfCheetah-v5": 6, "Hopper-v5": 3, "Walker2d-v5": 6}  # of the actions
# what else is tried where GIPO falls short: on which methods, at which K
REMEDIES = {
    "a third of the learning rate": (("gipo", "clip"), (1, 8, 32)),
    "KL": (("gipo", "clip", "sapo", "tis", "none"), (1, 8, 32)),
    "3 epochs": (("gipo", "clip"), (1, 8, 32)),
    "stored advantages": (("gipo", "clip"), (8, 32)),
    "lambda 0.5": (("gipo", "clip"), (8, 32)),
    "a width for each dimension": (("gipo",), (1, 8, 32)),
}

# sample efficiency: who trains for how long, and the K to choose from
EFFICIENCY = {("gipo", STEPS // 2): (8, 32), ("clip", STEPS // 2): (1,), ("clip", STEPS): (1,)}

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
Groups = dict[Hashable, list[Run]]
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


def tuning() -> Groups:
    """The runs of each candidate (method, flags)."""

    def batch(method, flags):
        for env_id, k in itertools.product(TUNING, TUNING_EPOCHS):
            yield run(method, env_id, TUNING_SEED, "--total-timesteps", STEPS, "--buffer-epochs", k, *flags)

    return {(method, flags): list(batch(method, flags)) for method in METHODS for flags in candidates(method)}


def tune() -> Iterator[Run]:
    yield from itertools.chain(*tuning().values())


def scaled_means(experiment: str, groups: Groups) -> dict[Hashable, float]:
    """The score of each group of runs: the mean of their final returns, scaled to [0, 1] within each environment.

    0 and 1 are the worst and the best of all groups; a run that diverged counts as 0.
    """
    found = {known["command"]: known for known in rows(experiment)}
    runs = list(itertools.chain(*groups.values()))
    missing = sum(one.command not in found for one in runs)
    if missing:
        raise Missing(f"{missing} runs of {experiment} are missing; run ./benchmark.sh {experiment} first.")
    returns = defaultdict(list)
    for one in runs:
        known = found[one.command]
        if known["final_return"]:
            returns[known["env_id"]].append(float(known["final_return"]))

    def scaled(known):
        low, high = min(returns[known["env_id"]]), max(returns[known["env_id"]])
        return (float(known["final_return"]) - low) / (high - low) if known["final_return"] else 0.0

    return {name: mean(scaled(found[one.command]) for one in group) for name, group in groups.items()}


def tuning_scores() -> dict[tuple[str, tuple[str, ...]], float]:
    """The score of every candidate (method, flags)."""
    return scaled_means("tune", tuning())


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


def searching() -> Groups:
    """The runs of each (method, steps, flags): smaller rollouts, each with as many gradient steps as a whole one has.

    At equal steps PPO-clip at K = 1 may choose among these rollouts as GIPO may.
    """
    groups = {}
    for (method, steps), sizes in EFFICIENCY.items():
        for n, k, rate in itertools.product((256, 128, 64), sizes, RATES):
            flags = ("--num-steps", n, "--num-minibatches", n // 16, "--update-epochs", 2560 // n)
            flags += ("--buffer-epochs", k, *bandwidth(method), "--learning-rate", rate)
            groups[method, steps, flags] = [
                run(method, env_id, TUNING_SEED, "--total-timesteps", steps, *flags) for env_id in TUNING
            ]
    return groups


def search() -> Iterator[Run]:
    yield from itertools.chain(*searching().values())


def searched() -> dict[tuple[str, int], tuple]:
    """The best flags of each (method, steps)."""
    known = scaled_means("search", searching())
    return {own: max((key for key in known if key[:2] == own), key=known.get)[2] for own in EFFICIENCY}


def efficiency() -> Iterator[Run]:
    flags = searched()
    for seed, env_id, (method, steps) in itertools.product(SEEDS, LOCOMOTION, EFFICIENCY):
        yield run(method, env_id, seed, "--total-timesteps", steps, *flags[method, steps])


def ant() -> Iterator[Run]:
    yield from grid(("gipo", "clip", "sapo", "tis"), SEEDS, *buffers(1, 8, 32), envs=("Ant-v5",), steps=2 * STEPS)


def freeze() -> Iterator[Run]:
    yield from grid(COMPARED, SEEDS, *(("--buffer-epochs", k, "--freeze-buffer-at", FREEZE_AT) for k in (8, 24)))


def lag() -> Iterator[Run]:
    yield from grid(("gipo", "clip", "tis", "decoupled"), SEEDS[:3], *(("--policy-lag", n) for n in (0, 2, 8, 16)))


def remedy(name: str, method: str, env_id: str, seed: int, k: int) -> Run:
    """A tuned run with one change, which its method names."""
    *width, rate = tuned(method)
    joint = float(tuned("gipo")[1]) * DIMENSIONS[env_id] ** 0.5
    flags = {
        "a third of the learning rate": (*width, f"{float(rate) / 3:.1g}"),
        "KL": (*width, rate),
        "3 epochs": (*width, rate, "--update-epochs", 3),
        "stored advantages": (*width, rate, "--advantage-source", "stored"),
        "lambda 0.5": (*width, rate, "--gae-lambda", 0.5),
        "a width for each dimension": ("--sigma", f"{joint:.2f}", *width[2:], rate),
    }[name]
    made = run(method, env_id, seed, "--total-timesteps", STEPS, "--buffer-epochs", k, *flags)
    if name == "KL":
        made = replace(made, script="benchmark/with_kl.py", arguments=(made.script, *made.arguments))
    return replace(made, method=f"{method}: {name}")


def remedies() -> Iterator[Run]:
    for seed, (name, (methods, sizes)) in itertools.product(SEEDS[:3], REMEDIES.items()):
        for k, env_id, method in itertools.product(sizes, LOCOMOTION, methods):
            yield remedy(name, method, env_id, seed, k)


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
    for game, k, method in itertools.product(("Pong", "Breakout", "Freeway"), (1, 8), ("gipo", "clip")):
        yield discrete(method, f"ALE/{game}-v5", SEEDS[0], k, "atari", "--total-timesteps", ATARI_STEPS)


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


CONTINUOUS = (tune, staleness, remedies, search, efficiency, ant, freeze, lag, sigma)
ALL = (*CONTINUOUS, minigrid, metaworld, atari, peers, rllib, quick)
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
