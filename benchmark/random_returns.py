"""Returns and success of random actions in every reported task. The returns are the zero of the scores.

./benchmark.sh random        # writes benchmark/rows/random.csv
"""

from importlib import import_module
from pathlib import Path

import gymnasium as gym
import pandas as pd
import torch
import tyro

from benchmark import runner
from benchmark.experiments import REPORTED
from benchmark.methods import CONTINUOUS, DOMAINS

EPISODES = 100


class RandomAgent(torch.nn.Module):
    """Stands in for an agent and draws uniform actions."""

    def __init__(self, envs, args):
        super().__init__()
        self.space = envs.action_space
        self.space.seed(0)

    def get_action_and_value(self, obs, **_):
        return torch.as_tensor(self.space.sample()), None, None, None


def make_cartpole(args, num_envs: int, seed: int):
    """No script takes vectors with discrete actions."""
    envs = gym.make_vec(args.env_id, num_envs, vectorization_mode="sync")
    return gym.wrappers.vector.RecordEpisodeStatistics(envs, stats_key="recorded")


def play(env_id: str) -> dict[str, float]:
    """Means over EPISODES full episodes of random actions, under the tags of an evaluation."""
    _, script = DOMAINS.get(env_id[:4], CONTINUOUS)
    module = import_module(Path(script).stem)
    args = module.Domain(env_id=env_id, seed=0, eval_episodes=EPISODES, device="cpu")
    args.Agent = RandomAgent
    if env_id.startswith("CartPole"):
        args.make_envs = make_cartpole
    return module.evaluate(args, {}, None)


def main():
    """Play random actions and write benchmark/rows/random.csv."""
    found = pd.DataFrame({env_id: play(env_id) for env_id in sorted(set(REPORTED))}).T
    columns = {"eval/episodic_return": "final_return", "eval/success_rate": "final_success"}
    runner.ROWS.mkdir(exist_ok=True)
    found.reindex(columns=columns).rename(columns=columns).to_csv(
        runner.ROWS / "random.csv", index_label="env_id", float_format="%.6g"
    )


if __name__ == "__main__":
    tyro.cli(main)
