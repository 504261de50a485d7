"""Every command of the pages runs, in the order in which a reader meets it; what no test runs is on a list."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from harness import ROOT

from benchmark import experiments, runner

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), CONTRIBUTING]
TOOLS = "python|uv|tensorboard|diff|pre-commit|./benchmark.sh"
# how a command begins, and what runs it instead
ELSEWHERE = {
    "python3 -m venv": ".ci/run",
    "pip install -r requirements": ".ci/run",
    "python -m pytest": ".ci/run",
    "python gipo_rllib.py": "tests/engines/test_rllib.py",
    "python gipo_trl.py": "tests/engines/test_trl.py",
    "python -m analysis.": "tests/algorithm/test_theory.py",
    "./benchmark.sh speed": "tests/evidence/test_speed.py",
    "./benchmark.sh random": "tests/evidence/test_speed.py",
    "./benchmark.sh peers-time": "tests/evidence/test_speed.py",
    "./benchmark.sh quick": "tests/evidence/test_pages.py",
    "./benchmark.sh report": "tests/evidence/test_pages.py",
}
SHORT = ["--total-timesteps", "2048", "--eval-episodes", "1"]
LONGER = ["--total-timesteps", "4096", "--eval-episodes", "1"]


def by_hand() -> list[str]:
    listed = CONTRIBUTING.read_text().split("## What no test runs\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", listed, re.MULTILINE)


def commands() -> list[str]:
    """The lines of all blocks of bash, and what stands in backquotes and begins with a tool, once each."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            found += [line.split("  #")[0].strip() for line in block.splitlines()]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        found += [" ".join(one.split()) for one in re.findall(rf"`((?:{TOOLS})\s[^`]+)`", prose)]
    return [one for one in dict.fromkeys(found) if one not in by_hand() and not one.startswith(tuple(ELSEWHERE))]


def test_every_experiment_of_the_pages_is_one():
    """tests/evidence/test_experiments.py makes the plans."""
    named = {command.split()[1] for command in commands() if command.startswith("./benchmark.sh")}
    assert named <= experiments.EXPERIMENTS.keys() | {"speed", "random", "peers-time", "report"}


def test_the_row_that_the_protocol_repeats_is_there():
    (only,) = re.findall(r'--only "(.*)"', (ROOT / "docs" / "protocol.md").read_text())
    (command,) = {one.command for one in experiments.staleness() if only in one.command}
    assert command in set(runner.read_rows().command)


def test_benchmark_sh_names_every_experiment():
    """And no more than it can do."""
    text = (ROOT / "benchmark.sh").read_text()
    listed = set(re.findall(r"^#   ./benchmark.sh ([a-z-]+) ", text, re.MULTILINE))
    assert listed == experiments.EXPERIMENTS.keys() | {"speed", "random", "peers-time", "report"}
    lines = [line.split(")")[0].split("|") for line in text.splitlines() if re.match(r"  [a-z| -]+\)", line)]
    assert listed == {word.strip() for words in lines for word in words}


def test_a_plan_needs_no_environment_of_others(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> calls\n')
    (tmp_path / "python").chmod(0o755)
    shutil.copy(ROOT / "benchmark.sh", tmp_path)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["./benchmark.sh", "million", "--dry-run"], cwd=tmp_path, env={"PATH": path}, check=True)
    calls = (tmp_path / "calls").read_text()
    assert "-m benchmark.experiments million --dry-run" in calls and "venv" not in calls


@pytest.mark.slow
def test_commands_run(tmp_path):
    ran = 0
    for command in commands():
        program, *arguments = command.split()
        if program == "./benchmark.sh":
            continue
        for i, one in enumerate(arguments):
            if one.endswith("__..."):
                (folder,) = tmp_path.glob(one.replace("...", "*"))
                arguments[i] = str(folder)
        if "--resume" in arguments:
            arguments += LONGER
        elif program == "python" and "--evaluate" not in arguments:
            arguments += SHORT
        arguments = [str(ROOT / one) if one.endswith(".py") else one for one in arguments]
        start = [{"python": sys.executable}.get(program, program), *arguments]
        result = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == (program == "diff"), f"{command}: {result.stderr}"
        ran += 1
    assert ran > 5


def test_what_runs_elsewhere_is_there():
    assert all((ROOT / file).exists() for file in ELSEWHERE.values())
