"""The experiments, and the runs of each of them.

    ./benchmark.sh staleness --dry-run     # print the commands
    ./benchmark.sh staleness               # run what is missing, one run per core

Methods have the flags that `tune` chose for them. In discrete domains, which `tune` does not have, and in `quick` they
have the scripts' defaults. Tuning and reporting share no seed.
"""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import tyro

from benchmark import llm_tuning, tuning
from benchmark.intervals import iqm
from benchmark.measurements import complete, scale, scored
from benchmark.methods import CONTINUOUS, name, run
from benchmark.runner import ROOT, Missing, Run, run_all, unfinished
from benchmark.tuning import KL_TERMS, METHODS, SIZES

PAIR = METHODS[:2]  # GIPO and PPO-clip
PEERS, RLLIB = (ROOT / f".venv-{venv}" / "bin" / "python" for venv in ("peers", "rllib"))

LOCOMOTION = tuning.TASKS
WITH_ANT = (*LOCOMOTION, "Ant-v5")
METAWORLD = ("Meta-World/door-open-v3", "Meta-World/window-open-v3")
FETCH, PONG = "MiniGrid-Fetch-5x5-N2-v0", "ALE/Pong-v5"
CLASSIC = ("CartPole-v1", "Pendulum-v1")  # for RLlib
QUICK = {"Hopper-v5": 100_000, "MiniGrid-Empty-5x5-v0": 20_000}  # steps
REPORTED = (*WITH_ANT, *METAWORLD, FETCH, PONG, *CLASSIC, *QUICK)

TEN = tuple(range(11, 200, 20))  # seeds
FIVE, THREE = TEN[:5], TEN[:3]
LARGE = (1, 8, 32)  # sizes K of the replay buffer
STEPS = 150_000
FREEZE_AT = 24 * 2048  # so that 24 rollouts of 2048 steps hold all that was collected before
MILLION = 1_000_000
EVALUATED = {"eval_episodes": 20}  # measures the policy that learns, which is not always the one that acts
CLEANRL = {"num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "update_epochs": 10, "learning_rate": 3e-4}
CLEANRL_CLIP = {"clip_coef": 0.2, "ratio": "action", "kl_coef": 0.0}
RLLIB_RATES = (5e-4, 1e-3)
LLM_RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)


def crossed(lines: Iterable[tuple[str, str, dict]], seeds, envs, dials=({},), steps=STEPS) -> Iterator[Run]:
    """Runs of (line, method, flags) by seed, dial (more flags) and environment. Lines vary fastest."""
    lines = list(lines)
    for seed, dial, env_id, (line, method, flags) in itertools.product(seeds, dials, envs, lines):
        yield run(method, env_id, seed, line, **({"total_timesteps": steps} | flags | dial))


def chosen(methods: Iterable[str], **more) -> list[tuple[str, str, dict]]:
    """Lines of methods with their choice, one setting for all K."""
    return [(name(method), method, tuning.choice(method) | more) for method in methods]


def sizes(*ks: int) -> list[dict]:
    return [{"buffer_epochs": k} for k in ks]


def staleness() -> Iterator[Run]:
    """One setting for all K, and beside it the best setting for K = 1 and for K = 8."""
    yield from crossed(chosen(METHODS), TEN, LOCOMOTION, sizes(*LARGE))
    for k in SIZES:
        best = [(f"{name(method)}, best for its K", method, tuning.choice(method, k)) for method in METHODS]
        yield from crossed(best, FIVE, LOCOMOTION, sizes(k))


def fresh_clip() -> list[Run]:
    """What has the score 1: PPO-clip on fresh data."""
    return list(crossed(chosen(["clip"]), TEN, LOCOMOTION, sizes(1)))


def evaluated_clip() -> list[Run]:
    """What has the score 1 where the policy that learns is measured: PPO-clip without a lag."""
    return list(crossed(chosen(["clip"], buffer_epochs=1, **EVALUATED), FIVE, LOCOMOTION))


def by_size() -> pd.DataFrame:
    """The scores of `staleness` with one setting for all K."""
    plan = list(crossed(chosen(METHODS), TEN, LOCOMOTION, sizes(*LARGE)))
    return scored(complete(plan, "staleness"), scale(fresh_clip(), "staleness"))


def best_size(table: pd.DataFrame, method: str) -> int:
    """The K with the best score of a method."""
    own = table[table.method == method].groupby("buffer_epochs").value
    return int(own.apply(iqm).idxmax())


def best_other(table: pd.DataFrame) -> str:
    """The method with the best score on old data, besides GIPO and PPO-clip. It has runs with every K."""
    known = table[~table.method.isin(PAIR)].groupby("method").filter(lambda own: set(own.buffer_epochs) >= set(LARGE))
    old = known[known.buffer_epochs > 1]
    if old.empty:
        raise Missing("no other method has runs with every K; run ./benchmark.sh staleness first.")
    return old.groupby("method").value.apply(iqm).idxmax()


def updates() -> Iterator[Run]:
    """More update epochs per iteration. Runs with 10, the default, are those of `staleness`; others are compiled."""
    epochs = [{}, *({"update_epochs": n, "compile": True} for n in (20, 40))]
    dials = [{"buffer_epochs": k} | more for k in LARGE for more in epochs]
    yield from crossed(chosen([*PAIR, best_other(by_size())]), FIVE, LOCOMOTION, dials)


def million() -> Iterator[Run]:
    """A million steps, next to PPO of others; at last the script as it is, with no flag but --env-id.

    The flags of CleanRL's PPO stand beside the choices, which were tuned for 150,000 steps: GIPO has its own weight and
    KL term with them. In Ant a narrower weight is tried too.
    """
    table, lines = by_size(), []
    for method in (*PAIR, best_other(table)):
        known = {best_size(table, method), *([1] if method in PAIR else [])}
        own = tuning.choice(method)
        lines += [(f"{name(method)}, K = {k}", method, own | {"buffer_epochs": k}) for k in sorted(known)]
    lines.append((f"{name('clip')}, CleanRL's flags", "clip", CLEANRL | CLEANRL_CLIP))
    gipo = tuning.choice("gipo") | CLEANRL
    lines.append((f"{name('gipo')}, CleanRL's flags", "gipo", gipo))
    narrow = (f"{name('gipo')}, CleanRL's flags, sigma 0.25", "gipo", gipo | {"sigma": 0.25})
    for seed in FIVE:
        yield from crossed(lines, [seed], WITH_ANT, [{"compile": True}], MILLION)
        yield from crossed([narrow], [seed], ["Ant-v5"], [{"compile": True}], MILLION)
        yield from (peer("ppo", env_id, seed, MILLION) for env_id in WITH_ANT)
    for env_id in WITH_ANT:
        yield Run("gipo", CONTINUOUS[1], {"env_id": env_id}, f"{name('gipo')}, no flags")


def ablation() -> Iterator[Run]:
    """From GIPO's choice one thing at a time, and the same for PPO-clip's KL term, clip and V-trace."""
    own, clip = tuning.choice("gipo"), tuning.choice("clip")
    other = {"action": "dimension", "dimension": "action"}[own["ratio"]]
    changes = {"GIPO": {}, f"ratio per {other}": {"ratio": other}}
    for term in KL_TERMS:
        text = f"KL {term['kl_coef']:g} to {term['kl_to']}" if term["kl_coef"] else "no KL"
        changes |= {} if term.items() <= own.items() else {text: {"kl_to": None} | term}
    changes |= {f"sigma {own['sigma'] * x:g}": {"sigma": own["sigma"] * x} for x in (0.5, 2.0)}
    changes["no V-trace"] = {"advantage_source": "recompute"}
    lines = [(line, "gipo", own | change) for line, change in changes.items()]
    lines.append((f"ratio per {other}, tuned for it", "gipo", tuning.choice("gipo", ratio=other)))
    lines.append(("weight only where r > 1", "one_sided", own))
    clips = {"PPO-clip": {}, "PPO-clip, no V-trace": {"advantage_source": "recompute"}}
    clips |= {f"PPO-clip, epsilon {2 * clip['clip_coef']:g}": {"clip_coef": 2 * clip["clip_coef"]}}
    clips |= {"PPO-clip, no KL": {"kl_coef": 0.0, "kl_to": None}} if clip["kl_coef"] else {}
    lines += [(line, "clip", clip | change) for line, change in clips.items()]
    yield from crossed(lines, FIVE, LOCOMOTION, sizes(8, 32))


def four() -> dict[str, None]:
    """GIPO, PPO-clip, the best other method on old data, and plain IS, which has no weight."""
    return dict.fromkeys([*PAIR, best_other(by_size()), "plain_is"])


def lag() -> Iterator[Run]:
    dials = [{"policy_lag": n or None} for n in (0, 2, 8)]
    yield from crossed(chosen(four(), buffer_epochs=1, **EVALUATED), FIVE, LOCOMOTION, dials)


def freeze() -> Iterator[Run]:
    own = chosen(four(), buffer_epochs=24, freeze_buffer_at=FREEZE_AT, **EVALUATED)
    yield from crossed(own, FIVE, LOCOMOTION)


def metaworld() -> Iterator[Run]:
    """Actions have four dimensions. Each unit of the ratio has the best setting of that unit."""
    units = itertools.product(PAIR, ("dimension", "action"))
    lines = [(f"{name(m)}, ratio per {ratio}", m, tuning.choice(m, ratio=ratio)) for m, ratio in units]
    large = {"num_envs": 8, "num_steps": 64, "buffer_epochs": 40}
    yield from crossed(lines, THREE, METAWORLD, [large], 300_000)


def defaults(methods: Iterable[str]) -> list[tuple[str, str, dict]]:
    """Lines of methods with the scripts' defaults."""
    return [(name(method), method, {}) for method in methods]


def discrete() -> list[tuple[str, str, dict]]:
    """The scripts' defaults, and PPO-clip with the KL term that GIPO has by default."""
    return [*defaults(PAIR), (f"{name('clip')} with KL", "clip", {"kl_coef": 0.1})]


def minigrid() -> Iterator[Run]:
    yield from crossed(discrete(), THREE, [FETCH], sizes(1, 32), steps=None)


def pong() -> Iterator[Run]:
    yield from crossed(discrete(), THREE, [PONG], [{"buffer_epochs": 8, "bfloat16": True}], MILLION)


def peer(algorithm: str, env_id: str, seed: int, steps: int) -> Run:
    """A method of Stable-Baselines3, at its defaults."""
    flags = {"algorithm": algorithm, "env_id": env_id, "seed": seed, "total_timesteps": steps}
    method = f"sb3-{algorithm}"
    return Run(method, "benchmark/sb3_agent.py", flags, name(method), PEERS)


def peers() -> Iterator[Run]:
    for seed, env_id, algorithm in itertools.product(FIVE, LOCOMOTION, ("ppo", "sac")):
        yield peer(algorithm, env_id, seed, STEPS)


def distributed(surrogate: str, env_id: str, seed: int, rate: float, reuse: int, line: str) -> Run:
    """A run of RLlib with two actors: GIPO's loss with a KL term, or APPO's loss without one."""
    flags = {"surrogate": surrogate, "env_id": env_id, "seed": seed, "buffer_reuse": reuse, "learning_rate": rate}
    flags |= {"kl_coef": 0.1 if surrogate == "gipo" else 0, "total_timesteps": 100_000}
    flags["reward_scale"] = {"CartPole-v1": 0.1, "Pendulum-v1": 0.01}[env_id]
    return Run(surrogate, "gipo_rllib.py", flags, line, RLLIB)


def rllib_tune() -> Iterator[Run]:
    for surrogate, rate, env_id in itertools.product(PAIR, RLLIB_RATES, CLASSIC):
        yield distributed(surrogate, env_id, tuning.SEEDS[0], rate, 2, "tuning")


def rllib() -> Iterator[Run]:
    """Each loss has the learning rate with the better mean rank over both tasks."""
    known = complete(rllib_tune(), "rllib-tune")
    ranks = known.assign(rank=known.groupby("env_id").value.rank())
    rates = ranks.groupby(["method", "learning_rate"])["rank"].mean()
    for seed, reuse, env_id, method in itertools.product(THREE, (1, 2, 8), CLASSIC, PAIR):
        line = "clip of APPO" if method == "clip" else name(method)
        yield distributed(method, env_id, seed, rates[method].idxmax(), reuse, line)


def sorting(staleness: Iterable[int], seeds: Iterable[int], **more) -> Iterator[Run]:
    """Language models that sort digits; each loss has its choice."""
    for seed, steps, loss in itertools.product(seeds, staleness, llm_tuning.BANDWIDTHS):
        yield llm_tuning.run(loss, seed, steps, name(loss), **(llm_tuning.choice(loss) | more))


def llm() -> Iterator[Run]:
    """Completions wait in a queue."""
    yield from sorting((0, 32, 128), FIVE)


def llm_rates() -> Iterator[Run]:
    """Which learning rates each loss stands, with the rest of its choice; and GIPO with its best KL weight above 0."""
    for rate in LLM_RATES:
        yield from sorting([llm_tuning.STALENESS], THREE, learning_rate=rate)
        pulled = llm_tuning.choice("gipo") | {"kl_coef": 0.3, "learning_rate": rate}
        line = f"{name('gipo')}, KL 0.3"
        yield from (llm_tuning.run("gipo", seed, llm_tuning.STALENESS, line, **pulled) for seed in THREE)


def quick() -> Iterator[Run]:
    """The scripts' defaults, in about five minutes on two cores. No Atari game is learned in that time."""
    for env_id, steps in QUICK.items():
        yield from crossed(defaults(PAIR), THREE, [env_id], sizes(1, 8), steps)


ALL = (staleness, updates, million, ablation, lag, freeze, metaworld, minigrid, pong)
ALL += (peers, rllib_tune, rllib, llm, llm_rates, quick)
EXPERIMENTS = {"tune": tuning.plan, "llm-tune": llm_tuning.plan} | {one.__name__.replace("_", "-"): one for one in ALL}


@dataclass
class Args:
    """Run the missing runs of an experiment, and keep a row of each in benchmark/rows/."""

    experiment: tyro.conf.Positional[Literal[*EXPERIMENTS]]
    """name of the experiment"""
    dry_run: bool = False
    """print the commands of the missing runs, and run none of them"""
    only: str = ""
    """run only the commands that contain this text"""


def main(args: Args) -> int:
    """Returns the exit code: 1 if a run failed, 2 if rows are missing or --only fits no run, 130 after Ctrl-C."""
    workers = 1 if args.experiment.startswith("rllib") else None  # because each run starts processes of its own
    try:
        plan = [one for one in EXPERIMENTS[args.experiment]() if args.only in one.command]
        if not plan:
            print(f"error: --only {args.only}: give a part of a command that --dry-run prints.", file=sys.stderr)
            return 2
        while missing := unfinished(plan):
            if args.dry_run:
                print(*(one.command for one in missing), sep="\n", flush=True)
                break
            if run_all(args.experiment, missing, workers):
                return 1
            plan = [one for one in EXPERIMENTS[args.experiment]() if args.only in one.command]  # tuning has rounds
    except Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the commands has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
