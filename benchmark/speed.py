"""Speed of the scripts next to that of their bare environments, and where the time goes.

    ./benchmark.sh speed            # one table on standard output, about half an hour on two idle cores

Each configuration runs in a process of its own: a warm-up, then a fixed number of timed iterations. The same process
then times the bare environment under random actions. The PPO of Stable-Baselines3 takes as many gradient steps, on
minibatches of the same size; it needs .venv-peers. The configurations take turns, so that a machine that changes its
speed changes all of them. The table shows medians. Compare ratios, not steps per second.
"""

import contextlib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro

from benchmark.experiments import PEERS
from benchmark.runner import ROOT

# title: script, flags, timed iterations
CONFIGURATIONS = {
    "HalfCheetah": ("gipo_continuous", "", 15),
    "HalfCheetah, --compile": ("gipo_continuous", "--compile", 15),
    "HalfCheetah, K = 8": ("gipo_continuous", "--buffer-epochs 8", 15),
    "HalfCheetah, K = 32": ("gipo_continuous", "--buffer-epochs 32", 15),
    "HalfCheetah, 10 x 32 minibatches of 64": ("gipo_continuous", "--num-minibatches 32", 15),
    "HalfCheetah, 10 x 32 minibatches of 64, --compile": ("gipo_continuous", "--num-minibatches 32 --compile", 15),
    "Meta-World reach": ("gipo_continuous", "--env-id Meta-World/reach-v3", 5),
    "Breakout": ("gipo_atari", "", 8),
    "Breakout, --compile": ("gipo_atari", "--compile", 8),
    "Breakout, K = 32": ("gipo_atari", "--buffer-epochs 32", 2),
    "Breakout, --bfloat16": ("gipo_atari", "--bfloat16", 1),  # slow on a CPU without AMX
    "MiniGrid Fetch": ("gipo_minigrid_vision", "", 20),
    "MiniGrid Fetch, --compile": ("gipo_minigrid_vision", "--compile", 20),
    "MiniGrid Fetch, K = 32": ("gipo_minigrid_vision", "--buffer-epochs 32", 10),
}
PEER = ", Stable-Baselines3"
COMPARED = ("HalfCheetah", "HalfCheetah, 10 x 32 minibatches of 64", "Breakout", "MiniGrid Fetch")
TITLES = (*CONFIGURATIONS, *(title + PEER for title in COMPARED))
PHASES = ("environment", "inference", "refresh", "update")
BARE_SECONDS = 5.0


def now() -> float:
    """The time in seconds, once the accelerator has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Adds up the seconds of each phase, by watching functions that `train` calls.

    A lap lasts from the beginning of a refresh to that of the next one. An update lasts from the end of the refresh to
    `diagnostics`; nothing in between is watched, so that compiled code stays as it is.
    """

    def __init__(self, module, args):
        self.seconds, self.laps, self.watching = Counter(), [], False
        domain, agent, make_envs = type(args), args.Agent, args.make_envs
        self.watch(module, "refresh_advantages", "refresh", before=self.lap)
        self.watch(module, "diagnostics", "rest", before=self.end_update)
        self.watch(agent, "get_action_and_value", "inference")

        def make_watched_envs(*args, **kwargs):
            envs = make_envs(*args, **kwargs)
            self.watch(envs, "step", "environment")
            return envs

        domain.make_envs = staticmethod(make_watched_envs)

    def watch(self, owner, name: str, phase: str, before=lambda *_: None):
        function = getattr(owner, name)

        @wraps(function)
        def watched(*args, **kwargs):
            # calls with gradients belong to the update, and calls by a watched function belong to that function
            if self.watching or (phase == "inference" and torch.is_grad_enabled()):
                return function(*args, **kwargs)
            before(*args)
            start, self.watching = now(), True
            result = function(*args, **kwargs)
            self.watching, self.end = False, now()
            self.seconds[phase] += self.end - start
            return result

        setattr(owner, name, watched)

    def lap(self, buffer, *_):
        self.buffer = buffer
        self.laps.append(Counter(self.seconds, time=now()))

    def end_update(self, *_):
        self.seconds["update"] += now() - self.end


def bare_speed(envs) -> float:
    """Environment steps per second under random actions, of the emulator's own vector or of one copy of any other."""
    copies = getattr(envs.unwrapped, "envs", None)
    env = copies[0] if copies else envs.unwrapped
    if type(env).__name__ == "PixelsAndWords":
        env = env.env  # drawing and packing are the script's own work
    size = 1 if copies else envs.num_envs
    env.reset(seed=1)
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(1000)]
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < BARE_SECONDS:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if copies and (terminated or truncated):
                env.reset()
        steps += size * len(actions)
    return steps / (time.perf_counter() - start)


def flags_of(title: str):
    """Module, flags and timed iterations of a configuration."""
    script, words, iterations = CONFIGURATIONS[title]
    module = import_module(script)
    return module, tyro.cli(module.Domain, args=[*words.split(), "--eval-episodes", "0"]), iterations


def measure(title: str):
    """Time one configuration in this process and print the result as a line of JSON."""
    module, args, iterations = flags_of(title)
    warmup, batch_size = args.buffer_epochs + 1, args.num_steps * args.num_envs  # then the buffer is full
    args.total_timesteps, args.checkpoint_interval = (warmup + iterations + 1) * batch_size, 10**6
    clock = Clock(module, args)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        module.train(args)
    first, last = clock.laps[warmup], clock.laps[warmup + iterations]
    elapsed = last["time"] - first["time"]
    found = {phase: (last[phase] - first[phase]) / elapsed for phase in PHASES}
    found |= {"steps/s": iterations * batch_size / elapsed, "bare": bare_speed(args.make_envs(args, args.num_envs, 1))}
    found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["buffer MB"] = sum(field.nbytes for field in vars(clock.buffer).values()) / 2**20
    print(json.dumps(found))


def command(title: str) -> list[str]:
    """The command that measures a configuration."""
    if not title.endswith(PEER):
        return [sys.executable, "-m", "benchmark.speed", "--measure", title]
    _, args, iterations = flags_of(title.removesuffix(PEER))
    batch_size = args.num_envs * args.num_steps // args.num_minibatches
    numbers = {"envs": args.num_envs, "steps": args.num_steps, "epochs": args.update_epochs, "batch": batch_size}
    numbers |= {"iterations": iterations, "threads": args.num_threads}
    words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    return [str(PEERS), "benchmark/sb3_speed.py", "--env-id", args.env_id, *words]


def table(measured: pd.DataFrame) -> str:
    """A table in Markdown of medians by title."""
    columns = {"steps/s": "{:,.0f}", "bare": "{:,.0f}", "ratio": "{:.1%}"} | dict.fromkeys((*PHASES, "rest"), "{:.0%}")
    columns |= {"peak MB": "{:,.0f}", "buffer MB": "{:,.0f}"}
    measured = measured.reindex(columns=["title", *columns])
    measured["ratio"] = measured["steps/s"] / measured.bare
    measured["rest"] = 1 - measured[[*PHASES]].sum(axis=1, min_count=1)
    medians = measured.groupby("title", sort=False).median()
    texts = {name: medians[name].map(text.format, na_action="ignore") for name, text in columns.items()}
    return pd.DataFrame(texts, dtype=object).fillna("").rename_axis("configuration").to_markdown(disable_numparse=True)


@dataclass
class Args:
    """Measure the speed of the scripts and print a table."""

    repetitions: int = 3
    """how often each configuration is measured; configurations take turns, and the table shows medians (1 to 5)"""
    only: str = ""
    """measure only configurations whose title contains this text"""
    measure: Literal["", *CONFIGURATIONS] = ""
    """measure one configuration once, in this process, and print it as JSON"""

    def __post_init__(self):
        self.titles = [title for title in TITLES if self.only in title]
        if not self.titles:
            raise ValueError(f"--only {self.only}: give a part of one of {', '.join(TITLES)}.")
        if self.repetitions < 1:
            raise ValueError(f"--repetitions {self.repetitions}: give 1 or more.")


def main(args: Args) -> int:
    """Returns the exit code: 1 if a configuration failed."""
    if args.measure:
        measure(args.measure)
        return 0
    found, failed = [], 0
    for repetition, title in itertools.product(range(args.repetitions), args.titles):
        start = command(title)
        if Path(start[0]).exists():
            print(f"{repetition + 1}/{args.repetitions} {title}", file=sys.stderr)
            result = subprocess.run(start, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if result.returncode == 0:
                found.append({"title": title} | json.loads(result.stdout.splitlines()[-1]))
            else:
                print(f"{title} failed", file=sys.stderr)
                failed = 1
        elif repetition == 0:
            print(f"{title} is skipped: ./benchmark.sh peers --dry-run makes its environment.", file=sys.stderr)
    if found:
        print(table(pd.DataFrame(found)))
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
