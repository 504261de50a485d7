"""Real learning, short, well above chance."""

import numpy as np
import pytest
from harness import scalars

import gipo_atari
import gipo_continuous
import gipo_minigrid_vision
import ppo_baseline

pytestmark = pytest.mark.slow


def last(folder, tag, share=0.2):
    """Mean of the last share of a logged curve."""
    values = [value for _, value in scalars(folder)[tag]]
    return np.mean(values[-max(1, int(len(values) * share)) :])


@pytest.mark.parametrize("epochs", [1, 8])
def test_continuous(epochs, tmp_path):
    """InvertedPendulum-v5: the pole stands for 1,000 steps at most; random actions keep it up for about 6."""
    sizes = {"num_envs": 4, "num_minibatches": 4, "update_epochs": 5, "learning_rate": 3e-3, "buffer_epochs": epochs}
    args = gipo_continuous.Continuous("InvertedPendulum-v5", 20 * 1024, eval_episodes=0, **sizes)
    gipo_continuous.train(args)
    assert last(tmp_path, "charts/episodic_return") > 300


def test_minigrid(tmp_path):
    """Walk to the goal of an empty room: random actions earn about 0.2, the shortest path 0.95."""
    sizes = {"num_envs": 8, "num_steps": 32, "eval_episodes": 0}
    gipo_minigrid_vision.train(gipo_minigrid_vision.Minigrid("MiniGrid-Empty-5x5-v0", 6144, **sizes))
    assert last(tmp_path, "charts/episodic_return") > 0.85
    assert last(tmp_path, "charts/success_rate") > 0.95


@pytest.mark.parametrize("module", [gipo_atari, ppo_baseline])
def test_atari(module, tmp_path):
    """Frames: chance earns 8 of 16."""
    sizes = {"num_steps": 16, "update_epochs": 2, "learning_rate": 1e-3, "gamma": 0.5, "eval_episodes": 0}
    module.train(module.Atari("probes:Frames-v0", 12 * 128, **sizes))
    assert last(tmp_path, "charts/episodic_return") > 14
