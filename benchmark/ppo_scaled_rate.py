"""Plain importance sampling slowed by GIPO's mean weight, the control for the shape of that weight.

    actor's rate = learning rate * mean(w),  w = exp(-(log r)^2 / (2 sigma^2)),  r = pi(a|s) / mu(a|s)

Each minibatch scales the actor's step by the mean weight that GIPO would give it, all samples in it alike. (Scaling the
loss would do nothing under Adam, and so GIPO's own steps are larger than these.)

    python benchmark/ppo_scaled_rate.py continuous --buffer-epochs 8

`diff ppo_baseline.py benchmark/ppo_scaled_rate.py` shows what that takes. Only `continuous` has an actor of its own.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py>=0.12,<0.13",
#     "gymnasium>=1.4,<2",
#     "metaworld>=3.1.1,<4",
#     "minigrid>=3.2,<4",
#     "moviepy>=2.2,<3",
#     "mujoco>=3.3,<3.17",
#     "numpy>=2,<3",
#     "packaging",
#     "tensorboard>=2.21",
#     "torch>=2.13,<3",
#     "tqdm>=4.70",
#     "tyro>=1.0,<2",
#     "wandb>=0.31,<1",
# ]
# ///

import argparse
import contextlib
import copy
import difflib
import importlib
import math
import os
import random
import re
import signal
import sys
import time
import zipfile
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import minigrid  # noqa: F401 (registers its environments)
import numpy as np
import torch
import torch.nn as nn
import tyro
from minigrid.core.actions import Actions
from minigrid.core.constants import OBJECT_TO_IDX
from minigrid.core.grid import Grid
from minigrid.core.world_object import WorldObj
from torch.distributions.categorical import Categorical
from torch.distributions.normal import Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ------------------------------------------------------- Flags --------------------------------------------------------
RANDOM_STEPS = 64  # per environment, before the first rollout, to start the statistics from
EVAL_SEED = 1_000_000  # added to the seed, for episodes that training has not seen


class BadInput(ValueError):
    """A mistake in the command line: one sentence that names the flag and the fix, shown without a traceback."""


def require(condition: bool, message: str):
    """Raise `BadInput(message)` unless the condition holds (NaN compares false, so it never passes a range)."""
    if not condition:
        raise BadInput(message)


@dataclass(kw_only=True)
class RunArgs:
    """The flags that --resume may change; those without a default here get one in the domain's own subclass below."""

    total_timesteps: int
    """environment steps in all, summed over the parallel environments (1e5 to 1e7)"""
    checkpoint_interval: int
    """iterations between checkpoints, each of which replaces the last (10 to 500); 0 saves only when the run ends"""
    resume: Path | None = None
    """go on with the run in this folder, or with its checkpoint; all flags but --device then come from there"""
    evaluate: Path | None = None
    """do not train, but play --eval-episodes with the agent of this run's folder or checkpoint"""
    eval_episodes: int = 10
    """full episodes to play with the trained agent, on fresh environments that end them (10 to 100); 0 plays none"""
    capture_video: bool = False
    """record the first of these episodes as an mp4 in the run's folder"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where network and replay buffer live; auto takes CUDA if there is one"""
    compile: bool = False
    """torch.compile the loss: a slower start, then faster updates of small networks; needs a C++ compiler on a CPU"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "gipo"
    """Weights and Biases project"""
    wandb_entity: str | None = None
    """Weights and Biases team; none is your default one"""
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    """offline writes to ./wandb for a later `wandb sync`"""


@dataclass(kw_only=True)
class Args(RunArgs):
    """The flags that say what a run is; the rest as above."""

    env_id: str
    """environment id, or module:id for one that an importable module of yours registers"""
    seed: int = 1
    """seed of python, numpy, torch and the environments"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the name of the run's folder"""

    num_envs: int
    """parallel environments N (4 to 64)"""
    num_steps: int
    """steps T per environment and rollout; one iteration collects T x N transitions (64 to 2048)"""
    learning_rate: float
    """Adam's step size (1e-4 to 1e-3)"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0 over the run"""
    gamma: float = 0.99
    """discount factor (0.9 to 0.999)"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation (0.9 to 1)"""
    update_epochs: int
    """update epochs per iteration, each of T x N transitions drawn from the replay buffer (1 to 10)"""
    num_minibatches: int
    """gradient steps per update epoch (1 to 32)"""
    norm_adv: bool = True
    """normalize the advantages of each minibatch to mean 0 and standard deviation 1"""
    ent_coef: float
    """weight of the entropy bonus (0 to 0.02)"""
    vf_coef: float = 0.5
    """weight of the value loss (0.25 to 1)"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient; a longer one is scaled down to it (0.5 to 10)"""

    buffer_epochs: int = 1
    """rollouts K that the replay buffer keeps; 1 is PPO's on-policy storage, more is staler data (1 to 64)"""
    policy_lag: int = 0
    """iterations L by which the policy that acts is older than the one that learns (0 to 16)"""
    freeze_buffer_at: int | None = None
    """environment step; from the next iteration on no transition enters the buffer any more; none never freezes it"""
    advantage_source: Literal["recompute", "stored"] = "recompute"
    """recompute advantages with the current critic in each iteration, or keep those stored at collection"""

    surrogate: Literal["clip", "dual-clip", "none", "sapo", "tis", "spo"] = "none"
    """policy loss; none is plain importance sampling"""
    sigma: float = 0.5
    """width of GIPO's weight, whose mean scales the actor's learning rate (0.2 to 2)"""
    clip_coef: float = 0.2
    """clip, dual-clip: how far the advantage may push the ratio from 1 before the gradient stops (0.1 to 0.3)"""
    dual_clip: float = 3.0
    """dual-clip: ratio above which a negative advantage gets no gradient (2 to 5)"""
    sapo_tau: float = 1.0
    """sapo: temperature of the soft gate where the advantage is positive (0.5 to 2)"""
    sapo_tau_neg: float = 1.05
    """sapo: temperature where the advantage is not positive (0.5 to 2)"""
    tis_cap: float = 1.0
    """tis: largest importance weight (1 to 5)"""
    spo_eps: float = 0.2
    """spo: how far the advantage may push the ratio from 1 before the gradient turns back (0.1 to 0.3)"""

    def __post_init__(self):
        def check(flag, ok, rule):
            require(ok, f"--{flag} {getattr(self, flag.replace('-', '_'))}: give {rule}.")

        rollout = f"one rollout (--num-steps x --num-envs = {self.batch_size})"
        check("seed", 0 <= self.seed <= 2_000_000_000, "a number from 0 to 2000000000")
        at_least = {"num-envs": 1, "num-steps": 2, "update-epochs": 1, "buffer-epochs": 1, "policy-lag": 0}
        at_least |= {"checkpoint-interval": 0, "eval-episodes": 0, "ent-coef": 0, "vf-coef": 0}
        for flag, low in at_least.items():
            check(flag, low <= getattr(self, flag.replace("-", "_")) < math.inf, f"a number of {low} or more")
        check("total-timesteps", self.total_timesteps >= self.batch_size, f"at least {rollout}")
        check("evaluate", not (self.evaluate and self.resume), "either this or --resume")
        check("eval-episodes", self.eval_episodes or not (self.evaluate or self.capture_video), "1 or more")
        check("learning-rate", 0 < self.learning_rate <= 1, "a number above 0, 1 at most")
        check("gamma", 0 <= self.gamma <= 1, "a number from 0 to 1")
        check("gae-lambda", 0 <= self.gae_lambda <= 1, "a number from 0 to 1")
        divides = self.num_minibatches >= 1 and self.batch_size % self.num_minibatches == 0
        check("num-minibatches", divides and self.minibatch_size > 1, f"a divisor of {rollout}, 2 or more left each")
        check("max-grad-norm", 0 < self.max_grad_norm < math.inf, "a number above 0")
        in_run = self.freeze_buffer_at is None or self.batch_size <= self.freeze_buffer_at < self.total_timesteps
        check("freeze-buffer-at", in_run, f"at least {rollout}, so that there is data, and less than --total-timesteps")
        check("device", self.device != "cuda" or torch.cuda.is_available(), "cpu, for torch finds no CUDA device here")
        check("device", self.device != "mps" or torch.backends.mps.is_available(), "cpu, for torch finds no Apple GPU")
        check("clip-coef", 0 < self.clip_coef < 1, "a number between 0 and 1 (0.1 to 0.3 is usual)")
        check("dual-clip", 1 < self.dual_clip < math.inf, "a number above 1 (2 to 5 is usual)")
        check("sapo-tau", 0 < self.sapo_tau < math.inf, "a number above 0 (0.5 to 2 is usual)")
        check("sapo-tau-neg", 0 < self.sapo_tau_neg < math.inf, "a number above 0 (0.5 to 2 is usual)")
        check("tis-cap", 0 < self.tis_cap < math.inf, "a number above 0 (1 to 5 is usual)")
        check("spo-eps", 0 < self.spo_eps < math.inf, "a number above 0 (0.1 to 0.3 is usual)")

    @property
    def batch_size(self) -> int:
        """Transitions in one rollout, and in one update epoch."""
        return self.num_steps * self.num_envs

    @property
    def minibatch_size(self) -> int:
        """Transitions in one gradient step."""
        return self.batch_size // self.num_minibatches


def load_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """Find a registered environment, importing the module of `module:id`; `BadInput` names near matches."""
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise BadInput(f"its module cannot be imported, put it on PYTHONPATH ({error}).") from None
    try:
        return gym.spec(name)
    except gym.error.Error:
        near = difflib.get_close_matches(name, gym.registry, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "give a registered id."
        raise BadInput(f"no such environment; {hint}") from None


def layer_init(layer: nn.Module, std: float = math.sqrt(2), bias_const: float = 0.0) -> nn.Module:
    """Orthogonal weights of gain `std` (Saxe et al. 2014) and constant biases."""
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


def to_tensor(array, device: torch.device) -> torch.Tensor:
    """An array of the environment on the device: bytes and truth values as they are, numbers as float32."""
    tensor = torch.as_tensor(array)
    return tensor.to(device, tensor.dtype if tensor.dtype in (torch.uint8, torch.bool) else torch.float32)


# ------------------------------------------------------- Atari --------------------------------------------------------
gym.register_envs(ale_py)


@dataclass(kw_only=True)
class AtariArgs(Args):
    """Arcade Learning Environment: 84 x 84 grey pixels, full games, discrete actions."""

    env_id: str = "ALE/Breakout-v5"
    total_timesteps: int = 10_000_000
    checkpoint_interval: int = 25
    num_envs: int = 8
    num_steps: int = 128
    learning_rate: float = 2.5e-4
    update_epochs: int = 4
    num_minibatches: int = 4
    ent_coef: float = 0.01
    sticky_actions: float = 0.25
    """probability that the emulator repeats the last action; 0.25 is the v5 standard, 0 is CleanRL's protocol"""
    life_loss_terminates: bool = True
    """let a lost life end the return that is learned from; the game and its logged score go on"""
    bfloat16: bool = False
    """compute features in bfloat16, for GPUs and CPUs with AMX; far slower on a CPU without"""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.sticky_actions <= 1, f"--sticky-actions {self.sticky_actions}: give a probability, 0 to 1.")


class ReportLifeLoss(gym.vector.VectorWrapper):
    """Adds the mask `infos["life_lost"]`: only a decrease counts, for a new game brings the lives back."""

    def reset(self, **kwargs):
        obs, infos = self.env.reset(**kwargs)
        self.lives = infos["lives"]
        return obs, infos

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        infos["life_lost"] = infos["lives"] < self.lives
        self.lives = infos["lives"]
        return obs, rewards, terminations, truncations, infos


class ColorTwin(gym.vector.VectorWrapper):
    """Steps a copy of the games in color alongside, for `render`, which the emulator's own vector does not have."""

    def __init__(self, envs: gym.vector.VectorEnv, spec: gym.envs.registration.EnvSpec, protocol: dict):
        super().__init__(envs)
        self.metadata = envs.metadata | {"render_fps": 15}  # 60 frames a second, 4 a step
        self.twin = gym.make_vec(spec, img_height=210, img_width=160, grayscale=False, stack_num=1, **protocol)

    def reset(self, **kwargs):
        self.frames, _ = self.twin.reset(**kwargs)
        return self.env.reset(**kwargs)

    def step(self, actions):
        self.frames, *_ = self.twin.step(actions)
        return self.env.step(actions)

    def render(self):
        return self.frames[:, 0]


def make_atari_envs(args: AtariArgs, **render) -> gym.vector.VectorEnv:
    """Vector of games with observations (4, 84, 84) uint8; `BadInput` if the id or its spaces do not fit."""
    spec = load_spec(args.env_id)
    if spec.namespace == "ALE":
        protocol = {"repeat_action_probability": args.sticky_actions, "full_action_space": False, "frameskip": 4}
        protocol |= {"maxpool": True, "noop_max": 30, "use_fire_reset": True, "max_num_frames_per_episode": 108_000}
        protocol |= {"num_envs": args.num_envs, "autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        protocol["reward_clipping"] = False  # the agent clips, so that logged returns stay true scores
        protocol["episodic_life"] = False  # would restart the whole game at every lost life
        protocol["life_loss_info"] = False  # would make the recorder below drop a step at every lost life
        envs = gym.make_vec(spec, img_height=84, img_width=84, grayscale=True, stack_num=4, **protocol)
        if render:
            envs = ColorTwin(envs, spec, protocol)
        if args.life_loss_terminates:
            envs = ReportLifeLoss(envs)
    else:
        envs = gym.make_vec(spec, num_envs=args.num_envs, vectorization_mode="sync", **render)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    rule = f"observations must be (4, 84, 84) uint8, not {obs_space}; try ALE/Breakout-v5."
    require(obs_space.shape == (4, 84, 84) and obs_space.dtype == np.uint8, rule)
    rule = f"actions must be discrete and count from 0, not {action_space}; try ALE/Breakout-v5."
    require(isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0, rule)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


class AtariAgent(nn.Module):
    """Nature CNN (Mnih et al. 2015) shared by policy and value; observations (B, 4, 84, 84) uint8."""

    def __init__(self, envs: gym.vector.VectorEnv, args: AtariArgs):
        super().__init__()
        self.bfloat16 = args.bfloat16
        self.network = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        self.actor = layer_init(nn.Linear(512, int(envs.single_action_space.n)), std=0.01)
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)

    def features(self, obs):
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.network(obs.to(torch.float32, memory_format=torch.channels_last).div_(255.0)).float()

    def get_value(self, obs):
        return self.critic(self.features(obs)).squeeze(-1)

    def get_action_and_value(self, obs, action=None):
        hidden = self.features(obs)
        probs = Categorical(logits=self.actor(hidden), validate_args=False)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(hidden).squeeze(-1)

    def update_statistics(self, obs, rewards, dones, valid):
        """Pixels and clipped rewards need no statistics."""

    def scale_rewards(self, rewards):
        return rewards.clamp(-1, 1)


# ------------------------------------------------- Continuous control -------------------------------------------------
@dataclass(kw_only=True)
class ContinuousArgs(Args):
    """Continuous control: MuJoCo v5 ids, and Meta-World's tasks as Meta-World/reach-v3."""

    env_id: str = "HalfCheetah-v5"
    total_timesteps: int = 1_000_000
    checkpoint_interval: int = 100
    num_envs: int = 8
    num_steps: int = 256
    learning_rate: float = 3e-4
    update_epochs: int = 10
    num_minibatches: int = 16
    ent_coef: float = 0.0


def make_continuous_envs(args: ContinuousArgs, **render) -> gym.vector.VectorEnv:
    """Vector of environments with flat observations and clipped actions; `BadInput` if the id does not fit."""
    if args.env_id.startswith("Meta-World/"):
        import metaworld  # slow to import, so only here; it registers the id and carries its own episode recorder

        task = args.env_id.removeprefix("Meta-World/")
        near = ", ".join(difflib.get_close_matches(task, metaworld.ALL_V3_ENVIRONMENTS, n=3, cutoff=0.4)) or "reach-v3"
        require(
            task in metaworld.ALL_V3_ENVIRONMENTS,
            f"Meta-World has no such task; did you mean {near}?",
        )
        # goals follow the constructor's seed, so each copy needs its own
        kwargs = [{"id": "Meta-World/MT1", "env_name": task, "seed": args.seed + i} for i in range(args.num_envs)]
    else:
        kwargs = [{"id": load_spec(args.env_id)}] * args.num_envs
    if render and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # needs no screen
    make_env = partial(gym.make, disable_env_checker=True, **render)
    envs = gym.vector.SyncVectorEnv([partial(make_env, **kw) for kw in kwargs])
    if not args.env_id.startswith("Meta-World/"):
        envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    rule = f"observations must be a flat Box, not {obs_space}; try HalfCheetah-v5."
    require(isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1, rule)
    rule = f"actions must be a flat Box, not {action_space}; try HalfCheetah-v5."
    require(isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1, rule)
    low, high = action_space.low, action_space.high
    return gym.wrappers.vector.TransformAction(envs, lambda actions: np.clip(actions, low, high))


class RunningMeanStd(nn.Module):
    """Mean and variance of all samples so far, updated batch by batch (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    def update(self, x):
        delta = x - self.mean
        total = self.count + len(x)
        self.mean = self.mean + delta.sum(0) / total
        self.var = (self.var * self.count + (delta * (x - self.mean)).sum(0)) / total
        self.count = total


class ContinuousAgent(nn.Module):
    """Gaussian policy with a state-independent log standard deviation; observations (B, D) are normalized here."""

    def __init__(self, envs: gym.vector.VectorEnv, args: ContinuousArgs):
        super().__init__()
        obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
        self.gamma = args.gamma
        self.obs_stats = RunningMeanStd((obs_dim,))
        self.return_stats = RunningMeanStd(())
        self.register_buffer("discounted_return", torch.zeros(args.num_envs), persistent=False)
        self.critic = nn.Sequential(
            layer_init(nn.Linear(obs_dim, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )
        self.actor_mean = nn.Sequential(
            layer_init(nn.Linear(obs_dim, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, action_dim), std=0.01),
        )
        self.actor_logstd = nn.Parameter(torch.zeros(1, action_dim))

    def normalize(self, obs):
        return ((obs - self.obs_stats.mean) / torch.sqrt(self.obs_stats.var + 1e-8)).clamp(-10, 10)

    def get_value(self, obs):
        return self.critic(self.normalize(obs)).squeeze(-1)

    def get_action_and_value(self, obs, action=None):
        obs = self.normalize(obs)
        action_mean = self.actor_mean(obs)
        probs = Normal(action_mean, self.actor_logstd.expand_as(action_mean).exp(), validate_args=False)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action).sum(-1), probs.entropy().sum(-1), self.critic(obs).squeeze(-1)

    def update_statistics(self, obs, rewards, dones, valid):
        """Add a rollout, (T, N, D) and (T, N), to the statistics of observations and of discounted returns."""
        self.obs_stats.update(obs.flatten(0, 1))
        returns = torch.zeros_like(rewards)
        for t in range(len(rewards)):
            returns[t] = self.discounted_return * self.gamma + rewards[t]
            self.discounted_return = returns[t] * ~dones[t]
        self.return_stats.update(returns[valid])

    def scale_rewards(self, rewards):
        return (rewards / torch.sqrt(self.return_stats.var + 1e-8)).clamp(-10, 10)


# -------------------------------------------------- MiniGrid vision ---------------------------------------------------
# every word that a mission of minigrid 3.2 or its BabyAI levels can have; 0 is padding
VOCABULARY = """a after and at avoid ball behind blue box door end fetch find from front get go goal green grey
    hallway in key lava left matching maze must near next object of on open opening pick purple put
    reach red right room rooms square the then to traverse unlock up use yellow you your""".split()
WORD_IDS = {word: i for i, word in enumerate(VOCABULARY, start=1)}
MAX_WORDS = 40  # a few of BabyAI's longest missions lose their end
TILE = 8
VIEW = 7 * TILE
PIXELS = VIEW * VIEW * 3
# tasks, by the beginning of their id, that need only some of the seven actions
ACTIONS = {
    "MiniGrid-Fetch": (Actions.left, Actions.right, Actions.forward, Actions.pickup),
    "MiniGrid-GoTo": (Actions.left, Actions.right, Actions.forward, Actions.done),
}


@dataclass(kw_only=True)
class MinigridArgs(Args):
    """MiniGrid and BabyAI from pixels and words: the agent's 56 x 56 view and the mission, nothing symbolic."""

    env_id: str = "MiniGrid-Fetch-5x5-N2-v0"
    total_timesteps: int = 150_000
    checkpoint_interval: int = 100
    num_envs: int = 16
    num_steps: int = 64
    learning_rate: float = 1e-3
    update_epochs: int = 4
    num_minibatches: int = 4
    ent_coef: float = 0.03


@cache
def render_tile(kind: int, color: int, state: int, agent_here: bool) -> np.ndarray:
    """Pixels (8, 8, 3) of one cell of the agent's view; drawing is slow, so each kind of tile is drawn once."""
    tile, visible = WorldObj.decode(kind, color, state), kind != OBJECT_TO_IDX["unseen"]
    return Grid.render_tile(tile, agent_dir=3 if agent_here else None, highlight=visible, tile_size=TILE)


class PixelsAndWords(gym.Wrapper):
    """Packs the agent's view and the mission into one uint8 vector: pixels (56, 56, 3), then 40 word ids."""

    def __init__(self, env: gym.Env, env_id: str):
        super().__init__(env)
        self.actions = next((ACTIONS[task] for task in ACTIONS if env_id.startswith(task)), tuple(Actions))
        self.action_space = gym.spaces.Discrete(len(self.actions))
        self.observation_space = gym.spaces.Box(0, 255, (PIXELS + MAX_WORDS,), np.uint8)

    def pack(self, obs):
        packed = np.zeros(PIXELS + MAX_WORDS, np.uint8)
        pixels = packed[:PIXELS].reshape(VIEW, VIEW, 3)
        for i, column in enumerate(obs["image"].tolist()):
            for j, cell in enumerate(column):
                tile = render_tile(*cell, agent_here=(i, j) == (3, 6))
                pixels[j * TILE : (j + 1) * TILE, i * TILE : (i + 1) * TILE] = tile
        words = re.findall("[a-z]+", obs["mission"].lower())
        unknown = [word for word in words if word not in WORD_IDS]
        require(not unknown, f"the mission's words {unknown} are not in VOCABULARY; add them.")
        ids = [WORD_IDS[word] for word in words[:MAX_WORDS]]
        packed[PIXELS : PIXELS + len(ids)] = ids
        return packed

    def reset(self, **kwargs):
        with contextlib.redirect_stdout(None):  # BabyAI prints each level that it rejects
            obs, info = self.env.reset(**kwargs)
        return self.pack(obs), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(self.actions[action])
        info["success"] = reward > 0
        return self.pack(obs), reward, terminated, truncated, info


def make_minigrid_envs(args: MinigridArgs, **render) -> gym.vector.VectorEnv:
    """Vector of grid worlds with observations (9448,) uint8; `BadInput` if the id does not fit."""
    spec = load_spec(args.env_id)

    def make_env():
        env = gym.make(spec, disable_env_checker=True, **render)
        space = env.observation_space
        shapes = {key: part.shape for key, part in space.items()} if isinstance(space, gym.spaces.Dict) else {}
        rule = f"observations must be MiniGrid's 7 x 7 view and mission, not {space}; try MiniGrid-Fetch-5x5-N2-v0."
        require("mission" in shapes and shapes.get("image") == (7, 7, 3), rule)
        return PixelsAndWords(env, spec.id)

    return gym.wrappers.vector.RecordEpisodeStatistics(gym.vector.SyncVectorEnv([make_env] * args.num_envs))


class MinigridAgent(nn.Module):
    """Embeds each 8 x 8 patch and scales it by the sum of the mission's words, whose order is not read.

    That is FiLM (Perez et al. 2018) without its shift; observations (B, 9448) uint8.
    """

    def __init__(self, envs: gym.vector.VectorEnv, args: MinigridArgs):
        super().__init__()
        self.patches = layer_init(nn.Conv2d(3, 128, TILE, stride=TILE))
        self.norm = nn.LayerNorm(128)
        self.words = nn.EmbeddingBag(len(VOCABULARY) + 1, 128, mode="sum", padding_idx=0)
        self.project = nn.Linear(128, 32)
        self.network = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(49 * 32, 128), nn.ReLU())
        self.actor = layer_init(nn.Linear(128, int(envs.single_action_space.n)), std=0.01)
        self.critic = layer_init(nn.Linear(128, 1), std=1.0)

    def features(self, obs):
        pixels = obs[:, :PIXELS].view(-1, VIEW, VIEW, 3).permute(0, 3, 1, 2) / 127.5 - 1
        patches = self.norm(self.patches(pixels).flatten(2).mT)  # (B, 49, 128)
        scale = 1 + self.words(obs[:, PIXELS:].int()).unsqueeze(1)
        return self.network(self.project(scale * patches))

    def get_value(self, obs):
        return self.critic(self.features(obs)).squeeze(-1)

    def get_action_and_value(self, obs, action=None):
        hidden = self.features(obs)
        probs = Categorical(logits=self.actor(hidden), validate_args=False)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(hidden).squeeze(-1)

    def update_statistics(self, obs, rewards, dones, valid):
        """Pixels, words and rewards of at most 1 need no statistics."""

    def scale_rewards(self, rewards):
        return rewards


# ----------------------------------------------------- Algorithm ------------------------------------------------------
class ReplayBuffer(nn.Module):
    """The last K rollouts of T x N transitions, oldest overwritten first; K = 1 is PPO's storage exactly.

    Tensors are (K, T + 1, N, ...). The next observation of row t is row t + 1, so row T holds nothing but the last
    observation. `valid` is false there, in rollouts not yet collected, and in the row that follows the end of an
    episode: gymnasium ignores its action and resets (NEXT_STEP autoreset), so it is no transition.
    """

    def __init__(self, envs: gym.vector.VectorEnv, args: Args, device: torch.device):
        shape = (args.buffer_epochs, args.num_steps + 1, args.num_envs)
        obs_space, action_space = envs.single_observation_space, envs.single_action_space
        obs_dtype = torch.uint8 if obs_space.dtype == np.uint8 else torch.float32
        action_dtype = torch.float32 if isinstance(action_space, gym.spaces.Box) else torch.int64
        super().__init__()
        self.obs = nn.Buffer(torch.zeros(shape + obs_space.shape, dtype=obs_dtype, device=device))
        self.actions = nn.Buffer(torch.zeros(shape + action_space.shape, dtype=action_dtype, device=device))
        for name in ("logprobs", "rewards", "values", "advantages", "returns"):
            self.register_buffer(name, torch.zeros(shape, device=device))
        for name in ("terminated", "dones", "valid"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.bool, device=device))
        self.versions = nn.Buffer(torch.full(shape[:1], -1))  # iteration of the policy that acted, -1 for no rollout
        self.slot = nn.Buffer(torch.tensor(-1))  # index of the newest rollout

    def start(self, obs, version: int):
        """Overwrite the oldest rollout by a new one, which begins with `obs` and is acted by policy `version`."""
        self.slot = (self.slot + 1) % len(self.obs)
        self.versions[self.slot] = version
        self.newest = {name: rollouts[self.slot] for name, rollouts in self.named_buffers() if rollouts.dim() > 1}
        self.newest["obs"][0] = obs

    def store(self, step: int, next_obs, **transition):
        """Write row `step` of the newest rollout, and the observation that follows it; arrays or tensors."""
        for name, value in transition.items():
            self.newest[name][step] = torch.as_tensor(value)
        self.newest["obs"][step + 1] = next_obs

    def sample(self, n: int) -> torch.Tensor:
        """n flat indices of valid transitions, uniform, without replacement until all were drawn once."""
        valid = self.valid.flatten().nonzero().squeeze(1)
        rounds = math.ceil(n / len(valid))
        return valid[torch.cat([torch.randperm(len(valid), device=valid.device) for _ in range(rounds)])[:n]]


def compute_gae(rewards, values, terminated, dones, gamma: float, gae_lambda: float):
    """Generalized advantage estimation (Schulman et al. 2016), not corrected for the drift of the policy since.

    rewards, terminated and dones are (..., T, N), values (..., T + 1, N). A terminated step is worth its reward alone;
    a time limit ends the sum as well, but bootstraps from the value of the row below it, the final observation.
    Returns advantages and value targets, (..., T, N) each.
    """
    delta = rewards + gamma * values[..., 1:, :] * ~terminated - values[..., :-1, :]
    advantages = torch.zeros_like(rewards)
    lastgaelam = 0.0
    for t in reversed(range(rewards.shape[-2])):
        lastgaelam = delta[..., t, :] + gamma * gae_lambda * ~dones[..., t, :] * lastgaelam
        advantages[..., t, :] = lastgaelam
    return advantages, advantages + values[..., :-1, :]


def policy_loss(logratio, advantages, args: Args):
    """The surrogates to compare GIPO with: hard clips, soft gates, truncated and plain importance sampling.

    logratio = log pi(a|s) - log mu(a|s), joint over action dimensions, and advantages are (B,). Returns the loss and,
    detached, the coefficient c of each sample, whose gradient is -c A grad log pi / B.
    """
    # float32 overflows at exp(88): cap the value at exp(20), and let the gradient pass
    ratio = torch.exp(logratio - (logratio - 20).clamp(min=0).detach())
    positive = advantages > 0
    if args.surrogate in ("clip", "dual-clip"):  # Schulman et al. 2017; Ye et al. 2020
        low, high = 1 - args.clip_coef, 1 + args.clip_coef
        objective = torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
        coef = ratio * torch.where(positive, ratio <= high, ratio >= low)
        if args.surrogate == "dual-clip":
            objective = torch.where(positive, objective, torch.max(objective, args.dual_clip * advantages))
            coef = coef * (positive | (ratio <= args.dual_clip))
    elif args.surrogate == "none":
        objective = ratio * advantages
        coef = ratio
    elif args.surrogate == "sapo":  # Gao et al. 2025
        tau = torch.full_like(ratio, args.sapo_tau_neg).masked_fill(positive, args.sapo_tau)
        gate = torch.sigmoid(tau * (ratio - 1))
        objective = 4 / tau * gate * advantages
        coef = ratio * 4 * gate * (1 - gate)
    elif args.surrogate == "tis":  # Ionides 2008
        coef = ratio.detach().clamp(max=args.tis_cap)
        objective = coef * advantages * logratio
    elif args.surrogate == "spo":  # Xie et al. 2024
        objective = ratio * advantages - advantages.abs() * (ratio - 1) ** 2 / (2 * args.spo_eps)
        coef = ratio * (1 - advantages.sign() * (ratio - 1) / args.spo_eps)
    return -objective.mean(), coef.detach()


def minibatch_loss(agent, obs, actions, logprobs, advantages, returns, args: Args):
    """The loss of a minibatch (B, ...) and, detached, its parts (3,), the log-ratios (B,) and the coefficients (B,)."""
    _, newlogprob, entropy, newvalue = agent.get_action_and_value(obs, actions)
    logratio = newlogprob - logprobs
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    # Policy loss
    pg_loss, coef = policy_loss(logratio, advantages, args)

    # Value loss
    v_loss = 0.5 * ((newvalue - returns) ** 2).mean()

    entropy_loss = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
    return loss, torch.stack([pg_loss, v_loss, entropy_loss]).detach(), logratio.detach(), coef


def diagnostics(logratio, coef) -> dict[str, torch.Tensor]:
    """How far the policy is from those that collected samples (B,), and how many still teach; all scalars."""
    ratio = logratio.clamp(max=20).exp()  # float32 overflows at exp(88)
    weight = coef.abs() / coef.abs().max().clamp(min=1e-38)  # relative, for squares overflow too
    return {
        "losses/approx_kl": (ratio - 1 - logratio).mean(),
        "losses/clipfrac": ((ratio - 1).abs() > 0.2).float().mean(),
        "offpolicy/abs_logratio_p95": logratio.abs().quantile(0.95),
        "offpolicy/ess": weight.sum() ** 2 / (len(weight) * (weight**2).sum()).clamp(min=1e-38),
        "offpolicy/dead_fraction": (coef.abs() < 1e-3).float().mean(),
        "offpolicy/coef_mean": coef.mean(),
    }


# --------------------------------------------- Checkpoints, evaluation -----------------------------------------------
CHECKPOINT = "checkpoint.pt"  # in the run's folder


@contextlib.contextmanager
def one_sentence(code: int, prefix: str = ""):
    """Print what is wrong and exit, without a traceback: 2 for a mistake of the user, 1 for what happens in a run."""
    try:
        yield
    except (BadInput, gym.error.Error, ImportError, OSError) as error:
        print(f"error: {prefix}{error}", file=sys.stderr)
        sys.exit(code)


def save_checkpoint(path: Path, iteration: int, args: Args, agent, optimizer, buffer, snapshots):
    """Save what it takes to go on with `iteration`; beside the old file and renamed, so that no crash leaves a half."""
    _, numpy_keys, numpy_position, *_ = np.random.get_state()
    checkpoint = {
        "domain": type(args).__name__,
        "args": {name: value for name, value in vars(args).items() if name not in ("device", "resume", "evaluate")},
        "iteration": iteration,
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "buffer": buffer.state_dict(),
        "snapshots": [(version, weights) for version, weights in snapshots if version >= iteration - args.policy_lag],
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.tensor([*numpy_keys.tolist(), numpy_position]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    with path.with_suffix(".tmp").open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch has no clearer word for a disk that is full
            raise OSError(f"{path} cannot be written ({error})") from None
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint, from a run's folder or by its own path, and run no code in it; `BadInput` if it is damaged."""
    path = path / CHECKPOINT if path.is_dir() else path
    try:
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, "wrong checksum")  # torch would read flipped bits without complaint
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows in many ways
        raise BadInput(f"{path} is missing, damaged or no checkpoint ({type(error).__name__}).") from None


def restore(checkpoint: dict, agent, optimizer, buffer, snapshots) -> int:
    """Put back what `save_checkpoint` saved, and return the iteration to go on with; `BadInput` if it does not fit."""
    try:
        snapshots.extend(checkpoint["snapshots"])
        for weights in [*(weights for _, weights in snapshots), checkpoint["agent"]]:
            agent.load_state_dict(weights)  # the older ones only to see that they fit
        buffer.load_state_dict(checkpoint.pop("buffer"))
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]})
        fit = all(optimizer.state[p][m].shape == p.shape for p in agent.parameters() for m in ("exp_avg", "exp_avg_sq"))
        require(fit, "the shape of a moment of Adam")
        random.setstate((3, tuple(checkpoint["python"].tolist()), None))
        *numpy_keys, numpy_position = checkpoint["numpy"].tolist()
        np.random.set_state(("MT19937", numpy_keys, numpy_position))
        torch.set_rng_state(checkpoint["torch"])
        if len(checkpoint["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(checkpoint["cuda"])
        return int(checkpoint["iteration"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"the checkpoint does not fit this environment ({str(error).splitlines()[0]}).") from None


def record_episodes(played: dict[str, list], infos: dict, success, among=True) -> np.ndarray:
    """Add the episodes that end with this step to the lists in `played`; returns which did, (N,), all of `among`.

    `success` (N,) is updated in place: a success at any step counts for the episode.
    """
    success |= infos.get("success", success) > 0
    ended = infos.get("_episode", np.zeros_like(success))
    counted = ended & among
    if counted.any():
        played["episodic_return"].extend(infos["episode"]["r"][counted])
        played["episodic_length"].extend(infos["episode"]["l"][counted])
        if "success" in infos:
            played["success_rate"].extend(success[counted])
    success[ended] = False
    return counted


def evaluate(make_envs, agent, args: Args, device, video: Path) -> dict[str, float]:
    """Play full episodes with fixed weights on environments of a seed of their own, print and return a summary.

    Each environment plays a share that is fixed beforehand: to take whichever episodes end first would favor short
    ones. Actions are sampled, and the generators of the training are left as they were.
    """
    seed, fewer = args.seed + EVAL_SEED, copy.copy(args)
    if args.capture_video:
        fewer.num_envs = 1  # for a vector draws all of its environments
    envs = make_envs(fewer, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    share = args.eval_episodes // envs.num_envs + (np.arange(envs.num_envs) < args.eval_episodes % envs.num_envs)
    first_share, frames, played, success = share[0], [], defaultdict(list), np.zeros(envs.num_envs, dtype=bool)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        while share.any():
            if args.capture_video and share[0] == first_share:
                frames.append(envs.render()[0])
            action, _, _, _ = agent.get_action_and_value(to_tensor(obs, device))
            obs, _, _, _, infos = envs.step(action.cpu().numpy())
            share -= record_episodes(played, infos, success, among=share > 0)
    envs.close()
    returns, means = played["episodic_return"], {name: np.mean(values) for name, values in played.items()}
    spread = f"of returns std {np.std(returns):.6g}, min {np.min(returns):.6g}, max {np.max(returns):.6g}"
    print(f"{len(returns)} episodes: {', '.join(f'mean {name} {m:.6g}' for name, m in means.items())}; {spread}")
    if frames:
        from moviepy import ImageSequenceClip  # slow to import, so only here

        ImageSequenceClip(frames, fps=envs.metadata.get("render_fps", 30)).write_videofile(str(video), logger=None)
    return {f"eval/{name}": mean for name, mean in means.items()}


# ---------------------------------------------------- Command line ----------------------------------------------------
DOMAINS = {
    AtariArgs: (make_atari_envs, AtariAgent),
    ContinuousArgs: (make_continuous_envs, ContinuousAgent),
    MinigridArgs: (make_minigrid_envs, MinigridAgent),
}


def parse_args(**default) -> Args:
    """The command line over the domain's defaults, or over those of `default=`; a mistake exits with 2."""
    presets = {
        "atari": ("Arcade Learning Environment from pixels.", AtariArgs(clip_coef=0.1)),
        "continuous": ("MuJoCo and Meta-World.", ContinuousArgs()),
        "minigrid": ("MiniGrid and BabyAI from pixels and words.", MinigridArgs()),
    }
    for saved in default.values():
        presets = {key: (text, saved if type(saved) is type(own) else own) for key, (text, own) in presets.items()}
    return tyro.extras.overridable_config_cli(presets, description=__doc__)


def read_args() -> tuple[Args, dict | None]:
    """Flags, and the checkpoint that --resume or --evaluate names, whose flags then hold; a mistake exits with 2."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--evaluate", type=Path)
    given, _ = parser.parse_known_args()
    path = given.resume or given.evaluate
    # a run that was killed before its first checkpoint starts afresh
    if not path or (given.resume and any(path.glob("events.out.tfevents.*")) and not (path / CHECKPOINT).exists()):
        return parse_args(), None
    checkpoint = load_checkpoint(path)
    try:
        saved = {domain.__name__: domain for domain in DOMAINS}[checkpoint["domain"]](**checkpoint["args"])
    except (LookupError, TypeError):
        raise BadInput(f"{path} is no checkpoint of this script; give one that it wrote.") from None
    args = parse_args(default=saved)
    for name, value in vars(saved).items():
        flag, new = name.replace("_", "-"), getattr(args, name, None)
        rule = f"--{flag} {new}: {path} was run with {value}; leave the flag out, or start a new run."
        require(new == value or name in RunArgs.__annotations__, rule)
    return args, checkpoint


if __name__ == "__main__":
    with one_sentence(2):
        args, checkpoint = read_args()
    make_envs, Agent = DOMAINS[type(args)]
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # one seed, one result on a GPU too
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    with one_sentence(2, f"--env-id {args.env_id}: "):
        envs = make_envs(args)
        envs.reset(seed=args.seed)

    agent = Agent(envs, args).to(device)
    actor = Agent(envs, args).to(device)
    critic, actors = agent.critic.parameters(), [*agent.actor_mean.parameters(), agent.actor_logstd]
    groups = [{"params": critic}, {"params": actors}]
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5, fused=True)
    buffer = ReplayBuffer(envs, args, device)
    snapshots = deque(maxlen=args.policy_lag + 1)
    with one_sentence(2):
        first_iteration = restore(checkpoint, agent, optimizer, buffer, snapshots) if checkpoint else 0
    global_step = first_iteration * args.batch_size

    # in nanoseconds, for runs that start together must not share a folder
    run_name = f"{re.sub('[/:]', '-', args.env_id)}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    folder = args.resume or args.evaluate or Path("runs", run_name)
    folder = folder.parent if folder.is_file() else folder
    if args.evaluate:
        evaluate(make_envs, agent, args, device, folder / f"{global_step}.mp4")
        sys.exit()
    if args.track:
        try:
            import wandb

            place = {"project": args.wandb_project_name, "entity": args.wandb_entity, "mode": args.wandb_mode}
            name = {"name": folder.absolute().name, "id": folder.absolute().name, "resume": "allow"}
            wandb.init(**place, **name, sync_tensorboard=True, config=vars(args))
        except Exception as error:  # tracking must not cost a run
            print(f"warning: the run goes on without Weights and Biases: {error}", file=sys.stderr)
    with one_sentence(2):
        # what was logged after the checkpoint will be logged again
        writer = SummaryWriter(folder, purge_step=global_step + 1 if checkpoint else 0)
    print(f"{folder}: {'goes on' if checkpoint else 'starts, with the flags given,'} after step {global_step}")
    if not checkpoint:
        table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    # Statistics start from a few random steps, which are neither counted nor learned from
    envs.action_space.seed(args.seed)
    next_valid = np.ones(args.num_envs, dtype=bool)
    for step in range(0 if checkpoint else RANDOM_STEPS):
        next_obs, reward, terminations, truncations, _ = envs.step(envs.action_space.sample())
        done = terminations | truncations | (step == RANDOM_STEPS - 1)  # the run itself starts with a reset
        row = (next_obs, reward, done, next_valid)
        agent.update_statistics(*(to_tensor(array, device).unsqueeze(0) for array in row))
        next_valid = ~done

    loss_of = torch.compile(minibatch_loss) if args.compile else minibatch_loss
    stops = []

    def stop_after_iteration(signum, _):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C aborts at once
        stops.append(signum)

    handlers = {signum: signal.signal(signum, stop_after_iteration) for signum in (signal.SIGINT, signal.SIGTERM)}

    start_time, start_step = time.time(), global_step
    # a resumed run starts its episodes anew, with seeds that no earlier part of it began with
    next_obs = to_tensor(envs.reset(seed=args.seed + args.num_envs * first_iteration)[0], device)
    next_valid = np.ones(args.num_envs, dtype=bool)
    success = np.zeros(args.num_envs, dtype=bool)
    num_iterations = args.total_timesteps // args.batch_size
    progress = tqdm(total=num_iterations * args.batch_size, initial=global_step, unit="step", unit_scale=True)

    for iteration in range(first_iteration, num_iterations):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        snapshots.append((iteration, copy.deepcopy(agent.state_dict())))
        version, weights = snapshots[0]
        actor.load_state_dict(weights)
        frozen = args.freeze_buffer_at is not None and global_step >= args.freeze_buffer_at

        # Rollout
        episodes = defaultdict(list)
        if not frozen:
            buffer.start(next_obs, version)
        for step in range(args.num_steps):
            with torch.no_grad():
                action, logprob, _, value = actor.get_action_and_value(next_obs)
            next_obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())
            next_obs = to_tensor(next_obs, device)
            valid, next_valid = next_valid, ~(terminations | truncations)
            if not frozen:
                # a lost life ends the return like a death, but the game goes on: no autoreset follows
                terminated = terminations | infos.get("life_lost", False)
                transition = {"actions": action, "logprobs": logprob, "values": value, "rewards": reward}
                transition |= {"terminated": terminated, "dones": terminated | truncations, "valid": valid}
                buffer.store(step, next_obs, **transition)
            record_episodes(episodes, infos, success)
        global_step += args.batch_size

        # Advantages
        recompute = args.advantage_source == "recompute"
        if recompute or not frozen:
            slots = (buffer.versions >= 0).nonzero().flatten().tolist() if recompute else [buffer.slot.item()]
            with torch.no_grad():
                for slot in slots:
                    # what the current weights acted on they have valued, but for the observation that it ended with
                    start = args.num_steps if buffer.versions[slot] == iteration else 0
                    chunks = buffer.obs[slot, start:].flatten(0, 1).split(256)  # fits a CPU's cache
                    values = torch.cat([agent.get_value(chunk) for chunk in chunks])
                    buffer.values[slot, start:] = values.view(-1, args.num_envs)
                rewards, values = agent.scale_rewards(buffer.rewards[slots, :-1]), buffer.values[slots]
                terminated, dones = buffer.terminated[slots, :-1], buffer.dones[slots, :-1]
                gae = compute_gae(rewards, values, terminated, dones, args.gamma, args.gae_lambda)
                buffer.advantages[slots, :-1], buffer.returns[slots, :-1] = gae

        # Update
        fields = (buffer.obs, buffer.actions, buffer.logprobs, buffer.advantages, buffer.returns)
        batch = [rollouts.flatten(0, 2) for rollouts in fields]
        logged = []
        for _ in range(args.update_epochs):
            b_inds = buffer.sample(args.batch_size)
            for mb_inds in b_inds.split(args.minibatch_size):
                loss, *parts = loss_of(agent, *(rows[mb_inds] for rows in batch), args)
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                _, logratio, _ = parts
                weight = torch.exp(-0.5 * (logratio / args.sigma) ** 2).mean().item()
                optimizer.param_groups[1]["lr"] = optimizer.param_groups[0]["lr"] * weight
                optimizer.step()

                logged.append([*parts, grad_norm])

        # Statistics change only now: the policy that acted on them must still be the one that the update starts from
        if not frozen:
            newest = (buffer.obs, buffer.rewards, buffer.dones, buffer.valid)
            agent.update_statistics(*(rollouts[buffer.slot, :-1] for rollouts in newest))

        # Logging
        losses, logratios, coefs, grad_norms = zip(*logged, strict=True)
        scalars = diagnostics(torch.cat(logratios), torch.cat(coefs))
        tags = ("losses/policy_loss", "losses/value_loss", "losses/entropy")
        scalars |= zip(tags, torch.stack(losses).mean(0), strict=True)
        scalars["losses/grad_norm"] = torch.stack(grad_norms).mean()
        y_pred, y_true = buffer.values.flatten()[b_inds], buffer.returns.flatten()[b_inds]
        scalars["losses/explained_variance"] = 1 - (y_true - y_pred).var() / y_true.var().clamp(min=1e-8)
        scalars = dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))  # one device sync
        scalars |= {f"charts/{name}": np.mean(values) for name, values in episodes.items()}
        ages = iteration - buffer.versions[buffer.versions >= 0]
        scalars |= {"offpolicy/age_mean": ages.float().mean().item(), "offpolicy/age_max": ages.max().item()}
        scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        scalars["charts/SPS"] = int((global_step - start_step) / (time.time() - start_time))
        progress.update(args.batch_size)
        if episodes:
            progress.set_postfix({"return": f"{scalars['charts/episodic_return']:.1f}"})
        with one_sentence(1, f"the run stops, {folder} keeps its last checkpoint: "):
            require(all(map(math.isfinite, scalars.values())), f"loss or gradient not finite in iteration {iteration}")
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, global_step)
            interval = args.checkpoint_interval or num_iterations
            if stops or iteration + 1 == num_iterations or (iteration + 1) % interval == 0:
                writer.flush()  # before the checkpoint, which must not be ahead of the log
                require(all(w.isfinite().all() for w in agent.state_dict().values()), "weight or statistic not finite")
                save_checkpoint(folder / CHECKPOINT, iteration + 1, args, agent, optimizer, buffer, snapshots)
        if stops:
            break

    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    progress.close()
    envs.close()
    if stops:
        writer.close()
        print(f"stopped after step {global_step}; go on with --resume {folder}")
        sys.exit(128 + stops[0])
    if args.eval_episodes and global_step > start_step:
        for tag, value in evaluate(make_envs, agent, args, device, folder / f"{global_step}.mp4").items():
            writer.add_scalar(tag, value, global_step)
    writer.close()
