"""Runs many training runs, one single-threaded process per core, and keeps one row of each in a CSV file.

A run that has a row is skipped. An interrupted run of the four scripts continues from its checkpoint, and any other
begins again. A failed run is named with its log, and makes the whole batch fail. A run that stops because a value is
not finite has not failed; its row says that it diverged. A row holds the flags of the run, its score and its learning
curve, so the figures need nothing else.
"""

import csv
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmark.scripts import ROOT

RESULTS = ROOT / "benchmark" / "results"
WORK = ROOT / "runs" / "benchmark"  # folders of unfinished runs, and logs of failed ones
CURVE_POINTS = 25
SETTINGS = (
    "env_id",
    "seed",
    "total_timesteps",
    "num_envs",
    "num_steps",
    "num_minibatches",
    "minibatch_size",
    "learning_rate",
    "buffer_epochs",
    "policy_lag",
    "freeze_buffer_at",
    "advantage_source",
    "kl_coef",
    "sigma",
    "clip_coef",
    "sapo_tau",
    "tis_cap",
    "buffer_batches",
    "buffer_reuse",
    "num_env_runners",
)
AT_THE_END = (
    "offpolicy/abs_logratio_p95",
    "offpolicy/ess",
    "offpolicy/dead_fraction",
    "offpolicy/coef_mean",
    "offpolicy/age_mean",
    "charts/SPS",
)
PACKAGES = ("torch", "gymnasium", "mujoco", "ale-py", "minigrid", "metaworld", "stable-baselines3", "ray", "trl")
COLUMNS = (
    "command",
    "method",
    *SETTINGS,
    "diverged",  # 1 for a run that stopped because a value was not finite; it has no final values
    "final_return",  # mean over the last tenth of the training
    "mean_return",  # area under the learning curve, divided by its length
    "final_success",
    *(tag.split("/")[1] for tag in AT_THE_END),
    "seconds",  # of the whole process; empty if it was interrupted
    "revision",
    "versions",
    "curve",  # mean returns of CURVE_POINTS equal parts of the training
)


class Missing(Exception):
    """Raised with one sentence when results that a command builds on are missing."""


@dataclass(frozen=True)
class Run:
    """One training run: the name of the method, the script relative to the root, its arguments and its interpreter."""

    method: str
    script: str
    arguments: tuple[str, ...]
    python: Path = Path(sys.executable)

    @property
    def positional(self) -> list[str]:
        """The words before the flags: a domain, or a variant, a script and its domain."""
        return list(itertools.takewhile(lambda word: not word.startswith("--"), self.arguments))

    @property
    def command(self) -> str:
        return " ".join(["python", self.script, *self.arguments])

    def value(self, flag: str, default: str | None = None) -> str | None:
        """The value of a flag that stands once in the command, or the default."""
        return self.arguments[self.arguments.index(flag) + 1] if flag in self.arguments else default

    @property
    def folder(self) -> Path:
        """Named after the command, with a digest because a name has at most 255 bytes."""
        name = re.sub(r"[^\w.]+", "-", self.command.removeprefix("python "))
        return WORK / f"{name[:200]}-{hashlib.sha256(self.command.encode()).hexdigest()[:12]}"


def rows(experiment: str) -> list[dict[str, str]]:
    """The rows of an experiment: a dictionary of COLUMNS for each finished run."""
    path = RESULTS / f"{experiment}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def finished() -> dict[str, dict[str, str]]:
    """The rows of all experiments by command, because one run may belong to several experiments."""
    known = itertools.chain(*(rows(path.stem) for path in sorted(RESULTS.glob("*.csv"))))
    return {row["command"]: row for row in known if "command" in row}


def revision(*scripts: str) -> str:
    """The commit that last changed any of the scripts; a plus marks changes that are not committed."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "log", "-1", "--format=%h", "--", *scripts], capture_output=True, text=True).stdout
    changed = subprocess.run([*git, "status", "--porcelain", "--", *scripts], capture_output=True, text=True).stdout
    return commit.strip() + ("+" if changed else "")


def digest(*scripts: str) -> str:
    """Tells code apart, committed or not."""
    return hashlib.sha256(b"".join((ROOT / script).read_bytes() for script in scripts)).hexdigest()


@cache
def versions(python: Path) -> str:
    """The versions of PACKAGES that an interpreter has installed, with pip or without."""
    ask = "from importlib.metadata import distributions\nfor x in distributions(): print(x.name, x.version)"
    listed = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    # stable-baselines3 has an underscore there
    known = dict(line.replace("_", "-").split() for line in listed.splitlines())
    return " ".join(f"{name}={known[name]}" for name in PACKAGES if name in known)


def curve(points: list[tuple[int, float]], total: int, parts: int) -> np.ndarray:
    """Means of the points in equal parts of the steps up to `total`.

    A part without points takes the mean of the part before it. The first parts take the first mean. Without any point,
    all are NaN.
    """
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    part = np.minimum((steps - 1) * parts // total, parts - 1)
    means = np.array([values[part == i].mean() if (part == i).any() else np.nan for i in range(parts)])
    known = np.flatnonzero(~np.isnan(means))
    before = np.searchsorted(known, np.arange(parts), side="right") - 1
    return means[known[before.clip(min=0)]] if len(known) else means


def settings(folder: Path) -> dict:
    """The flags that a run had."""
    if (folder / "checkpoint.pt").exists():
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)["args"]
    args = json.loads((folder / "args.json").read_text())
    if "iterations" in args:  # gipo_trl.py, which has one task and counts iterations
        args |= {"env_id": "sorting", "total_timesteps": args["iterations"]}
    return args


def row(run: Run, folder: Path) -> dict:
    """The row of a run that has ended, read from its log."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    args = settings(folder)
    logged = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    total = args["total_timesteps"]

    def last_tenth(tag):
        tail = [value for step, value in logged.get(tag, []) if step > 0.9 * total]
        return f"{np.mean(tail):.6g}" if tail else ""

    returns = curve(logged.get("charts/episodic_return", []), total, CURVE_POINTS)
    found = {"command": run.command, "method": run.method, "diverged": 0}
    found |= {name: args[name] for name in SETTINGS if args.get(name) is not None}
    found |= {"final_return": last_tenth("charts/episodic_return"), "mean_return": f"{returns.mean():.6g}"}
    found["final_success"] = last_tenth("charts/success_rate")
    found |= {tag.split("/")[1]: last_tenth(tag) for tag in AT_THE_END}
    found["versions"] = versions(run.python)
    found["curve"] = " ".join(f"{value:.6g}" for value in returns)
    return found


def execute(run: Run) -> dict:
    """Run to the end and return the row. If the run fails, raise `CalledProcessError`; `run.folder` keeps the log."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a+") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child keeps the lock if this process dies
        except BlockingIOError:
            raise BlockingIOError("another batch is doing this run") from None
        scripts = [word for word in (run.script, *run.positional) if word.endswith(".py")]
        current, code = revision(*scripts), digest(*scripts)
        started = run.folder / "code.txt"
        saved = list(run.folder.glob("runs/*/checkpoint.pt"))
        resumed = bool(saved) and started.exists() and started.read_text() == code
        if resumed:
            arguments = [*run.positional, "--resume", str(saved[0].parent)]
        else:
            shutil.rmtree(run.folder / "runs", ignore_errors=True)
            started.write_text(code)
            arguments = run.arguments
        command = [str(run.python), str(ROOT / run.script), *arguments]
        start, size = time.monotonic(), log.tell()
        single = os.environ | {"OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, cwd=run.folder, env=single, stdout=log, stderr=log).returncode
        seconds = round(time.monotonic() - start)
        log.seek(size)
        output = log.read()
    diverged = status == 1 and "not finite" in output
    # the run had ended before this process was stopped, and only its row is missing
    ended = resumed and status == 2 and "--total-timesteps" in output
    if status and not diverged and not ended:
        raise subprocess.CalledProcessError(status, command)
    (folder,) = (run.folder / "runs").iterdir()
    found = row(run, folder) | {"revision": current, "seconds": "" if resumed else seconds}
    return found | ({"diverged": 1, "final_return": "", "final_success": ""} if diverged else {})


def run_all(experiment: str, runs: Iterable[Run], dry_run: bool = False, workers: int | None = None) -> int:
    """Do the missing runs, one per core or `workers` at a time. Print the failures and return their number."""
    done = finished()
    missing = [run for run in dict.fromkeys(runs) if run.command not in done]
    if dry_run:
        print(*(run.command for run in missing), sep="\n")
        return 0
    RESULTS.mkdir(exist_ok=True)
    path, lock, failed = RESULTS / f"{experiment}.csv", threading.Lock(), 0

    def work(run: Run):
        if run.command in finished():
            return  # another batch has done it in the meantime
        found = execute(run)
        with lock, path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(found)
        shutil.rmtree(run.folder)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = {pool.submit(work, run): run for run in missing}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=experiment, unit="run"):
                if future.exception():
                    failed += 1
                    run = futures[future]
                    message = f"failed: {run.command}\n  {future.exception()}\n  log: {run.folder / 'log.txt'}"
                    tqdm.write(message, file=sys.stderr)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed
