"""The measuring itself, on the smallest configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from harness import ROOT

from benchmark import peer_times, random_returns, runs, speed


def test_speed_accounts_for_the_time(monkeypatch, capsys):
    flags = "--num-envs 2 --num-steps 32 --num-minibatches 2 --buffer-epochs 2"
    monkeypatch.setitem(speed.CONFIGURATIONS, "tiny", ("gipo_continuous", flags, 4))
    monkeypatch.setattr(speed, "BARE_SECONDS", 0.2)
    monkeypatch.setattr(sys, "argv", sys.argv)
    speed.measure("tiny")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    shares = [found[phase] for phase in speed.PHASES]
    assert all(share > 0 for share in shares) and 0.5 < sum(shares) < 1
    assert found["bare"] > found["steps"] > 0
    # 2 rollouts of 33 x 2 rows: observation 17, action 6, five numbers, three truth values; versions
    assert found["buffer_mb"] * 2**20 == 2 * 33 * 2 * (4 * (17 + 6 + 5) + 3) + 8 * 2
    assert found["peak_mb"] > 100


def test_the_peer_takes_gradient_steps_of_the_same_number_and_size(monkeypatch, capsys):
    titles = [title for title in speed.CONFIGURATIONS if title.endswith("Stable-Baselines3")]
    found = {title: " ".join(speed.command(title)) for title in titles}
    assert len(found) == 3
    assert not found.keys() & set(get_args(get_type_hints(speed.Args)["measure"]))  # they run in another environment
    assert found["HalfCheetah, Stable-Baselines3"].endswith(
        "--env-id HalfCheetah-v5 --envs 8 --steps 256 --epochs 10 --batch 128 --iterations 15"
    )
    assert "--envs 16 --steps 64 --epochs 4 --batch 256" in found["MiniGrid Fetch, Stable-Baselines3"]
    monkeypatch.setattr(speed, "PEERS", Path("nowhere"))
    speed.main(speed.Args(only="Stable-Baselines3"))
    printed = capsys.readouterr()
    assert printed.err.count("is skipped") == 3 and len(printed.out.splitlines()) == 2


def test_a_configuration_that_fails_costs_no_other(monkeypatch, capsys):
    first, second = speed.OWN[:2]
    answer = '{"steps": 7}'
    monkeypatch.setattr(
        speed, "command", lambda title: [sys.executable, "-c", f"print('{answer}'); exit({title == second:d})"]
    )
    monkeypatch.setattr(speed, "CONFIGURATIONS", {first: None, second: None})
    assert speed.main(speed.Args(repetitions=1)) == 1
    printed = capsys.readouterr()
    assert f"| {first} | 7 |" in printed.out and f"| {second} |" not in printed.out
    assert f"{second} failed" in printed.err


@pytest.mark.parametrize("arguments", [[], ["sped"], ["speed", "--only", "Chess"], ["speed", "--repetitions", "0"]])
def test_bad_input(arguments):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    result = subprocess.run([ROOT / "benchmark.sh", *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr and "Traceback" not in result.stderr


def test_without_the_environment_of_the_scripts(tmp_path):
    """A Python that has none of the packages, and one sentence."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for arguments in ([], ["quick"], ["staleness", "--dry-run"]):
        result = subprocess.run([ROOT / "benchmark.sh", *arguments], env=environment, capture_output=True, text=True)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith("error: activate") and result.stderr.count("\n") == 1


def test_random_actions_have_a_return(monkeypatch, tmp_path):
    monkeypatch.setattr(random_returns, "REPORTED", ("CartPole-v1", "Hopper-v5", "MiniGrid-Empty-5x5-v0"))
    monkeypatch.setattr(random_returns, "EPISODES", 2)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    random_returns.main()
    cartpole, hopper, grid = runs.rows("random")
    assert 8 <= float(cartpole["final_return"]) < 100
    assert float(hopper["final_return"]) > 0 and hopper["final_success"] == ""
    assert 0 <= float(grid["final_success"]) <= 1


def test_times_of_the_peers_leave_out_the_start(monkeypatch, tmp_path):
    """As if a start took 100 seconds, a step of SAC 5 ms, and one of every other method 1 ms."""

    def seconds(one):
        return 100 + int(one.value("--total-timesteps")) * (0.005 if one.method == "sb3-sac" else 0.001)

    monkeypatch.setattr(peer_times, "seconds", seconds)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    peer_times.main()
    lines = (tmp_path / "peer-times.csv").read_text().splitlines()
    assert lines == ["method,ratio", "gipo,1", "clip,1", "sb3-ppo,1", "sb3-sac,5"]
