"""The measuring itself, on the smallest configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

from benchmark import experiments, random_returns, runs, speed


def test_speed_accounts_for_the_time(monkeypatch, tmp_path, capsys):
    flags = "--num-envs 2 --num-steps 32 --num-minibatches 2 --buffer-epochs 2"
    monkeypatch.setitem(speed.CONFIGURATIONS, "tiny", ("gipo_continuous", flags, 4))
    monkeypatch.setattr(speed, "BARE_SECONDS", 0.2)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    speed.measure("tiny")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    shares = [found[phase] for phase in speed.PHASES]
    assert all(share > 0 for share in shares) and 0.5 < sum(shares) < 1
    assert found["bare"] > found["steps"] > 0
    # 2 rollouts of 33 x 2 rows: observation 17, action 6, five numbers, three truth values; versions and the slot
    assert found["buffer_mb"] * 2**20 == 2 * 33 * 2 * (4 * (17 + 6 + 5) + 3) + 8 * 3
    assert found["peak_mb"] > 100


@pytest.mark.parametrize("arguments", [[], ["sped"], ["speed", "--only", "Chess"]])
def test_bad_input(arguments):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    result = subprocess.run([ROOT / "benchmark.sh", *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr and "Traceback" not in result.stderr


def test_random_actions_have_a_return(monkeypatch, tmp_path):
    plan = [experiments.run("clip", env_id, 1) for env_id in ("Hopper-v5", "MiniGrid-Empty-5x5-v0")]
    monkeypatch.setattr(random_returns, "EXPERIMENTS", {"any": lambda: plan})
    monkeypatch.setattr(random_returns, "EPISODES", 2)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    assert random_returns.main() == 0
    hopper, grid = runs.rows("random")
    assert float(hopper["final_return"]) > 0 and hopper["final_success"] == ""
    assert 0 <= float(grid["final_success"]) <= 1
