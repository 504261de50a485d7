"""The experiments, and the runs of each of them.

    ./benchmark.sh staleness --dry-run     # print the commands
    ./benchmark.sh staleness               # run what is missing, one run per core

Bandwidths are tuned on environments and seeds that are never reported. `quick` takes the scripts' defaults instead.
"""

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Literal

import tyro

from benchmark.runs import Missing, Run, finished, run_all
from benchmark.scripts import ROOT

METHODS = ("gipo", "clip", "sapo", "tis", "decoupled", "none")
PAIR = METHODS[:2]
# by the first four letters of an environment's id: the baseline's subcommand and GIPO's script
DOMAINS = {"ALE/": ("atari", "gipo_atari.py"), "Mini": ("minigrid", "gipo_minigrid_vision.py")}
CONTINUOUS = ("continuous", "gipo_continuous.py")
PEERS, RLLIB, TRL = (ROOT / f".venv-{name}" / "bin" / "python" for name in ("peers", "rllib", "trl"))

LOCOMOTION = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
ANT = ("Ant-v5",)
TASKS = ("reach", "button-press-topdown", "drawer-close", "window-open", "door-open")
METAWORLD = tuple(f"Meta-World/{task}-v3" for task in TASKS)
MINIGRID = ("MiniGrid-Fetch-5x5-N2-v0", "MiniGrid-GoToDoor-5x5-v0", "MiniGrid-GoToObject-6x6-N2-v0")
ATARI = ("ALE/Pong-v5", "ALE/Breakout-v5")
CLASSIC = ("CartPole-v1", "Pendulum-v1")  # for RLlib
QUICK = {"Hopper-v5": 100_000, "MiniGrid-Empty-5x5-v0": 20_000}  # steps
REPORTED = (*LOCOMOTION, *ANT, *METAWORLD, *MINIGRID, *ATARI, *CLASSIC, *QUICK)

STEPS = 150_000
FREEZE_AT = 24 * 2048  # so that 24 rollouts of 2048 steps hold all that was collected before
KL = 0.1  # weight of the KL term in runs with KL
SEEDS = tuple(range(11, 200, 20))  # tuning has others
FIVE, THREE = SEEDS[:5], SEEDS[:3]

TUNING = ("Swimmer-v5", "Reacher-v5", "InvertedDoublePendulum-v5")
TUNING_SEEDS = (1001, 1002)
RATE = 1e-3
# the candidates of tuning; plain importance sampling has no bandwidth, so its learning rate varies
GRID: dict[str, list[dict[str, float]]] = {
    "gipo": [{"sigma": sigma} for sigma in (0.3, 0.5, 1.0)],
    "clip": [{"clip_coef": eps} for eps in (0.1, 0.2, 0.3)],
    "sapo": [{"sapo_tau": tau, "sapo_tau_neg": 1.05 * tau} for tau in (0.5, 1.0, 2.0)],
    "tis": [{"tis_cap": cap} for cap in (1.0, 2.0, 5.0)],
    "decoupled": [{"clip_coef": eps, "tis_cap": cap} for eps, cap in ((0.1, 1.0), (0.2, 1.0), (0.2, 2.0))],
    "none": [{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)],
}
WIDTHS = (0.3, 0.5, 1.0)  # of GIPO's weight, per dimension of an action
DIMENSIONS = {"Swimmer-v5": 2, "Reacher-v5": 2, "InvertedDoublePendulum-v5": 1}  # of an action
DIMENSIONS |= {"HalfCheetah-v5": 6, "Hopper-v5": 3, "Walker2d-v5": 6}
RLLIB_RATES = (5e-4, 1e-3)
TRL_LOSSES = ("gipo", "clip", "sapo", "vespo")
Groups = dict[Hashable, list[Run]]


def words(flags: dict) -> tuple[str, ...]:
    """Flags as words of a command. A flag that is None is left out."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in flags.items() if value is not None)
    return tuple(word for flag, x in pairs for word in (flag, f"{x:g}" if isinstance(x, float) else str(x)))


def run(method: str, env_id: str, seed: int, **flags) -> Run:
    """One run of a method with these flags, without the evaluation at its end; equal flags give equal commands."""
    domain, gipo = DOMAINS.get(env_id[:4], CONTINUOUS)
    flags = {"env_id": env_id, "seed": seed, **dict(sorted(flags.items())), "eval_episodes": 0}
    if method == "gipo":
        return Run(method, gipo, words(flags))
    if method == "clip":
        return Run(method, "ppo_baseline.py", (domain, *words(flags)))
    return Run(method, "benchmark/variants.py", (method, "ppo_baseline.py", domain, *words(flags)))


# ------------------------------------------------------ Tuning -------------------------------------------------------
def candidate(method: str, i: int, kl: float) -> dict[str, float]:
    """The flags of a method's candidate number i."""
    return {"learning_rate": RATE, **GRID[method][i], "kl_coef": kl}


def tuning() -> Groups:
    """The runs of each candidate (method, its number in GRID, KL coefficient)."""
    flags = {(m, i, kl): candidate(m, i, kl) for m in METHODS for i in range(len(GRID[m])) for kl in (0, KL)}
    places = list(itertools.product(TUNING_SEEDS, TUNING, (1, 8)))
    return {
        name: [run(name[0], env_id, seed, total_timesteps=STEPS, buffer_epochs=k, **own) for seed, env_id, k in places]
        for name, own in flags.items()
    }


def group_scores(experiment: str, groups: Groups) -> dict[Hashable, float]:
    """The score of each group of runs: the mean of their final returns, scaled to [0, 1] within each environment.

    0 is the worst run of all groups and 1 the best. A run that diverged counts as 0.
    """
    found = finished()
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


def tuned(method: str, kl: float = KL) -> dict[str, float]:
    """A method's best flags with this KL coefficient. They were chosen at 0 or at KL."""
    known = group_scores("tune", tuning())
    best = max(range(len(GRID[method])), key=lambda i: known[method, i, KL if kl else 0])
    return candidate(method, best, kl)


def per_dimension(width: float, env_id: str, seed: int, k: int) -> Run:
    """A run of GIPO with KL. Its sigma is `width` times the square root of the number of an action's dimensions.

    The log-ratio of a whole action spreads that much further than the log-ratio of one dimension.
    """
    sigma = round(width * math.sqrt(DIMENSIONS[env_id]), 3)
    flags = {"total_timesteps": STEPS, "buffer_epochs": k, "learning_rate": RATE, "kl_coef": KL, "sigma": sigma}
    return run("gipo", env_id, seed, **flags)


def width_tuning() -> Groups:
    """The runs of each width per dimension."""
    places = list(itertools.product(TUNING, TUNING_SEEDS, (1, 8)))
    return {width: [per_dimension(width, *place) for place in places] for width in WIDTHS}


def distributed(surrogate: str, env_id: str, seed: int, rate: float, reuse: int) -> Run:
    """A run of RLlib with two actors: GIPO's loss with a KL term, or APPO's loss without one."""
    flags = {"surrogate": surrogate, "env_id": env_id, "seed": seed, "buffer_reuse": reuse, "learning_rate": rate}
    flags |= {"kl_coef": KL if surrogate == "gipo" else 0, "total_timesteps": 100_000}
    flags |= {"reward_scale": 0.01 if env_id == "Pendulum-v1" else None}
    return Run(surrogate, "gipo_rllib.py", words(flags), RLLIB)


def rllib_tuning() -> Groups:
    """The runs of each (surrogate, learning rate)."""
    names = itertools.product(PAIR, RLLIB_RATES)
    return {(m, rate): [distributed(m, env_id, TUNING_SEEDS[0], rate, 2) for env_id in CLASSIC] for m, rate in names}


# ---------------------------------------------------- Experiments ----------------------------------------------------
def grid(methods, seeds, envs, dials, kl: float = KL, **flags) -> Iterator[Run]:
    """Runs of tuned methods by seed, dial (a set of flags) and environment. Methods vary fastest."""
    best = {method: tuned(method, kl) for method in methods}
    for seed, dial, env_id, method in itertools.product(seeds, dials, envs, methods):
        yield run(method, env_id, seed, **({"total_timesteps": STEPS} | best[method] | flags | dial))


def buffers(*sizes: int) -> list[dict]:
    """Dials: the size K of the replay buffer."""
    return [{"buffer_epochs": k} for k in sizes]


def tune() -> Iterator[Run]:
    yield from itertools.chain(*tuning().values())


def staleness() -> Iterator[Run]:
    yield from grid(METHODS, SEEDS, LOCOMOTION, buffers(1, 8, 32))
    yield from grid(PAIR, SEEDS, LOCOMOTION, buffers(1, 8, 32), kl=0)
    yield from grid(METHODS[2:], FIVE, LOCOMOTION, buffers(1, 8, 32), kl=0)


def ablation() -> Iterator[Run]:
    """V-trace is the scripts' default. Its flag is left out, so that these runs equal those of `staleness`.

    Lines that the scripts' defaults follow from have ten seeds.
    """
    for source, kl in itertools.product((None, "recompute"), (0, 0.03, KL, 0.3)):
        seeds = FIVE if source or kl > KL else SEEDS
        yield from grid(["gipo"], seeds, LOCOMOTION, buffers(1, 8, 32), kl, advantage_source=source)
    for sigma in (0.2, 0.5, 1.0, 2.0):
        yield from grid(["gipo"], SEEDS if sigma == 0.5 else FIVE, LOCOMOTION, buffers(1, 8), sigma=sigma)
    yield from grid(["clip"], SEEDS, LOCOMOTION, buffers(1, 8, 32), kl=0)
    yield from grid(["clip"], FIVE, LOCOMOTION, buffers(1, 8, 32), kl=0, advantage_source="recompute")


def width_tune() -> Iterator[Run]:
    yield from itertools.chain(*width_tuning().values())


def width() -> Iterator[Run]:
    known = group_scores("width-tune", width_tuning())
    for seed, k, env_id in itertools.product(SEEDS, (1, 8, 32), LOCOMOTION):
        yield per_dimension(max(WIDTHS, key=known.get), env_id, seed, k)


def freeze() -> Iterator[Run]:
    yield from grid(METHODS, FIVE, LOCOMOTION, buffers(24), freeze_buffer_at=FREEZE_AT)
    yield from grid(PAIR, FIVE, LOCOMOTION, buffers(24), kl=0, freeze_buffer_at=FREEZE_AT)


def lag() -> Iterator[Run]:
    yield from grid(METHODS, FIVE, LOCOMOTION, [{"policy_lag": n or None} for n in (0, 2, 8)], buffer_epochs=1)


def ant() -> Iterator[Run]:
    yield from grid(METHODS[:3], FIVE, ANT, buffers(1, 8), total_timesteps=2 * STEPS)


def metaworld() -> Iterator[Run]:
    methods = ("gipo", "clip", "sapo", "none")
    large = {"num_envs": 8, "num_steps": 64, "buffer_epochs": 40}
    yield from grid(methods, THREE, METAWORLD, [large], total_timesteps=300_000)
    # the stale regime of the method's authors: new data is a two-thousandth of the buffer
    small = {"num_envs": 1, "num_steps": 10, "buffer_epochs": 2000, "minibatch_size": 512, "num_minibatches": 1}
    yield from grid(methods, THREE, (METAWORLD[0], METAWORLD[-1]), [small], total_timesteps=100_000)


def peer(algorithm: str, env_id: str, seed: int, steps: int) -> Run:
    """A method of Stable-Baselines3, at its defaults."""
    flags = {"algorithm": algorithm, "env_id": env_id, "seed": seed, "total_timesteps": steps}
    return Run(f"sb3-{algorithm}", "benchmark/sb3_agent.py", words(flags), PEERS)


def peers() -> Iterator[Run]:
    for seed, env_id, algorithm in itertools.product(FIVE, LOCOMOTION, ("ppo", "sac")):
        yield peer(algorithm, env_id, seed, STEPS)


def minigrid() -> Iterator[Run]:
    dials = [{"buffer_epochs": k, "policy_lag": lag} for k, lag in ((1, None), (32, None), (1, 8))]
    yield from grid(PAIR, THREE, MINIGRID, dials, learning_rate=None, total_timesteps=None)


def atari() -> Iterator[Run]:
    yield from grid(PAIR, THREE, ATARI, buffers(8), learning_rate=None, total_timesteps=1_000_000)


def rllib_tune() -> Iterator[Run]:
    yield from itertools.chain(*rllib_tuning().values())


def rllib() -> Iterator[Run]:
    known = group_scores("rllib-tune", rllib_tuning())
    rates = {method: max(RLLIB_RATES, key=lambda rate: known[method, rate]) for method in PAIR}
    for seed, reuse, env_id, method in itertools.product(THREE, (1, 2, 8), CLASSIC, PAIR):
        yield distributed(method, env_id, seed, rates[method], reuse)


def llm() -> Iterator[Run]:
    """A tiny language model sorts digits. GIPO has the defaults of gipo_trl.py, the other losses those of TRL."""
    dials = ((1, 0), (8, 0), (32, 0), (1, 8), (1, 32))
    for seed, (k, lag), kl, loss in itertools.product(THREE, dials, (KL, 0), TRL_LOSSES):
        flags = {"surrogate": loss, "seed": seed, "buffer_epochs": k, "policy_lag": lag, "kl_coef": kl}
        yield Run(loss, "gipo_trl.py", words(flags), TRL)


def quick() -> Iterator[Run]:
    """The scripts' defaults, in about five minutes on two cores. No Atari game is learned in that time."""
    for seed, k, (env_id, steps), method in itertools.product(THREE, (1, 8), QUICK.items(), PAIR):
        yield run(method, env_id, seed, total_timesteps=steps, buffer_epochs=k)


ALL = (tune, staleness, ablation, width_tune, width, freeze, lag, ant, metaworld, peers, minigrid, atari)
ALL += (rllib_tune, rllib, llm, quick)
EXPERIMENTS = {experiment.__name__.replace("_", "-"): experiment for experiment in ALL}


@dataclass
class Args:
    """Run the missing runs of an experiment, and keep a row of each in benchmark/results/."""

    experiment: tyro.conf.Positional[Literal[*EXPERIMENTS]]
    """name of the experiment"""
    dry_run: bool = False
    """print the commands of the missing runs, and run none of them"""
    only: str = ""
    """run only the commands that contain this text"""


def main(args: Args) -> int:
    """Returns the exit code: 1 if a run failed, 2 if tuning is missing or --only fits no run, 130 after Ctrl-C."""
    try:
        chosen = [one for one in EXPERIMENTS[args.experiment]() if args.only in one.command]
    except Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not chosen:
        print(f"error: --only {args.only}: give a part of a command that --dry-run prints.", file=sys.stderr)
        return 2
    try:
        workers = 1 if args.experiment.startswith("rllib") else None  # because each run starts processes of its own
        return min(run_all(args.experiment, chosen, args.dry_run, workers), 1)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
