"""Does training runs, one single-threaded process per core, and keeps one row of each in a CSV file.

A run that has a row is skipped. An interrupted run of the four scripts continues from its checkpoint, and any other
begins again. A failed run is named with its log. A run that stops because a value is not finite has not failed; its
row says that it diverged. A row holds all flags of its run, so that figures and tables need nothing else.
"""

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, lru_cache, wraps
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmark" / "rows"
WORK = ROOT / "runs" / "benchmark"  # folders of unfinished runs, and logs of failed ones
CURVE_POINTS = 25
DIAGNOSTICS = ("abs_logratio_p95", "ess", "dead_fraction", "coef_mean", "age_mean")
PACKAGES = ("torch", "gymnasium", "mujoco", "ale-py", "minigrid", "metaworld", "stable-baselines3", "ray", "trl")
# scripts that import scripts
IMPORTS = {
    "benchmark/variants.py": ("ppo_baseline.py", "gipo_continuous.py"),
    "benchmark/llm_run.py": ("benchmark/cpu_sampler.py", "gipo_trl.py", "gipo_trl_async.py"),
}
COLUMNS = (
    "command",
    "method",
    "env_id",
    "seed",
    "flags",  # all other flags, the defaults too, as JSON
    "diverged",  # 1 for a run that stopped because a value was not finite; it has no final or eval return
    "final_return",  # mean over the last tenth of the training, of the policy that acts
    "mean_return",  # area under the learning curve, divided by its length
    "final_success",
    "eval_return",  # of the policy that has learned; empty if the run has no evaluation
    "eval_start",  # before the training, of a language model
    *DIAGNOSTICS,  # means over the last tenth of the training
    "SPS",
    "seconds",  # of the whole process; empty if it was interrupted
    "revision",
    "versions",
    "curve",  # mean returns of CURVE_POINTS equal parts of the training
)


class Missing(Exception):
    """Raised with one sentence when rows that a command builds on are missing."""


@dataclass(frozen=True)
class Run:
    """A training run. Equal commands are the same run."""

    method: str
    script: str  # relative to the root, with the words that every command of it needs
    flags: dict = field(hash=False)
    line: str = field(default="", compare=False)  # its line in figures and tables
    python: Path = field(default=Path(sys.executable), compare=False)

    @property
    def arguments(self) -> list[str]:
        """The flags as words. True stands for a flag without a value, and None for no flag."""
        found = []
        for name, value in self.flags.items():
            if value is not None:
                found.append(f"--{name.replace('_', '-')}")
                found += [] if value is True else [f"{value:g}" if isinstance(value, float) else str(value)]
        return found

    @property
    def program(self) -> list[str]:
        """What is started, before the flags."""
        script, *words = self.script.split()
        return [str(self.python), str(ROOT / script), *words]

    @property
    def command(self) -> str:
        return " ".join(["python", self.script, *self.arguments])

    @property
    def folder(self) -> Path:
        """Named after the command, with a digest because a name has at most 255 bytes."""
        name = re.sub(r"[^\w.]+", "-", self.command.removeprefix("python "))
        return WORK / f"{name[:200]}-{hashlib.sha256(self.command.encode()).hexdigest()[:12]}"

    @property
    def code(self) -> list[str]:
        """The files that the run depends on."""
        script = self.script.split()[0]
        return [script, *IMPORTS.get(script, ())]


def state() -> tuple:
    """Differs whenever the files of rows do."""
    return tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(ROWS.glob("*.csv")))


def cached(function):
    """Keep what a function without arguments returns, as long as the files of rows stay the same."""
    kept = lru_cache(maxsize=1)(lambda state: function())
    return wraps(function)(lambda: kept(state()))


@cached
def read_rows() -> pd.DataFrame:
    """The rows of all experiments, because one run may belong to several of them."""
    files = map(pd.read_csv, sorted(ROWS.glob("*.csv")))
    found = [rows for rows in files if "command" in rows]
    return pd.concat(found).drop_duplicates("command") if found else pd.DataFrame(columns=COLUMNS)


def unfinished(runs: Iterable[Run]) -> list[Run]:
    """The runs without a row, each once."""
    known = set(read_rows().command)
    return list({run.command: run for run in runs if run.command not in known}.values())


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


def revision(files: list[str]) -> str:
    """The commit that last changed any of the files; a plus marks changes that are not committed."""
    return git("log", "-1", "--format=%h", "--", *files) + ("+" if git("status", "--porcelain", "--", *files) else "")


def digest(files: list[str]) -> str:
    """Tells code apart, committed or not."""
    return hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in files)).hexdigest()


@cache
def versions(python: Path) -> str:
    """The versions of PACKAGES that an interpreter has installed, with pip or without."""
    ask = "from importlib.metadata import distributions\nfor x in distributions(): print(x.name, x.version)"
    listed = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    # stable-baselines3 has an underscore there
    known = dict(line.replace("_", "-").split() for line in listed.splitlines())
    return " ".join(f"{name}={known[name]}" for name in PACKAGES if name in known)


def curve(points: pd.Series, total: int, parts: int = CURVE_POINTS) -> pd.Series:
    """Means of points, by step, over equal parts of the steps up to `total`; a part without points takes the last."""
    part = np.minimum((points.index.to_numpy() - 1) * parts // total, parts - 1)
    return points.groupby(part).mean().reindex(range(parts)).ffill().bfill()


def saved_flags(folder: Path) -> dict:
    """All flags that a run had."""
    if (folder / "checkpoint.pt").exists():
        args = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)["args"]
        return {name: str(x) if isinstance(x, Path) else x for name, x in args.items() if x is not None}
    return json.loads((folder / "args.json").read_text())


def read_log(run: Run, folder: Path) -> dict:
    """The row of a run that has ended, from its log."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    flags = saved_flags(folder)
    total = flags["total_timesteps"]

    def logged(tag):
        known = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
        return pd.Series([event.value for event in known], index=[event.step for event in known], dtype=float)

    def at_the_end(tag):
        values = logged(tag)
        tail = values[values.index > 0.9 * total]
        # after a late resume no episode may end in the last tenth
        return (tail if len(tail) else values.tail(1)).mean()

    returns = curve(logged("charts/episodic_return"), total)
    found = {"final_return": at_the_end("charts/episodic_return"), "mean_return": returns.mean()}
    found["final_success"] = at_the_end("charts/success_rate")
    found["eval_return"] = logged("eval/episodic_return").mean()
    found["eval_start"] = logged("eval/start").mean()
    found |= {name: at_the_end(f"offpolicy/{name}") for name in DIAGNOSTICS}
    found["SPS"] = at_the_end("charts/SPS")
    row = {"command": run.command, "method": run.method, "env_id": flags.pop("env_id"), "seed": flags.pop("seed")}
    row |= {name: "" if np.isnan(value) else f"{value:.6g}" for name, value in found.items()}
    row |= {"flags": json.dumps(flags), "versions": versions(run.python), "diverged": 0}
    return row | {"curve": " ".join(f"{value:.6g}" for value in returns)}


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[TextIO]:
    """The log of a run, which no other batch can do meanwhile. Raises `BlockingIOError` if another one does it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a+") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child keeps the lock if this process dies
        except BlockingIOError:
            raise BlockingIOError("another batch is doing this run") from None
        yield log


def execute(run: Run, log: TextIO) -> dict:
    """Run to the end and return the row. If the run fails, raise `CalledProcessError`; `run.folder` keeps the log."""
    started = run.folder / "code.txt"
    saved = list(run.folder.glob("runs/*/checkpoint.pt"))
    resumed = bool(saved) and started.exists() and started.read_text() == digest(run.code)
    if not resumed:
        shutil.rmtree(run.folder / "runs", ignore_errors=True)
        started.write_text(digest(run.code))
    current = revision(run.code)
    again = [] if "eval_episodes" not in run.flags else ["--eval-episodes", str(run.flags["eval_episodes"])]
    arguments = ["--resume", str(saved[0].parent), *again] if resumed else run.arguments
    command = [*run.program, *arguments]
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
    if ended and run.flags.get("eval_episodes") != 0:
        shutil.rmtree(folder)  # it was stopped while it evaluated, which leaves nothing to continue from
        return execute(run, log)
    row = read_log(run, folder) | {"revision": current, "seconds": "" if resumed else seconds}
    return row | ({"diverged": 1, "final_return": "", "final_success": "", "eval_return": ""} if diverged else {})


def run_all(experiment: str, runs: list[Run], workers: int | None = None) -> int:
    """Do these runs, one per core or `workers` at a time. Print the failures and return their number.

    Raises `Missing` if the file of rows has other columns, because appending would spoil it.
    """
    ROWS.mkdir(exist_ok=True)
    path, lock, failed = ROWS / f"{experiment}.csv", threading.Lock(), 0
    if path.exists() and tuple(pd.read_csv(path, nrows=0).columns) != COLUMNS:
        raise Missing(f"{path} has other columns than new rows would have; move it elsewhere.")

    def keep(row: dict):
        with lock, path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def work(run: Run):
        with claimed(run) as log:
            if unfinished([run]):  # another batch may have done it in the meantime
                keep(execute(run, log))
            shutil.rmtree(run.folder)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = {pool.submit(work, run): run for run in runs}
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
