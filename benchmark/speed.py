"""Speed of the scripts next to that of their bare environments, and where the time goes.

    ./benchmark.sh speed            # one table on standard output, about half an hour on two idle cores

The PPO of Stable-Baselines3 takes as many gradient steps as the script, on minibatches of the same size. It runs in a
virtual environment of its own, .venv-peers.

Each configuration runs in a process of its own: a warm-up, then a fixed number of timed iterations. The same process
then times the bare environment under random actions. The configurations take turns, so that a machine that changes its
speed changes all of them. The table shows medians. Compare ratios, not steps per second.
"""

import contextlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmark.experiments import PEERS
from benchmark.scripts import ROOT, load, run_body

# title: script, its flags or sb3 for the peer, timed iterations
CONFIGURATIONS = {
    "HalfCheetah": ("gipo_continuous", "", 15),
    "HalfCheetah, --compile": ("gipo_continuous", "--compile", 15),
    "HalfCheetah, K = 8": ("gipo_continuous", "--buffer-epochs 8", 15),
    "HalfCheetah, K = 32": ("gipo_continuous", "--buffer-epochs 32", 15),
    "HalfCheetah, K = 32, recompute": ("gipo_continuous", "--buffer-epochs 32 --advantage-source recompute", 15),
    "HalfCheetah, K = 64, stored": ("gipo_continuous", "--buffer-epochs 64 --advantage-source stored", 15),
    "HalfCheetah, 10 x 32 minibatches of 64": ("gipo_continuous", "--num-minibatches 32", 15),
    "HalfCheetah, 10 x 32 minibatches of 64, --compile": ("gipo_continuous", "--num-minibatches 32 --compile", 15),
    "Meta-World reach": ("gipo_continuous", "--env-id Meta-World/reach-v3", 5),
    "Breakout": ("gipo_atari", "", 8),
    "Breakout, --compile": ("gipo_atari", "--compile", 8),
    "Breakout, K = 8": ("gipo_atari", "--buffer-epochs 8", 4),
    "Breakout, K = 32": ("gipo_atari", "--buffer-epochs 32", 2),
    "Breakout, K = 32, recompute": ("gipo_atari", "--buffer-epochs 32 --advantage-source recompute", 2),
    "Breakout, --bfloat16": ("gipo_atari", "--bfloat16", 1),  # slow on a CPU without AMX
    "MiniGrid Fetch": ("gipo_minigrid_vision", "", 20),
    "MiniGrid Fetch, --compile": ("gipo_minigrid_vision", "--compile", 20),
    "MiniGrid Fetch, K = 8": ("gipo_minigrid_vision", "--buffer-epochs 8", 20),
    "MiniGrid Fetch, K = 32": ("gipo_minigrid_vision", "--buffer-epochs 32", 10),
    "MiniGrid Fetch, K = 32, recompute": (
        "gipo_minigrid_vision",
        "--buffer-epochs 32 --advantage-source recompute",
        10,
    ),
    "HalfCheetah, Stable-Baselines3": ("gipo_continuous", "sb3", 15),
    "Breakout, Stable-Baselines3": ("gipo_atari", "sb3", 8),
    "MiniGrid Fetch, Stable-Baselines3": ("gipo_minigrid_vision", "sb3", 20),
}
OWN = [title for title, (_, words, _) in CONFIGURATIONS.items() if words != "sb3"]
PHASES = ("environment", "inference", "refresh", "update")
BARE_SECONDS = 5.0


def now() -> float:
    """The time in seconds, once the accelerator has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Adds up the seconds of each phase over the timed iterations, by watching what the body of a script calls.

    The update lasts from an iteration's first call of sample to update_statistics. Nothing in between is watched, so
    that compiled code stays as it is.
    """

    def __init__(self, module, warmup: int, iterations: int):
        self.seconds, self.watching, self.updating_since = defaultdict(float), False, 0.0
        ((flags, (make_envs, agent)),) = module.DOMAINS.items()
        self.watch(agent, "get_action_and_value", "inference")
        self.watch(module, "refresh_advantages", "refresh")
        agent.update_statistics = self.update_ends(agent.update_statistics)
        module.ReplayBuffer.sample = self.update_starts(module.ReplayBuffer.sample)
        clock = self

        class Progress(module.tqdm):
            def __iter__(self):
                for i, iteration in enumerate(super().__iter__()):
                    if i == warmup:
                        clock.seconds.clear()
                        clock.start = now()
                    if i == warmup + iterations:
                        clock.elapsed, clock.measured = now() - clock.start, dict(clock.seconds)
                    yield iteration

        def make_watched_envs(*args, **kwargs):
            envs = make_envs(*args, **kwargs)
            self.watch(envs, "step", "environment")
            return envs

        module.tqdm, module.DOMAINS = Progress, {flags: (make_watched_envs, agent)}

    def watch(self, owner, name: str, phase: str):
        function = getattr(owner, name)

        @wraps(function)
        def watched(*args, **kwargs):
            # calls with gradients belong to the update, and calls by a watched function belong to that function
            if (phase == "inference" and torch.is_grad_enabled()) or self.watching:
                return function(*args, **kwargs)
            start, self.watching = now(), True
            result = function(*args, **kwargs)
            self.seconds[phase] += now() - start
            self.watching = False
            return result

        setattr(owner, name, watched)

    def update_starts(self, sample):
        @wraps(sample)
        def watched(*args):
            self.updating_since = self.updating_since or now()
            return sample(*args)

        return watched

    def update_ends(self, update_statistics):
        @wraps(update_statistics)
        def watched(*args):
            self.seconds["update"] += now() - self.updating_since if self.updating_since else 0.0
            self.updating_since = 0.0
            return update_statistics(*args)

        return watched


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


def measure(title: str):
    """Time one configuration in this process and print the result as a line of JSON."""
    script, words, iterations = CONFIGURATIONS[title]
    module = load(script)
    sys.argv = [script, *words.split(), "--eval-episodes", "0", "--checkpoint-interval", "1000000"]
    args, _ = module.read_args()
    warmup, batch = args.buffer_epochs + 1, args.num_steps * args.num_envs  # then the buffer is full
    # one more iteration, because the last one saves a checkpoint
    sys.argv += ["--total-timesteps", str((warmup + iterations + 1) * batch)]
    clock = Clock(module, warmup, iterations)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run_body(module)
    found = {phase: clock.measured[phase] / clock.elapsed for phase in PHASES}
    found["steps"] = iterations * batch / clock.elapsed
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["buffer_mb"] = sum(tensor.nbytes for tensor in module.buffer.state_dict().values()) / 2**20
    found["bare"] = bare_speed(module.make_envs(args, args.num_envs, 1))
    print(json.dumps(found))


def command(title: str) -> list[str]:
    """The command that measures a configuration."""
    script, words, iterations = CONFIGURATIONS[title]
    if words != "sb3":
        return [sys.executable, "-m", "benchmark.speed", "--measure", title]
    args = next(iter(load(script).DOMAINS))()
    rollout = args.num_envs * args.num_steps
    numbers = {"envs": args.num_envs, "steps": args.num_steps, "epochs": args.update_epochs}
    numbers |= {"batch": args.minibatch_size or rollout // args.num_minibatches, "iterations": iterations}
    flags = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    return [str(PEERS), "benchmark/sb3_speed.py", "--env-id", args.env_id, *flags]


@dataclass
class Args:
    """Measure the speed of the scripts and print a table."""

    repetitions: int = 3
    """how often each configuration is measured; configurations take turns, and the table shows medians (1 to 5)"""
    only: str = ""
    """measure only configurations whose title contains this text"""
    measure: Literal["", *OWN] = ""
    """measure one configuration once, in this process, and print it as JSON"""

    def __post_init__(self):
        self.titles = [title for title in CONFIGURATIONS if self.only in title]
        if not self.titles:
            raise ValueError(f"--only {self.only}: give a part of one of {', '.join(CONFIGURATIONS)}.")
        if self.repetitions < 1:
            raise ValueError(f"--repetitions {self.repetitions}: give 1 or more.")


def main(args: Args) -> int | None:
    """Returns the exit code: 1 if a configuration failed."""
    if args.measure:
        return measure(args.measure)
    found, failed = defaultdict(list), 0
    for repetition, title in itertools.product(range(args.repetitions), args.titles):
        start = command(title)
        if Path(start[0]).exists():
            print(f"{repetition + 1}/{args.repetitions} {title}", file=sys.stderr)
            result = subprocess.run(start, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if result.returncode == 0:
                found[title].append(json.loads(result.stdout.splitlines()[-1]))
            else:
                print(f"{title} failed", file=sys.stderr)
                failed = 1
        elif repetition == 0:
            print(f"{title} is skipped: ./benchmark.sh peers --dry-run makes its environment.", file=sys.stderr)
    columns = ["steps/s", "bare", "ratio", *PHASES, "rest", "peak MB", "buffer MB"]
    print(f"| configuration | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for title, runs in found.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        cells = [f"{median['steps']:,.0f}", *[""] * (len(columns) - 1)]
        if "bare" in median:
            shares = [median[phase] for phase in PHASES]
            ratio = statistics.median(run["steps"] / run["bare"] for run in runs)
            cells[1:] = [f"{median['bare']:,.0f}", f"{ratio:.1%}", *(f"{x:.0%}" for x in [*shares, 1 - sum(shares)])]
            cells += [f"{median['peak_mb']:,.0f}", f"{median['buffer_mb']:,.0f}"]
        print(f"| {title} | {' | '.join(cells)} |")
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
