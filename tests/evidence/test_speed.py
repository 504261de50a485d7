"""What is measured beside learning: speed, random actions, times of the peers; and benchmark.sh's errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pandas as pd
import pytest
from harness import ROOT

import gipo_continuous
from benchmark import peer_times, random_returns, runner, speed


@pytest.fixture
def untouched(monkeypatch):
    """The script is as before when a test ends."""
    for name in ("refresh_advantages", "diagnostics"):
        monkeypatch.setattr(gipo_continuous, name, getattr(gipo_continuous, name))
    agent = gipo_continuous.ContinuousAgent
    monkeypatch.setattr(agent, "get_action_and_value", agent.get_action_and_value)
    monkeypatch.setattr(gipo_continuous.Continuous, "make_envs", staticmethod(gipo_continuous.make_continuous_envs))


def test_speed_accounts_for_the_time(untouched, monkeypatch, capsys):
    flags = "--num-envs 2 --num-steps 32 --num-minibatches 2 --buffer-epochs 2"
    monkeypatch.setitem(speed.CONFIGURATIONS, "tiny", ("gipo_continuous", flags, 4))
    monkeypatch.setattr(speed, "BARE_SECONDS", 0.2)
    speed.measure("tiny")
    found = pd.Series(json.loads(capsys.readouterr().out.splitlines()[-1]))
    shares = found[list(speed.PHASES)]
    assert (shares > 0).all() and 0.5 < shares.sum() < 1
    assert found.bare > found["steps/s"] > 0 and found["peak MB"] > 100
    # 2 rollouts of 33 x 2 rows: observation 17, action 6, 2 log-probabilities, four numbers, three truth values
    assert found["buffer MB"] * 2**20 == 2 * 33 * 2 * (4 * (17 + 6 + 2 + 4) + 3) + 8 * 2


def test_an_iteration_has_each_of_its_parts_once(untouched, monkeypatch):
    """As if a step of an environment took 1 second, a refresh 10, an update 100; the clock stands still elsewhere."""
    time = [0.0]
    monkeypatch.setattr(speed, "now", lambda: time[0])
    args = gipo_continuous.Continuous(num_envs=1, num_steps=4, total_timesteps=24, num_minibatches=1, update_epochs=1)

    def takes(seconds, result=None):
        def function(*args):
            time[0] += seconds
            return result

        return function

    for name, seconds in (("refresh_advantages", 10), ("diagnostics", 0)):
        monkeypatch.setattr(gipo_continuous, name, takes(seconds))
    envs = type("Envs", (), {"step": staticmethod(takes(1))})
    monkeypatch.setattr(gipo_continuous.Continuous, "make_envs", staticmethod(lambda *_: envs))
    clock = speed.Clock(gipo_continuous, args)
    made = gipo_continuous.Continuous.make_envs(args, 1, 1)
    for _ in range(5):
        for _ in range(4):
            made.step(None)
        gipo_continuous.refresh_advantages(gipo_continuous)
        time[0] += 100
        gipo_continuous.diagnostics()
    taken = {phase: clock.laps[4][phase] - seconds for phase, seconds in clock.laps[1].items()}
    assert taken == {"environment": 12, "refresh": 30, "update": 300, "rest": 0, "time": 342}


def test_the_peer_takes_gradient_steps_of_the_same_number_and_size_with_as_many_threads(monkeypatch, capsys):
    found = {title: " ".join(speed.command(title)) for title in speed.TITLES if title.endswith(speed.PEER)}
    assert len(found) == 4
    assert not found.keys() & set(get_args(get_type_hints(speed.Args)["measure"]))  # they run in another environment
    shape = "--env-id HalfCheetah-v5 --envs 8 --steps 256 --epochs 10"
    assert found["HalfCheetah, Stable-Baselines3"].endswith(f"{shape} --batch 128 --iterations 15 --threads 1")
    small = found["HalfCheetah, 10 x 32 minibatches of 64, Stable-Baselines3"]
    assert small.endswith(f"{shape} --batch 64 --iterations 15 --threads 1")
    assert "--envs 16 --steps 64 --epochs 4 --batch 256" in found["MiniGrid Fetch, Stable-Baselines3"]
    monkeypatch.setattr(speed, "PEERS", Path("nowhere"))
    assert speed.main(speed.Args(only="Stable-Baselines3")) == 0
    assert capsys.readouterr().err.count("is skipped") == 4


def test_configurations_that_compile_are_those_that_do_not():
    for title, (script, flags, iterations) in speed.CONFIGURATIONS.items():
        _, args, _ = speed.flags_of(title)
        assert args.compile == title.endswith(", --compile")
        if args.compile:
            plain = speed.CONFIGURATIONS[title.removesuffix(", --compile")]
            assert (script, flags.split()[:-1], iterations) == (plain[0], plain[1].split(), plain[2])
        if "10 x 32" in title:
            assert (args.update_epochs, args.num_minibatches, args.num_steps * args.num_envs) == (10, 32, 32 * 64)


def test_a_configuration_that_fails_costs_no_other(monkeypatch, capsys):
    """Its neighbour's medians are in the table."""
    good, bad, peer = "HalfCheetah", "Breakout", "HalfCheetah, Stable-Baselines3"
    answer = {"steps/s": 7, "bare": 14, "peak MB": 9, "buffer MB": 1} | dict.fromkeys(speed.PHASES, 0.125)
    answers = {good: answer, bad: {}, peer: {"steps/s": 5}}
    code = {title: f"print('{json.dumps(found)}'); exit({title == bad:d})" for title, found in answers.items()}
    monkeypatch.setattr(speed, "command", lambda title: [sys.executable, "-c", code[title]])
    monkeypatch.setattr(speed, "TITLES", tuple(answers))
    assert speed.main(speed.Args(repetitions=1)) == 1
    printed = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.out.splitlines()]
    lines = {title: cells for title, *cells in rows}
    assert lines[good] == ["7", "14", "50.0%", *["12%"] * 4, "50%", "9", "1"]
    assert lines[peer] == ["5", *[""] * 9] and bad not in lines and f"{bad} failed" in printed.err
    assert speed.main(speed.Args(repetitions=1, only="Stable")) == 0
    assert lines[peer] == [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["sped"], ["speed", "--only", "Chess"]])
def test_bad_input(arguments):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    result = subprocess.run([ROOT / "benchmark.sh", *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr and "Traceback" not in result.stderr
    with pytest.raises(ValueError, match="--repetitions 0: give 1 or more"):
        speed.Args(repetitions=0)


def test_without_the_environment_of_the_scripts(tmp_path):
    """A Python that has none of the packages, and one sentence."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for arguments in ([], ["quick"], ["million", "--dry-run"]):
        result = subprocess.run([ROOT / "benchmark.sh", *arguments], env=environment, capture_output=True, text=True)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith("error: activate") and result.stderr.count("\n") == 1


def test_random_actions_have_a_return(monkeypatch, tmp_path):
    monkeypatch.setattr(random_returns, "REPORTED", ("CartPole-v1", "Hopper-v5", "MiniGrid-Empty-5x5-v0"))
    monkeypatch.setattr(random_returns, "EPISODES", 2)
    monkeypatch.setattr(runner, "ROWS", tmp_path)
    random_returns.main()
    found = pd.read_csv(tmp_path / "random.csv", index_col="env_id")
    assert 8 <= found.final_return["CartPole-v1"] < 100 and found.final_return["Hopper-v5"] > 0
    assert pd.isna(found.final_success["Hopper-v5"]) and 0 <= found.final_success["MiniGrid-Empty-5x5-v0"] <= 1


def test_times_of_the_peers_leave_out_the_start(monkeypatch, tmp_path):
    """As if a start took 100 seconds, a step of SAC 5 ms, and one of every other method 1 ms."""

    def seconds(method, env_id, steps):
        return 100 + steps * (0.005 if method == "sb3-sac" else 0.001)

    monkeypatch.setattr(peer_times, "seconds", seconds)
    monkeypatch.setattr(runner, "ROWS", tmp_path)
    peer_times.main()
    lines = (tmp_path / "peer-times.csv").read_text().splitlines()
    assert lines == ["method,ratio", "gipo,1", "clip,1", "sb3-ppo,1", "sb3-sac,5"]
