"""PPO and its relatives on Atari, continuous control and MiniGrid vision: what GIPO is compared with.

    loss = -mean(min(r * A, clip(r, 1 - eps, 1 + eps) * A)),  r = pi(a|s) / mu(a|s)

mu is the policy that collected the sample; --surrogate picks another loss in the place of the clip.

    python ppo_baseline.py atari
    python ppo_baseline.py continuous --buffer-epochs 8           # learn from the last 8 rollouts
    python ppo_baseline.py minigrid --surrogate tis
    tensorboard --logdir runs

`diff ppo_baseline.py gipo_atari.py` shows the loss, and the two domains that this baseline serves besides.
From `__main__` down all four scripts are identical.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py>=0.12,<0.13",
#     "gymnasium>=1.4,<2",
#     "metaworld>=3.1.1,<4",
#     "minigrid>=3.2,<4",
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

import contextlib
import copy
import difflib
import importlib
import math
import random
import re
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime
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


class BadInput(ValueError):
    """A mistake in the command line: one sentence that names the flag and the fix, shown without a traceback."""


def require(condition: bool, message: str):
    """Raise `BadInput(message)` unless the condition holds (NaN compares false, so it never passes a range)."""
    if not condition:
        raise BadInput(message)


@dataclass(kw_only=True)
class Args:
    """The flags that every domain has; those without a default here get one in the domain's own subclass below."""

    env_id: str
    """environment id, or module:id for one that an importable module of yours registers"""
    total_timesteps: int
    """environment steps in all, summed over the parallel environments (1e5 to 1e7)"""
    seed: int = 1
    """seed of python, numpy, torch and the environments"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where network and replay buffer live; auto takes CUDA if there is one"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the name of the run's folder"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "gipo"
    """Weights and Biases project"""
    wandb_entity: str | None = None
    """Weights and Biases team; none is your default one"""
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    """offline writes to ./wandb for a later `wandb sync`"""

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

    surrogate: Literal["clip", "dual-clip", "none", "sapo", "tis", "spo"] = "clip"
    """policy loss; none is plain importance sampling"""
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
        check("num-envs", self.num_envs >= 1, "1 or more")
        check("num-steps", self.num_steps >= 2, "2 or more, for a single row can be all resets")
        check("total-timesteps", self.total_timesteps >= self.batch_size, f"at least {rollout}")
        check("learning-rate", 0 < self.learning_rate <= 1, "a number above 0, 1 at most")
        check("gamma", 0 <= self.gamma <= 1, "a number from 0 to 1")
        check("gae-lambda", 0 <= self.gae_lambda <= 1, "a number from 0 to 1")
        check("update-epochs", self.update_epochs >= 1, "1 or more")
        divides = self.num_minibatches >= 1 and self.batch_size % self.num_minibatches == 0
        check("num-minibatches", divides and self.minibatch_size > 1, f"a divisor of {rollout}, 2 or more left each")
        check("ent-coef", 0 <= self.ent_coef < math.inf, "a number of 0 or more")
        check("vf-coef", 0 <= self.vf_coef < math.inf, "a number of 0 or more")
        check("max-grad-norm", 0 < self.max_grad_norm < math.inf, "a number above 0")
        check("buffer-epochs", self.buffer_epochs >= 1, "1 or more")
        check("policy-lag", self.policy_lag >= 0, "0 or more")
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


# ------------------------------------------------------- Atari --------------------------------------------------------
gym.register_envs(ale_py)


@dataclass(kw_only=True)
class AtariArgs(Args):
    """Arcade Learning Environment: 84 x 84 grey pixels, full games, discrete actions."""

    env_id: str = "ALE/Breakout-v5"
    total_timesteps: int = 10_000_000
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


def make_atari_envs(args: AtariArgs) -> gym.vector.VectorEnv:
    """Vector of games with observations (4, 84, 84) uint8; `BadInput` if the id or its spaces do not fit."""
    spec = load_spec(args.env_id)
    if spec.namespace == "ALE":
        envs = gym.make_vec(
            spec,
            num_envs=args.num_envs,
            repeat_action_probability=args.sticky_actions,
            full_action_space=False,
            max_num_frames_per_episode=108_000,
            autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
            img_height=84,
            img_width=84,
            grayscale=True,
            stack_num=4,
            frameskip=4,
            maxpool=True,
            noop_max=30,
            use_fire_reset=True,
            reward_clipping=False,  # the agent clips, so that logged returns stay true scores
            episodic_life=False,  # would restart the whole game at every lost life
            life_loss_info=False,  # would make the recorder below drop a step at every lost life
        )
        if args.life_loss_terminates:
            envs = ReportLifeLoss(envs)
    else:
        envs = gym.make_vec(spec, num_envs=args.num_envs, vectorization_mode="sync")
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    require(
        obs_space.shape == (4, 84, 84) and obs_space.dtype == np.uint8,
        f"observations must be (4, 84, 84) uint8, not {obs_space}; try ALE/Breakout-v5.",
    )
    require(
        isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0,
        f"actions must be discrete and count from 0, not {action_space}; try ALE/Breakout-v5.",
    )
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


class AtariAgent(nn.Module):
    """Nature CNN (Mnih et al. 2015) shared by policy and value; observations (B, 4, 84, 84) uint8."""

    def __init__(self, envs: gym.vector.VectorEnv, args: AtariArgs):
        super().__init__()
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
        return self.network(obs.contiguous(memory_format=torch.channels_last).float() / 255.0)

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
    num_envs: int = 8
    num_steps: int = 256
    learning_rate: float = 3e-4
    update_epochs: int = 10
    num_minibatches: int = 8
    ent_coef: float = 0.0


def make_continuous_envs(args: ContinuousArgs) -> gym.vector.VectorEnv:
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
    envs = gym.vector.SyncVectorEnv([partial(gym.make, disable_env_checker=True, **kw) for kw in kwargs])
    if not args.env_id.startswith("Meta-World/"):
        envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    require(
        isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1,
        f"observations must be a flat Box, not {obs_space}; try HalfCheetah-v5.",
    )
    require(
        isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1,
        f"actions must be a flat Box, not {action_space}; try HalfCheetah-v5.",
    )
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
        self.register_buffer("discounted_return", torch.zeros(args.num_envs))
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
VOCABULARY = """
    a after and at avoid ball behind blue box door end fetch find from front get go goal green grey hallway in
    key lava left matching maze must near next object of on open opening pick purple put reach red right room
    rooms square the then to traverse unlock up use yellow you your
""".split()
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
    num_envs: int = 16
    num_steps: int = 64
    learning_rate: float = 1e-3
    update_epochs: int = 4
    num_minibatches: int = 4
    ent_coef: float = 0.03


@cache
def render_tile(kind: int, color: int, state: int, agent_here: bool) -> np.ndarray:
    """Pixels (8, 8, 3) of one cell of the agent's view; drawing is slow, so each kind of tile is drawn once."""
    visible = kind != OBJECT_TO_IDX["unseen"]
    return Grid.render_tile(
        WorldObj.decode(kind, color, state), agent_dir=3 if agent_here else None, highlight=visible, tile_size=TILE
    )


class PixelsAndWords(gym.Wrapper):
    """Packs the agent's view and the mission into one uint8 vector: pixels (56, 56, 3), then 40 word ids."""

    def __init__(self, env: gym.Env, env_id: str):
        super().__init__(env)
        names = [name for name in ACTIONS if env_id.startswith(name)]
        self.actions = ACTIONS[names[0]] if names else tuple(Actions)
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


def make_minigrid_envs(args: MinigridArgs) -> gym.vector.VectorEnv:
    """Vector of grid worlds with observations (9448,) uint8; `BadInput` if the id does not fit."""
    spec = load_spec(args.env_id)

    def make_env():
        env = gym.make(spec, disable_env_checker=True)
        space = env.observation_space
        require(
            isinstance(space, gym.spaces.Dict)
            and {"image", "mission"} <= space.keys()
            and space["image"].shape == (7, 7, 3),
            f"observations must be MiniGrid's 7 x 7 view and mission, not {space}; try MiniGrid-Fetch-5x5-N2-v0.",
        )
        return PixelsAndWords(env, spec.id)

    envs = gym.vector.SyncVectorEnv([make_env] * args.num_envs)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


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
class ReplayBuffer:
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
        self.obs = torch.zeros(shape + obs_space.shape, dtype=obs_dtype, device=device)
        self.actions = torch.zeros(shape + action_space.shape, dtype=action_dtype, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.rewards = torch.zeros(shape, device=device)
        self.terminated = torch.zeros(shape, dtype=torch.bool, device=device)
        self.dones = torch.zeros(shape, dtype=torch.bool, device=device)
        self.valid = torch.zeros(shape, dtype=torch.bool, device=device)
        self.values = torch.zeros(shape, device=device)
        self.advantages = torch.zeros(shape, device=device)
        self.returns = torch.zeros(shape, device=device)
        self.versions = deque(maxlen=args.buffer_epochs)  # iteration of the policy that acted, by rollout
        self.slot = -1  # index of the newest rollout

    def start(self, obs, version: int):
        """Overwrite the oldest rollout by a new one, which begins with `obs` and is acted by policy `version`."""
        self.slot = (self.slot + 1) % len(self.obs)
        self.versions.append(version)
        self.obs[self.slot, 0] = obs

    def store(self, step: int, next_obs, **transition):
        """Write row `step` of the newest rollout, and the observation that follows it."""
        for name, value in transition.items():
            getattr(self, name)[self.slot, step] = value
        self.obs[self.slot, step + 1] = next_obs

    def sample(self, n: int) -> torch.Tensor:
        """n flat indices of valid transitions, uniform, without replacement until all were drawn once."""
        valid = self.valid.flatten().nonzero().squeeze(1)
        rounds = math.ceil(n / len(valid))
        return torch.cat([valid[torch.randperm(len(valid), device=valid.device)] for _ in range(rounds)])[:n]


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


def diagnostics(logratio, coef) -> dict[str, torch.Tensor]:
    """How far the policy is from the one that collected a minibatch, and how much of it still teaches; all scalars."""
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


# ---------------------------------------------------- Command line ----------------------------------------------------
DOMAINS = {
    AtariArgs: (make_atari_envs, AtariAgent),
    ContinuousArgs: (make_continuous_envs, ContinuousAgent),
    MinigridArgs: (make_minigrid_envs, MinigridAgent),
}


def parse_args() -> Args:
    """Read the command line; a mistake prints one sentence and exits with 2."""
    return tyro.extras.overridable_config_cli(
        {
            "atari": ("Arcade Learning Environment from pixels.", AtariArgs(clip_coef=0.1)),
            "continuous": ("MuJoCo and Meta-World.", ContinuousArgs()),
            "minigrid": ("MiniGrid and BabyAI from pixels and words.", MinigridArgs()),
        },
        description=__doc__,
    )


if __name__ == "__main__":
    args = parse_args()
    make_envs, Agent = DOMAINS[type(args)]
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # one seed, one result on a GPU too
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    try:
        envs = make_envs(args)
        envs.reset(seed=args.seed)
    except (BadInput, gym.error.Error, ImportError) as error:
        print(f"error: --env-id {args.env_id}: {error}", file=sys.stderr)
        sys.exit(2)

    # down to the microsecond, for runs that start together must not share a folder
    run_name = f"{re.sub('[/:]', '-', args.env_id)}__{args.exp_name}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    if args.track:
        try:
            import wandb

            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                mode=args.wandb_mode,
                sync_tensorboard=True,
                config=vars(args),
                name=run_name,
            )
        except Exception as error:  # tracking must not cost a run
            print(f"warning: the run goes on without Weights and Biases: {error}", file=sys.stderr)
    writer = SummaryWriter(f"runs/{run_name}")
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    agent = Agent(envs, args).to(device)
    actor = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    buffer = ReplayBuffer(envs, args, device)
    snapshots = deque(maxlen=args.policy_lag + 1)

    def to_device(array, dtype=torch.float32):
        return torch.as_tensor(array, dtype=dtype, device=device)

    # Statistics start from a few random steps, which are neither counted nor learned from
    envs.action_space.seed(args.seed)
    next_valid = np.ones(args.num_envs, dtype=bool)
    for step in range(RANDOM_STEPS):
        next_obs, reward, terminations, truncations, _ = envs.step(envs.action_space.sample())
        done = terminations | truncations | (step == RANDOM_STEPS - 1)  # the run itself starts with a reset
        agent.update_statistics(
            to_device(next_obs).unsqueeze(0),
            to_device(reward).unsqueeze(0),
            to_device(done, torch.bool).unsqueeze(0),
            to_device(next_valid, torch.bool).unsqueeze(0),
        )
        next_valid = ~done

    global_step = 0
    start_time = time.time()
    next_obs = to_device(envs.reset(seed=args.seed)[0], buffer.obs.dtype)
    next_valid = np.ones(args.num_envs, dtype=bool)
    success = np.zeros(args.num_envs, dtype=bool)
    num_iterations = args.total_timesteps // args.batch_size
    progress = tqdm(total=num_iterations * args.batch_size, unit="step", unit_scale=True)

    for iteration in range(num_iterations):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        snapshots.append((iteration, copy.deepcopy(agent.state_dict())))
        version, weights = snapshots[0]
        actor.load_state_dict(weights)
        frozen = args.freeze_buffer_at is not None and global_step >= args.freeze_buffer_at

        # Rollout
        episodes = {"charts/episodic_return": [], "charts/episodic_length": [], "charts/success_rate": []}
        if not frozen:
            buffer.start(next_obs, version)
        for step in range(args.num_steps):
            with torch.no_grad():
                action, logprob, _, _ = actor.get_action_and_value(next_obs)
            next_obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())
            next_obs = to_device(next_obs, buffer.obs.dtype)
            valid, next_valid = next_valid, ~(terminations | truncations)
            if not frozen:
                # a lost life ends the return like a death, but the game goes on: no autoreset follows
                terminated = terminations | infos.get("life_lost", False)
                buffer.store(
                    step,
                    next_obs,
                    actions=action,
                    logprobs=logprob,
                    rewards=to_device(reward),
                    terminated=to_device(terminated, torch.bool),
                    dones=to_device(terminated | truncations, torch.bool),
                    valid=to_device(valid, torch.bool),
                )
            success |= infos.get("success", success) > 0
            if "episode" in infos:
                finished = infos["_episode"]
                episodes["charts/episodic_return"].extend(infos["episode"]["r"][finished])
                episodes["charts/episodic_length"].extend(infos["episode"]["l"][finished])
                if "success" in infos:
                    episodes["charts/success_rate"].extend(success[finished])
                success[finished] = False
        global_step += args.batch_size

        # Advantages
        recompute = args.advantage_source == "recompute"
        if recompute or not frozen:
            slots = list(range(len(buffer.versions))) if recompute else [buffer.slot]
            with torch.no_grad():
                for slot in slots:
                    chunks = buffer.obs[slot].flatten(0, 1).split(args.minibatch_size)
                    values = torch.cat([agent.get_value(chunk) for chunk in chunks])
                    buffer.values[slot] = values.view(args.num_steps + 1, args.num_envs)
                buffer.advantages[slots, :-1], buffer.returns[slots, :-1] = compute_gae(
                    agent.scale_rewards(buffer.rewards[slots, :-1]),
                    buffer.values[slots],
                    buffer.terminated[slots, :-1],
                    buffer.dones[slots, :-1],
                    args.gamma,
                    args.gae_lambda,
                )

        # Update
        b_obs = buffer.obs.flatten(0, 2)
        b_actions = buffer.actions.flatten(0, 2)
        b_logprobs = buffer.logprobs.flatten()
        b_advantages = buffer.advantages.flatten()
        b_returns = buffer.returns.flatten()
        b_values = buffer.values.flatten()
        metrics = []
        for _ in range(args.update_epochs):
            b_inds = buffer.sample(args.batch_size)
            for mb_inds in b_inds.split(args.minibatch_size):
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
                logratio = newlogprob - b_logprobs[mb_inds]
                mb_advantages = b_advantages[mb_inds]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)

                # Policy loss
                pg_loss, coef = policy_loss(logratio, mb_advantages, args)

                # Value loss
                v_loss = 0.5 * ((newvalue - b_returns[mb_inds]) ** 2).mean()

                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

                with torch.no_grad():
                    losses = diagnostics(logratio, coef)
                    losses["losses/policy_loss"] = pg_loss
                    losses["losses/value_loss"] = v_loss
                    losses["losses/entropy"] = entropy_loss
                    metrics.append(torch.stack(list(losses.values())))

        # Statistics change only now: the policy that acted on them must still be the one that the update starts from
        if not frozen:
            agent.update_statistics(
                buffer.obs[buffer.slot, :-1],
                buffer.rewards[buffer.slot, :-1],
                buffer.dones[buffer.slot, :-1],
                buffer.valid[buffer.slot, :-1],
            )

        # Logging
        y_pred, y_true = b_values[b_inds], b_returns[b_inds]
        explained_var = 1 - (y_true - y_pred).var() / y_true.var().clamp(min=1e-8)
        means = torch.cat([torch.stack(metrics).mean(0), explained_var.unsqueeze(0)])
        scalars = dict(zip([*losses, "losses/explained_variance"], means.tolist(), strict=True))
        scalars |= {tag: np.mean(values) for tag, values in episodes.items() if values}
        ages = [iteration - version for version in buffer.versions]
        scalars["offpolicy/age_mean"] = np.mean(ages)
        scalars["offpolicy/age_max"] = np.max(ages)
        scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        scalars["charts/SPS"] = int(global_step / (time.time() - start_time))
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, global_step)
        progress.update(args.batch_size)
        if episodes["charts/episodic_return"]:
            progress.set_postfix({"return": f"{scalars['charts/episodic_return']:.1f}"})

    progress.close()
    envs.close()
    writer.close()
