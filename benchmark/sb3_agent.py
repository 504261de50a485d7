"""What a user would pick instead: Stable-Baselines3's PPO and SAC at their defaults, with the scripts' log.

    .venv-peers/bin/python benchmark/sb3_agent.py --algorithm sac --env-id Hopper-v5

PPO sees normalized observations and rewards, as its documentation advises for MuJoCo. SAC sees both unchanged.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils.tensorboard import SummaryWriter


class LogEpisodes(BaseCallback):
    """Writes the mean return of the episodes that end with a step, under the scripts' tag."""

    def __init__(self, writer: SummaryWriter):
        super().__init__()
        self.writer = writer

    def _on_step(self) -> bool:
        returns = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        if returns:
            self.writer.add_scalar("charts/episodic_return", np.mean(returns), self.num_timesteps)
        return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=("ppo", "sac"), required=True, help="method to train")
    parser.add_argument("--env-id", default="HalfCheetah-v5", help="a MuJoCo id")
    parser.add_argument("--seed", type=int, default=1, help="seed of the method and of the environment")
    parser.add_argument("--total-timesteps", type=int, default=150_000, help="environment steps (1e5 to 1e6)")
    args = parser.parse_args()

    envs = make_vec_env(args.env_id, n_envs=1, seed=args.seed)
    if args.algorithm == "ppo":
        model = PPO("MlpPolicy", VecNormalize(envs), seed=args.seed, device="cpu")
    else:
        model = SAC("MlpPolicy", envs, seed=args.seed, device="cpu")
    folder = Path("runs", f"{args.env_id}__{args.algorithm}__{args.seed}__{time.time_ns()}")
    writer = SummaryWriter(folder)
    (folder / "args.json").write_text(json.dumps(vars(args)))
    model.learn(args.total_timesteps, callback=LogEpisodes(writer))
    writer.close()


if __name__ == "__main__":
    main()
