"""Returns and success of random actions in every reported environment. The returns are the zero of the scores.

./benchmark.sh random        # writes benchmark/results/random.csv
"""

import csv
from pathlib import Path

import gymnasium as gym
import torch
import tyro

from benchmark import runs
from benchmark.experiments import CLASSIC, CONTINUOUS, DOMAINS, REPORTED
from benchmark.scripts import load

EPISODES = 100
COLUMNS = ("env_id", "final_return", "final_success")


class RandomAgent:
    """Stands in for an agent and draws uniform actions."""

    def __init__(self, action_space):
        self.action_space = action_space
        self.action_space.seed(0)

    def get_action_and_value(self, obs):
        return torch.as_tensor(self.action_space.sample()), None, None, None


def play(env_id: str) -> dict[str, float]:
    """Means over EPISODES full episodes of random actions, under the tags of an evaluation."""
    _, script = DOMAINS.get(env_id[:4], CONTINUOUS)
    module = load(Path(script).stem)
    ((Flags, (make_envs, _)),) = module.DOMAINS.items()
    if env_id in CLASSIC:  # no script takes vectors with discrete actions

        def make_envs(args, num_envs, seed):
            return gym.make_vec(args.env_id, num_envs, vectorization_mode="sync")

    args = Flags(env_id=env_id, seed=0, eval_episodes=EPISODES)
    envs, _ = module.start_envs(make_envs, args, EPISODES, 0)
    return module.evaluate(make_envs, RandomAgent(envs.action_space), args, torch.device("cpu"), Path())


def main():
    """Play random actions and write benchmark/results/random.csv."""
    known = []
    for env_id in sorted(set(REPORTED)):
        found = play(env_id)
        success = f"{found['eval/success_rate']:.6g}" if "eval/success_rate" in found else ""
        known.append([env_id, f"{found['eval/episodic_return']:.6g}", success])
    runs.RESULTS.mkdir(exist_ok=True)
    with (runs.RESULTS / "random.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *known])


if __name__ == "__main__":
    tyro.cli(main)
