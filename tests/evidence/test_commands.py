"""Every command of the pages runs, in the order in which a reader meets it; what no test runs is on a list."""

import re
import subprocess
import sys

import pytest
from harness import ROOT

from benchmark import experiments

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), CONTRIBUTING]
TOOLS = "python|uv|tensorboard|diff|pre-commit|./benchmark.sh"
# how a command begins, and what runs it instead
ELSEWHERE = {
    "python3 -m venv": ".ci/run",
    "pip install -r requirements": ".ci/run",
    "python -m pytest": ".ci/run",
    "python gipo_rllib.py": "tests/test_rllib.py",
    "python gipo_trl.py": "tests/test_trl.py",
    "python -m analysis.": "tests/algorithm/test_theory.py",
    "./benchmark.sh speed": "tests/evidence/test_benchmark.py",
    "./benchmark.sh random": "tests/evidence/test_benchmark.py",
    "./benchmark.sh peers-time": "tests/evidence/test_benchmark.py",
    "./benchmark.sh quick": "tests/evidence/test_report.py",
    "./benchmark.sh report": "tests/evidence/test_report.py",
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


def test_every_experiment_has_a_plan(monkeypatch, capsys):
    """As if nothing had been run, and the first candidate of each tuning were the best."""
    named = {command.split()[1] for command in commands() if command.startswith("./benchmark.sh")}
    assert named <= experiments.EXPERIMENTS.keys()
    monkeypatch.setattr("benchmark.runs.rows", lambda experiment: [])
    monkeypatch.setattr(experiments, "tuned", lambda method, kl=0.1: experiments.candidate(method, 0, kl))
    monkeypatch.setattr(experiments, "group_scores", lambda experiment, groups: dict.fromkeys(groups, 0.0))
    for experiment in experiments.EXPERIMENTS:
        assert experiments.main(experiments.Args(experiment, dry_run=True)) == 0
        assert "--seed" in capsys.readouterr().out


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
