"""Returns of random actions, the zero of the normalised scores.

./benchmark.sh random        # writes benchmark/results/random.csv
"""

import csv

import gymnasium as gym
import numpy as np
import tyro

from benchmark import runs
from benchmark.experiments import LOCOMOTION

EPISODES = 100
SEED = 0


def random_return(env_id: str) -> float:
    """Mean return of random actions over EPISODES full episodes."""
    env = gym.make(env_id)
    env.action_space.seed(SEED)
    returns = []
    for episode in range(EPISODES):
        env.reset(seed=SEED + episode)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def main():
    """Play random actions and write benchmark/results/random.csv."""
    found = [[env_id, f"{random_return(env_id):.6g}"] for env_id in LOCOMOTION]
    runs.RESULTS.mkdir(exist_ok=True)
    with (runs.RESULTS / "random.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_id", "final_return"])
        writer.writerows(found)


if __name__ == "__main__":
    tyro.cli(main)
