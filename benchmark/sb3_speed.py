"""Steps per second of Stable-Baselines3's PPO, printed as a line of JSON for `benchmark/speed.py`.

    .venv-peers/bin/python benchmark/sb3_speed.py --env-id ALE/Breakout-v5 --steps 128 --epochs 4 --batch 256

The environments are those that its users have. Atari comes from make_atari_env with four stacked frames. MiniGrid gives
its own pixels of the agent's view, without the mission, because CnnPolicy does not read it. MuJoCo has normalized
observations and rewards.
"""

import argparse
import json
import time

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize


def make_envs(env_id: str, n: int):
    """Vector of n environments, and the policy for them."""
    if env_id.startswith("ALE/"):
        import ale_py

        gym.register_envs(ale_py)
        return VecFrameStack(make_atari_env(env_id, n, seed=1, env_kwargs={"frameskip": 1}), 4), "CnnPolicy"
    if env_id.startswith("MiniGrid"):
        from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper

        return make_vec_env(
            env_id, n, 1, wrapper_class=lambda env: ImgObsWrapper(RGBImgPartialObsWrapper(env))
        ), "CnnPolicy"
    return VecNormalize(make_vec_env(env_id, n, 1)), "MlpPolicy"


class Clock(BaseCallback):
    """Notes when each rollout begins."""

    def __init__(self):
        super().__init__()
        self.times = []

    def _on_rollout_start(self):
        self.times.append(time.perf_counter())

    def _on_step(self) -> bool:
        return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="HalfCheetah-v5", help="environment id of MuJoCo, ALE or MiniGrid")
    parser.add_argument("--envs", type=int, default=8, help="parallel environments (1 to 64)")
    parser.add_argument("--steps", type=int, default=256, help="steps per environment and rollout (64 to 2048)")
    parser.add_argument("--batch", type=int, default=128, help="transitions per gradient step (64 to 4096)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over a rollout (1 to 10)")
    parser.add_argument("--iterations", type=int, default=15, help="iterations to time (1 to 100)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1 to the number of cores)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    envs, policy = make_envs(args.env_id, args.envs)
    model = PPO(policy, envs, n_steps=args.steps, batch_size=args.batch, n_epochs=args.epochs, seed=1, device="auto")
    clock, batch = Clock(), args.envs * args.steps
    # two iterations to warm up, and one more whose beginning ends the measurement
    model.learn((args.iterations + 3) * batch, callback=clock)
    print(json.dumps({"steps/s": args.iterations * batch / (clock.times[2 + args.iterations] - clock.times[2])}))


if __name__ == "__main__":
    main()
