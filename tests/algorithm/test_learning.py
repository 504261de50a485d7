"""Real learning, short, well above chance."""

import numpy as np
import pytest
from harness import load, run, scalars


def last(folder, tag, share=0.2):
    """Mean of the last share of a logged curve."""
    values = [value for _, value in scalars(folder)[tag]]
    return np.mean(values[-max(1, int(len(values) * share)) :])


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 8])
def test_continuous(epochs, monkeypatch, tmp_path):
    """InvertedPendulum-v5: the pole stands for 1,000 steps at most; random actions keep it up for about 6."""
    argv = (
        "--env-id InvertedPendulum-v5 --num-envs 4 --num-minibatches 4 --update-epochs 5 --learning-rate 3e-3".split()
    )
    argv += ["--total-timesteps", 20 * 1024, "--buffer-epochs", epochs]
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    assert last(tmp_path, "charts/episodic_return") > 300


@pytest.mark.slow
def test_minigrid(monkeypatch, tmp_path):
    """Walk to the goal of an empty room: random actions earn about 0.2, the shortest path 0.95."""
    argv = "--env-id MiniGrid-Empty-5x5-v0 --num-envs 8 --num-steps 32 --total-timesteps 6144".split()
    run(load("gipo_minigrid_vision"), monkeypatch, tmp_path, argv)
    assert last(tmp_path, "charts/episodic_return") > 0.85
    assert last(tmp_path, "charts/success_rate") > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("name", "domain"), [("gipo_atari", []), ("ppo_baseline", ["atari"])])
def test_atari(name, domain, monkeypatch, tmp_path):
    """Frames: chance earns 8 of 16."""
    argv = "--env-id probes:Frames-v0 --num-steps 16 --update-epochs 2 --learning-rate 1e-3 --gamma 0.5".split()
    argv += ["--total-timesteps", 12 * 128]
    run(load(name), monkeypatch, tmp_path, [*domain, *argv])
    assert last(tmp_path, "charts/episodic_return") > 14
