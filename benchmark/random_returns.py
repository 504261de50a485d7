"""Returns and success of random actions in every environment that is reported; the returns are the zero of the scores.

./benchmark.sh random        # writes benchmark/results/random.csv
"""

import csv
import sys
from pathlib import Path

import torch
import tyro

from benchmark import runs
from benchmark.experiments import EXPERIMENTS, GIPO
from benchmark.scripts import load

EPISODES = 100
COLUMNS = ("env_id", "final_return", "final_success")


class RandomAgent:
    """Stands in for an agent: uniform actions."""

    def __init__(self, action_space):
        self.action_space = action_space
        self.action_space.seed(0)

    def get_action_and_value(self, obs):
        return torch.as_tensor(self.action_space.sample()), None, None, None


def domain_of(env_id: str) -> str:
    """Which of the scripts an environment belongs to."""
    return {"ALE/": "atari", "Mini": "minigrid"}.get(env_id[:4], "continuous")


def play(env_id: str) -> dict[str, float]:
    """Means over EPISODES full episodes of random actions, under the tags of an evaluation."""
    script = load(Path(GIPO[domain_of(env_id)]).stem)
    ((args_of, (make_envs, _)),) = script.DOMAINS.items()
    args = args_of(env_id=env_id, seed=0, eval_episodes=EPISODES)
    envs = make_envs(args)
    return script.evaluate(make_envs, RandomAgent(envs.action_space), args, torch.device("cpu"), Path())


def main() -> int:
    """Play random actions and write benchmark/results/random.csv; 2 if the tuning is missing."""
    try:
        names = {
            run.value("--env-id")
            for name, plan in EXPERIMENTS.items()
            if name not in ("tune", "search", "efficiency", "rllib")
            for run in plan()
        }
    except runs.Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    known = []
    for env_id in sorted(names):
        found = play(env_id)
        success = f"{found['eval/success_rate']:.6g}" if "eval/success_rate" in found else ""
        known.append([env_id, f"{found['eval/episodic_return']:.6g}", success])
    runs.RESULTS.mkdir(exist_ok=True)
    with (runs.RESULTS / "random.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *known])
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
