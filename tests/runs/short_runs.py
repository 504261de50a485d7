"""Runs of a few moments in the environments of tests/fault_envs.py and tests/probes.py, read back."""

import itertools
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness import ROOT, SCRIPTS, run, watch

CLASSES = {"": "Continuous", "Frames": "Atari", "Grid": "Minigrid"}
REAL = {"": "Hopper-v5", "Frames": "ALE/Breakout-v5", "Grid": "MiniGrid-Fetch-5x5-N2-v0"}
TINY = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "eval_episodes": 0, "device": "cpu"}
ROLLOUT = 16


@dataclass(frozen=True)
class Entry:
    """A script and one of its domains; `kind` ends the names of the environments that fit it."""

    name: str
    kind: str

    def __str__(self):
        return self.name + self.kind

    @property
    def module(self):
        return SCRIPTS[self.name]

    @property
    def domain(self) -> list:
        return [CLASSES[self.kind].lower()] if self.name == "ppo_baseline" else []

    def args(self, env: str, iterations=4, **values):
        """Flags of a tiny run in fault_envs:NAME, or in the environment with this id."""
        env_id = env if "-v" in env else f"fault_envs:{env}{self.kind}-v0"
        values = {"env_id": env_id, "total_timesteps": iterations * ROLLOUT} | TINY | values
        return getattr(self.module, CLASSES[self.kind])(**values)

    def train(self, env: str, iterations=4, **values) -> tuple:
        return self.module.train(self.args(env, iterations, **values))

    def resume(self, folder: Path, **values) -> tuple:
        """The run goes on, with these flags anew."""
        domain = getattr(self.module, CLASSES[self.kind])
        saved = self.module.load_checkpoint(folder, domain)["args"] | {"resume": folder, "eval_episodes": 0}
        return self.module.train(domain(**saved | values))

    def main(self, monkeypatch, *argv) -> int | None:
        """The command line, in this folder; returns the exit code."""
        try:
            return run(self.module, monkeypatch, Path.cwd(), [*self.domain, *argv])
        except SystemExit as stop:
            return stop.code


ATARI, CONTINUOUS, MINIGRID, *BASELINES = [
    *(Entry(name, kind) for name, kind in zip(SCRIPTS, ("Frames", "", "Grid"))),
    *(Entry("ppo_baseline", kind) for kind in CLASSES),
]
SIX = [ATARI, CONTINUOUS, MINIGRID, *BASELINES]
THREE, FOUR = SIX[:3], SIX[:4]


def cases(entries: list, *values) -> list:
    """Parameters of a test; the fast tests run one script, because what the scripts share is the same text."""
    return [pytest.param(entry, *values, marks=[pytest.mark.slow] * (entry != CONTINUOUS)) for entry in entries]


six, four, three = (pytest.mark.parametrize("entry", cases(entries), ids=str) for entries in (SIX, FOUR, THREE))


def tiny(env: str, iterations=4) -> list:
    """TINY as a command line, for environments of continuous control."""
    values = {"env_id": f"fault_envs:{env}-v0", "total_timesteps": iterations * ROLLOUT} | TINY
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt")


def the_folder() -> Path:
    """The one run in this folder."""
    (folder,) = Path("runs").iterdir()
    return folder


def backdate_logs(folder: Path):
    """TensorBoard orders the files of a run by the second in their names, too coarse for runs as short as these."""
    for i, log in enumerate(sorted(folder.glob("events.out.tfevents.*"))):
        *name, _second, rest = log.name.split(".", 4)
        log.rename(log.with_name(".".join([*name, f"{i:010}", rest])))


def at_iteration(module, monkeypatch, iteration: int, happens):
    """Calls happens() between the rollout and the update of an iteration of the next run."""
    count = itertools.count()
    watch(monkeypatch, module, "refresh_advantages", lambda *_: next(count) == iteration and happens())


def send(*signals):
    for number in signals:
        os.kill(os.getpid(), number)


def fork(function, *args, **values) -> int:
    """Calls it in a child, because a new process would import everything again; returns the child's id."""
    child = os.fork()
    if child == 0:
        try:
            function(*args, **values)
        finally:
            os._exit(1)
    return child


def kill(child: int):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def environment(**variables) -> dict:
    """For a script in a process of its own, which finds our environments."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | variables
