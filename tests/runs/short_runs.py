"""Runs of a few moments in environments of tests/probes.py, and what is read back of them."""

import os
import signal
from pathlib import Path
from types import ModuleType

import torch
from harness import ROOT, run, watch

PROBE = {
    "gipo_atari": "probes:BarFrames-v0",
    "gipo_continuous": "probes:Bar-v0",
    "gipo_minigrid_vision": "probes:BarGrid-v0",
    "ppo_baseline": "probes:Bar-v0",
}
TINY = "--num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 2".split()
ROLLOUT = 16
BAR = ["--env-id", "probes:Bar-v0", *TINY]


def iterations(n: int) -> list:
    return ["--total-timesteps", n * ROLLOUT]


def folder_of(path: Path) -> Path:
    """The one run under `path`."""
    (folder,) = (path / "runs").iterdir()
    return folder


def checkpoint_of(path: Path) -> dict:
    return torch.load(folder_of(path) / "checkpoint.pt")


def backdate_logs(path: Path):
    """TensorBoard orders the files of a run by the second in their names, too coarse for runs as short as these."""
    for i, log in enumerate(sorted(folder_of(path).glob("events.out.tfevents.*"))):
        *name, _second, rest = log.name.split(".", 4)
        log.rename(log.with_name(".".join([*name, f"{i:010}", rest])))


def at_iteration(module: ModuleType, monkeypatch, iteration: int, happens):
    """Calls happens() between the rollout and the update of an iteration."""
    watch(monkeypatch, module, "refresh_advantages", lambda _buffer, _slots, i, *_: i == iteration and happens())


def send(*signals):
    for number in signals:
        os.kill(os.getpid(), number)


def fork_run(module: ModuleType, monkeypatch, folder: Path, argv: list) -> int:
    """Forks a run, because a new process would import everything again; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            run(module, monkeypatch, folder, argv)
        finally:
            os._exit(1)
    return child


def kill(child: int):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def environment(**variables) -> dict:
    """For a script in a process of its own, which finds our environments."""
    return os.environ | {"PYTHONPATH": str(ROOT / "tests")} | variables
