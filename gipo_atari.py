"""GIPO on Atari: PPO with a Gaussian weight instead of its clip, so that old data still teaches.

    loss = -mean(w * r * A) + kl_coef * KL,  r = pi(a|s) / mu(a|s),  w = exp(-(log r)^2 / (2 sigma^2))

mu is the behaviour policy, which collected the sample; A is the sample's advantage. No gradient flows through w. The
KL term pulls pi back to the policy that the iteration starts from, or with --kl-to behaviour to mu. (Lu et al. 2026,
arXiv:2603.03955)

    python gipo_atari.py --buffer-epochs 8      # learn from 8 rollouts; --help has usual ranges
    python gipo_atari.py --resume runs/RUN      # continue a run; or --evaluate runs/RUN --capture-video
    tensorboard --logdir runs

`diff ppo_baseline.py gipo_continuous.py | head -40` shows the method, as do the diffs with gipo_atari.py and
gipo_minigrid_vision.py. Shared code is identical in all four.
"""

import contextlib
import copy
import itertools
import math
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: busy waiting makes two runs at once stand still

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# -------------------------------------------------------- Loss --------------------------------------------------------
def policy_loss(logratio, advantages, args):
    """GIPO: the importance ratio times a detached Gaussian of its logarithm (Lu et al. 2026).

    logratio = log pi(a|s) - log mu(a|s) is (B, D), with a column for each part of an action that has a ratio of its
    own: the whole action (D = 1), or each of its dimensions. advantages are (B, 1). Returns a scalar.
    """
    z = (logratio / args.sigma).detach()
    return -(torch.exp(logratio - 0.5 * z**2) * advantages).sum(1).mean()  # w * r as one exp, which cannot overflow


def update(agent, optimizer, obs, actions, logprobs, start_logprobs, advantages, returns, args):
    """One gradient step on a minibatch (B, ...). Returns scalars to log, log-ratios (B, D) and advantages (B, 1)."""
    _, newlogprob, entropy, newvalue = agent.get_action_and_value(obs, actions)
    logratio = newlogprob - logprobs
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    advantages = advantages.unsqueeze(1)

    # Policy loss
    pg_loss = policy_loss(logratio, advantages, args)

    # KL term: an estimate of KL(mu || pi), or to second order the KL to the policy that the iteration starts from
    kl_behaviour = -logratio.sum(1).mean()
    kl_step = 0.5 * ((newlogprob - start_logprobs) ** 2).sum(1).mean()
    kl = kl_behaviour if args.kl_to == "behaviour" else kl_step

    # Value loss
    v_loss = 0.5 * ((newvalue - returns) ** 2).mean()

    entropy_loss = entropy.mean()
    loss = pg_loss + args.kl_coef * kl - args.ent_coef * entropy_loss + args.vf_coef * v_loss

    # detached before the step: a compiled step then takes 0.42 ms instead of 0.78 (torch 2.13)
    scalars = {
        "losses/policy_loss": pg_loss.detach(),
        "losses/value_loss": v_loss.detach(),
        "losses/entropy": entropy_loss.detach(),
        "losses/kl": kl_behaviour.detach(),
        "losses/kl_step": kl_step.detach(),
    }
    logratio = logratio.detach()

    loss.backward()
    scalars["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()  # last, because before backward() it makes torch.compile lose the gradients
    return scalars, logratio, advantages


def diagnostics(logratio, advantages, args):
    """Scalars: how far pi is from the behaviour policies, and how many samples still have a gradient.

    logratio is (B, D) and advantages (B, 1). The gradient of the policy loss is -c A grad log pi / B for each ratio;
    autograd finds the coefficient c of any loss that is proportional to |A| and summed as policy_loss is.
    """
    sign = torch.where(advantages > 0, 1.0, -1.0)
    x = logratio.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(policy_loss(x, sign, args), x)
    coef = (-sign * gradient * len(sign)).flatten()
    joint = logratio.sum(1)
    absolute = logratio.abs().flatten()
    relative = coef.abs() / coef.abs().max().clamp(min=1e-38)  # because squares could underflow
    return {
        # at most exp(20), because float32 ends at exp(88) and a mean of such numbers says nothing
        "losses/approx_kl": (joint.clamp(max=20).exp() - 1 - joint).mean(),
        # 0.2 in each script, whatever its loss clips, so that curves compare
        "losses/clipfrac": ((logratio.exp() - 1).abs() > 0.2).float().mean(),
        # kthvalue, because torch.quantile takes 2**24 samples at most
        "offpolicy/abs_logratio_p95": absolute.kthvalue(math.ceil(0.95 * len(absolute))).values,
        # effective sample size (Kish 1965), as a share
        "offpolicy/ess": relative.sum() ** 2 / (len(relative) * (relative**2).sum()).clamp(min=1e-38),
        "offpolicy/dead_fraction": (coef.abs() < 1e-3).float().mean(),
        "offpolicy/coef_mean": coef.mean(),
    }


# ------------------------------------------------------- Flags --------------------------------------------------------
@dataclass
class Args:
    # each domain's class, further down, has some defaults of its own
    num_threads: ClassVar[int] = 1  # of torch; small networks are slower with more

    env_id: str = ""
    """environment id; write module:id if a module of yours registers it"""
    total_timesteps: int = 1_000_000
    """environment steps in total, over all environments; rounded down to whole rollouts (100000 to 10000000)"""
    seed: int = 1
    """seed of torch, numpy, Python's random and the environments"""
    exp_name: str = Path(__file__).stem
    """name of the experiment; the name of the run's folder contains it"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """device of the network and the replay buffer: cpu, cuda, cuda:1 or mps (mps not in continuous control)"""
    compile: bool = False
    """compile the gradient step with torch.compile: a slower start, then faster updates of small networks"""
    track: bool = False
    """also log to Weights and Biases; its environment variables apply (WANDB_PROJECT, WANDB_MODE, ...)"""

    checkpoint_interval: int = 50
    """iterations between checkpoints; each checkpoint replaces the last one (10 to 500)"""
    resume: Path | None = None
    """continue the run in this folder. Its flags apply, except those given now. The environments start new episodes.
    Environment, rollout, buffer, --policy-lag and --ratio must stay.
    With a larger --total-timesteps, an annealed learning rate jumps up to that of the longer run"""
    evaluate: Path | None = None
    """play --eval-episodes episodes with the agent of the run in this folder, without training"""
    eval_episodes: int = 10
    """full episodes to play with the trained agent, on seeds that training does not use; 0 plays none (10 to 100)"""
    deterministic: bool = False
    """evaluate with the policy's most likely actions instead of samples"""
    capture_video: bool = False
    """evaluate on a single episode and record it as an mp4 in the run's folder"""

    num_envs: int = 8
    """number N of parallel environments (4 to 64)"""
    num_steps: int = 128
    """steps T of each environment in a rollout; an iteration collects T x N transitions (64 to 2048)"""
    learning_rate: float = 2.5e-4
    """Adam's step size (1e-4 to 1e-3)"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over the run"""
    gamma: float = 0.99
    """discount factor (0.9 to 0.999)"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation (0.9 to 1)"""
    update_epochs: int = 4
    """update epochs per iteration; each draws --num-minibatches minibatches from the whole buffer (1 to 10)"""
    num_minibatches: int = 4
    """minibatches per update epoch, one gradient step each (1 to 32)"""
    minibatch_size: int | None = None
    """transitions per minibatch; None splits one rollout evenly, T x N / --num-minibatches (64 to 4096)"""
    norm_adv: bool = True
    """normalize the advantages of each minibatch to mean 0 and standard deviation 1"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (0 to 0.03)"""
    vf_coef: float = 0.5
    """weight of the value loss (0.25 to 1)"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient; a longer gradient is scaled down to this norm (0.5 to 10)"""

    buffer_epochs: int = 1
    """rollouts K in the replay buffer; 1 is PPO's on-policy storage, larger values reuse older data (1 to 64)"""
    policy_lag: int = 0
    """act with the policy from L iterations ago (0 to 16)"""
    freeze_buffer_at: int | None = None
    """stop filling the buffer at this environment step; None never stops"""
    advantage_source: Literal["vtrace", "recompute", "stored"] = "vtrace"
    """stored: keep the advantages from collection
    recompute: recompute them in each iteration with the current critic
    vtrace: recompute them, and correct them for the drift of the policy since collection"""

    sigma: float = 0.5
    """width of the Gaussian weight on the log-ratio; a smaller width trusts old data less (0.2 to 2)"""
    kl_coef: float = 0.1
    """weight of the KL term (0 to 0.3)"""
    kl_to: Literal["behaviour", "current"] = "current"
    """the policy that the KL term pulls back to
    behaviour: the policy mu that collected the sample; needs a smaller weight the older the data is
    current: the policy that the iteration starts from"""


# numbers that may be 0; all others must be larger
MAY_BE_ZERO = ("seed", "eval_episodes", "gamma", "gae_lambda", "ent_coef", "vf_coef", "kl_coef", "policy_lag")
MAY_BE_ZERO += ("sticky_actions",)  # of Atari


class InputError(ValueError):
    """A mistake in the flags or in what they name. The command line prints it as one sentence and exits with 2."""


def require(condition, message):
    if not condition:
        raise InputError(message)


def refuse(envs, message):
    """Close environments that no agent here can play, and say why."""
    envs.close()
    raise InputError(message)


def place(error):
    """Where an error comes from, if that is no library: the innermost file and line."""
    libraries = (sys.prefix, sys.base_prefix, "<", __file__)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""


@contextlib.contextmanager
def input_error(what):
    """Turn any error into an InputError, because each library has its own exceptions."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300] or "it failed"
        raise InputError(f"{what}: {text} ({type(error).__name__}{place(error)}).") from error


def check_flags(args):
    """Raises InputError if a number is too small, or if a rollout does not divide into minibatches."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            rule = "give 0 or more" if name in MAY_BE_ZERO else "give a number above 0"
            fits = value > 0 or (value == 0 and name in MAY_BE_ZERO)
            require(fits, f"--{name.replace('_', '-')} {value}: {rule}.")
    for name in ("gamma", "gae_lambda"):
        value = vars(args)[name]
        require(value <= 1, f"--{name.replace('_', '-')} {value}: give at most 1.")
    require(args.num_steps > 1, "--num-steps 1: give 2 or more.")  # a step after an episode's end is no transition
    rollout = args.num_steps * args.num_envs
    divides = rollout % args.num_minibatches == 0 and rollout > args.num_minibatches
    message = f"--num-minibatches {args.num_minibatches}: give a proper divisor of {rollout}, a rollout's size."
    require(args.minibatch_size or divides, message)
    require(args.minibatch_size != 1, "--minibatch-size 1: give 2 or more.")
    require(not (args.resume and args.evaluate), "--resume and --evaluate: give one of them.")
    require(args.eval_episodes or not args.evaluate, "--eval-episodes 0: give 1 or more.")


# --------------------------------------------- Replay buffer, advantages ----------------------------------------------
class ReplayBuffer:
    """The last K rollouts of T x N transitions; K = 1 is PPO's storage.

    Fields are (K, T + 1, N, ...). The next observation of row t is in row t + 1, so row T holds only an observation.
    `valid` is false in row T and in the row after the end of an episode. The latter is not a transition, because
    gymnasium ignores its action and resets (NEXT_STEP autoreset).
    """

    def __init__(self, args, obs, action, logprob):
        """Allocates the fields; obs (N, ...), action (N, ...) and logprob (N, D) are examples."""

        def field(*shape, dtype=torch.float32):
            rows = args.buffer_epochs, args.num_steps + 1, args.num_envs
            return torch.zeros(*rows, *shape, dtype=dtype, device=obs.device)

        self.obs = field(*obs.shape[1:], dtype=obs.dtype)
        self.actions = field(*action.shape[1:], dtype=action.dtype)
        self.logprobs = field(*logprob.shape[1:])  # of the behaviour policy mu
        self.start_logprobs = field(*logprob.shape[1:])  # of the policy that the iteration starts from
        self.rewards = field()
        self.values = field()
        self.advantages = field()
        self.returns = field()
        self.terminated = field(dtype=torch.bool)
        self.dones = field(dtype=torch.bool)
        self.valid = field(dtype=torch.bool)
        self.versions = torch.full((args.buffer_epochs,), -1)  # iterations of mu, -1 if empty; on the CPU

    def write(self, slot, step, **rows):
        """Set this step of a rollout; rows are tensors or arrays (N, ...) by the name of the field."""
        for name, row in rows.items():
            getattr(self, name)[slot, step] = torch.as_tensor(row)

    def sample(self, n):
        """n flat indices of valid transitions, drawn uniformly; none comes twice before all have come once."""
        valid = self.valid.flatten().nonzero().squeeze(1)
        rounds = math.ceil(n / len(valid))
        order = torch.cat([torch.randperm(len(valid), device=valid.device) for _ in range(rounds)])
        return valid[order[:n]]


def compute_gae(rewards, values, ratios, terminated, dones, gamma, gae_lambda):
    """Advantages (Schulman et al. 2016) and value targets, (..., T, N), corrected by V-trace (Espeholt et al. 2018).

        A[t] = delta[t] + gamma * gae_lambda * ratio[t + 1] * A[t + 1],    target[t] = V[t] + ratio[t] * A[t]

    The policy loss brings the ratio of step t itself. Ratios of 1 give plain GAE. A terminated step does not bootstrap.
    A truncated step also ends the sum, but it bootstraps from the next row, which holds the final observation.
    rewards, terminated and dones are (..., T, N); values and ratios = min(1, pi / mu) are (..., T + 1, N).
    """
    delta = rewards + gamma * values[..., 1:, :] * ~terminated - values[..., :-1, :]
    decay = gamma * gae_lambda * ~dones * ratios[..., 1:, :]
    advantages = torch.zeros_like(rewards)
    lastgaelam = 0.0
    for t in reversed(range(rewards.shape[-2])):
        lastgaelam = delta[..., t, :] + decay[..., t, :] * lastgaelam
        advantages[..., t, :] = lastgaelam
    return advantages, values[..., :-1, :] + ratios[..., :-1, :] * advantages


@torch.no_grad()
def refresh_advantages(buffer, slots, agent, args):
    """Recompute values and log-probabilities of the whole buffer, and the advantages where `slots`, (K,), is true."""
    count = int((buffer.versions >= 0).sum())  # slots are filled in order
    obs, actions = buffer.obs[:count].flatten(0, 2), buffer.actions[:count].flatten(0, 2)
    # in chunks, because the network needs gigabytes for all pixels at once
    chunks = zip(obs.split(1024), actions.split(1024))
    results = [agent.get_action_and_value(*chunk) for chunk in chunks]
    _, logprobs, _, values = map(torch.cat, zip(*results))
    buffer.start_logprobs[:count] = logprobs.view_as(buffer.start_logprobs[:count])
    buffer.values[:count] = values.view_as(buffer.values[:count])

    drift = (buffer.start_logprobs[slots] - buffer.logprobs[slots]).sum(-1)
    ratios = drift.clamp(max=0).exp() if args.advantage_source == "vtrace" else torch.ones_like(drift)
    rewards = agent.scale_rewards(buffer.rewards[slots, :-1])
    terminated, dones = buffer.terminated[slots, :-1], buffer.dones[slots, :-1]
    gae = compute_gae(rewards, buffer.values[slots], ratios, terminated, dones, args.gamma, args.gae_lambda)
    buffer.advantages[slots, :-1], buffer.returns[slots, :-1] = gae


# ----------------------------------------------- Environments, networks -----------------------------------------------
def set_threads(args):
    """Give torch the domain's number of threads, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(args.num_threads)


def seed_everything(seed, stream):
    """Seed all generators; returns the seed of the first environment.

    `stream` is the iteration that a run starts or resumes with, or 10**9 for the evaluation, and has its own seed.
    """
    # 30 bits, because seed + i must fit ALE's 31
    seed = int(np.random.SeedSequence([seed, stream]).generate_state(1)[0]) // 4
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    return seed


@contextlib.contextmanager
def start_envs(args, num_envs, seed, **render):
    """Environments with the seeds `seed`, `seed` + 1, ... and their first observations; closed at the end."""
    flag = "--capture-video" if render else "--env-id"
    with input_error(f"{flag} {args.env_id}"):
        envs = args.make_envs(args, num_envs, seed, **render)
    with contextlib.closing(envs):
        with input_error(f"{flag} {args.env_id}"):
            obs, _ = envs.reset(seed=seed)
            if render:
                picture(envs)
        yield envs, obs


def picture(envs):
    """What the first environment renders, (H, W, 3) uint8."""
    frame = envs.render()[0]
    if np.shape(frame)[2:] != (3,) or frame.dtype != np.uint8:
        raise ValueError("it renders no picture, (H, W, 3) uint8")
    return frame


def ended_episodes(infos, playing=True):
    """(return, length) of each episode that ended with this step, and its success if the environment reports one."""
    if "recorded" not in infos:  # not "episode", which Meta-World's own recorder writes
        return []
    columns = [infos["recorded"]["r"], infos["recorded"]["l"]]
    if "success" in infos:
        columns.append(infos["success"])
    ended = np.flatnonzero(infos["_recorded"] & playing)
    return [tuple(float(column[i]) for column in columns) for i in ended]


def episode_means(episodes, prefix):
    """Mean return and length over episodes, and success if any episode reports one, by tag."""
    names = ("episodic_return", "episodic_length", "success_rate")
    columns = itertools.zip_longest(*episodes, fillvalue=0.0)
    return {prefix + name: float(np.mean(column)) for name, column in zip(names, columns)}


def layer_init(layer, std=math.sqrt(2)):
    """Orthogonal weights of gain `std` (Saxe et al. 2014) and biases of 0."""
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.zeros_(layer.bias)
    return layer


# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium>=1.4,<2", "moviepy>=2.2,<3", "numpy>=2,<3", "tensorboard>=2.21", "torch>=2.13,<3",
#     "tqdm>=4.70", "tyro>=1.0,<2", "wandb>=0.31,<1",
#     "ale-py>=0.12,<0.13",
# ]
# ///


# ------------------------------------------------------- Atari --------------------------------------------------------
import ale_py
from torch.distributions.categorical import Categorical


class ReportLifeLoss(gym.vector.VectorWrapper):
    """Has the mask `life_lost`; only a decrease counts, because a new game brings the lives back."""

    lives = 0

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        self.life_lost = infos["lives"] < self.lives
        self.lives = infos["lives"]
        return obs, rewards, terminations, truncations, infos


class ColorTwin(gym.vector.VectorWrapper):
    """Steps a copy of the games in color alongside, because the emulator's own vector cannot render."""

    metadata = {"render_fps": 15}  # 60 frames a second, 4 a step  # noqa: RUF012

    def __init__(self, envs, twin):
        super().__init__(envs)
        self.twin = twin

    def reset(self, **kwargs):
        self.frames, _ = self.twin.reset(**kwargs)
        return self.env.reset(**kwargs)

    def step(self, actions):
        self.frames, *_ = self.twin.step(actions)
        return self.env.step(actions)

    def render(self):
        return self.frames[:, 0]


def make_atari_envs(args, num_envs, seed, **render):
    """Vector of games with observations (4, 84, 84) uint8."""
    require(0 <= args.sticky_actions <= 1, f"--sticky-actions {args.sticky_actions}: give a probability, 0 to 1.")
    gym.register_envs(ale_py)
    if "ALE/" in args.env_id:
        protocol = {"num_envs": num_envs, "repeat_action_probability": args.sticky_actions, "noop_max": 30}
        protocol |= {"use_fire_reset": True, "max_num_frames_per_episode": 108_000, "episodic_life": False}
        protocol["reward_clipping"] = False  # the agent clips, so that logged returns are true scores
        envs = gym.make_vec(args.env_id, img_height=84, img_width=84, grayscale=True, stack_num=4, **protocol)
        if render:
            color = {"img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1}
            envs = ColorTwin(envs, gym.make_vec(args.env_id, **color, **protocol))
    else:
        envs = gym.make_vec(args.env_id, num_envs, vectorization_mode="sync", **render)
    obs, action = envs.single_observation_space, envs.single_action_space
    frames = obs.shape == (4, 84, 84) and obs.dtype == np.uint8
    if not (frames and isinstance(action, gym.spaces.Discrete) and action.start == 0):
        message = "use (4, 84, 84) uint8 observations and actions that count from 0; try ALE/Pong-v5."
        refuse(envs, f"--env-id {args.env_id}: {message}")
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs, stats_key="recorded")
    return ReportLifeLoss(envs) if "ALE/" in args.env_id and args.life_loss_terminates else envs


class AtariAgent(nn.Module):
    """Nature CNN (Mnih et al. 2015) shared by policy and value; observations (B, 4, 84, 84) uint8."""

    def __init__(self, envs, args):
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

    def get_action_and_value(self, obs, action=None, deterministic=False):
        """Actions, their log-probabilities (B, 1), entropies (B,) and values (B,)."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            pixels = obs.to(torch.float32, memory_format=torch.channels_last).div_(255.0)
            hidden = self.network(pixels).float()
        probs = Categorical(logits=self.actor(hidden), validate_args=False)
        if action is None:
            action = probs.mode if deterministic else probs.sample()
        return action, probs.log_prob(action).unsqueeze(-1), probs.entropy(), self.critic(hidden).squeeze(-1)

    def scale_rewards(self, rewards):
        return rewards.clamp(-1, 1)

    def update_obs_stats(self, obs):
        """Pixels need no statistics."""

    def update_return_stats(self, rewards, dones, valid):
        """Clipped rewards need no statistics."""


@dataclass
class Atari(Args):
    """Arcade Learning Environment: 84 x 84 grey pixels, full games, discrete actions."""

    make_envs = staticmethod(make_atari_envs)
    Agent = AtariAgent
    num_threads = torch.get_num_threads()

    env_id: str = "ALE/Breakout-v5"
    total_timesteps: int = 10_000_000
    ent_coef: float = 0.01
    sticky_actions: float = 0.25
    """probability that the emulator repeats the last action; 0.25 is the v5 standard, 0 is CleanRL's protocol"""
    life_loss_terminates: bool = True
    """let a lost life end the return that is learned from; the game and its logged score continue"""
    bfloat16: bool = False
    """compute features in bfloat16; faster on GPUs and on CPUs with AMX or AVX512-BF16, far slower on other CPUs"""


# ------------------------------------------------------ Training ------------------------------------------------------
EVAL_STEPS = 30_000  # limit of an evaluation episode, because some never end; an ALE game has at most 27,000 steps
# flags of one command, not of a run
NOT_SAVED = ("resume", "evaluate", "eval_episodes", "deterministic", "capture_video")
# flags that give a checkpoint its shape
FIXED = ("env_id", "num_envs", "num_steps", "buffer_epochs", "policy_lag", "ratio")


def save_checkpoint(folder, iteration, args, agent, optimizer, buffer, actors):
    """Save everything except the environments. A rename puts the file in place, so that no crash leaves half of it."""
    checkpoint = {
        "args": {name: value for name, value in vars(args).items() if name not in NOT_SAVED},
        "iteration": iteration,
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "buffer": vars(buffer),
        "actors": [actor.state_dict() for actor in actors],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),
    }
    temporary = folder / "checkpoint.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            os.fsync(file.fileno())
        temporary.replace(folder / "checkpoint.pt")
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(f"{temporary} cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(folder, domain):
    """What save_checkpoint saved in a run's folder, on the CPU; `domain` is the class of its flags.

    Raises InputError if the checkpoint is missing, damaged, or of a run that has other flags.
    """
    path = Path(folder) / "checkpoint.pt"
    with input_error(f"{folder} has no checkpoint that this script can read"):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not notice flipped bits
        require(not damaged, f"{path} is damaged.")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["args"]
    own = vars(domain()).keys() - set(NOT_SAVED)
    require(saved.keys() == own, f"{folder} is a run of {saved.get('exp_name')}, which has other flags.")
    return checkpoint


def load_agent(folder, domain):
    """The agent of a run's folder, on the CPU and without gradients, and the run's flags.

    `domain` is the class of the flags, such as Continuous. Raises InputError as load_checkpoint does.
    """
    checkpoint = load_checkpoint(folder, domain)
    args = domain(**checkpoint["args"] | {"device": "cpu"})
    with start_envs(args, 1, args.seed) as (envs, _):
        agent = args.Agent(envs, args)
    agent.load_state_dict(checkpoint["agent"])
    return agent.requires_grad_(False), args


@torch.no_grad()
def evaluate(args, weights, video_path):
    """Play one full episode in each environment, on seeds that training does not use; print and return the means.

    `weights` is the agent's state_dict. Each environment plays one episode, because the first N to end would
    over-represent short ones.
    """
    set_threads(args)
    num_envs = 1 if args.capture_video else args.eval_episodes
    render = {"render_mode": "rgb_array"} if args.capture_video else {}
    playing = np.ones(num_envs, bool)
    episodes = []
    video = None
    with start_envs(args, num_envs, seed_everything(args.seed, 10**9), **render) as (envs, obs):
        agent = args.Agent(envs, args)
        with input_error(f"the agent does not fit --env-id {args.env_id} and --device {args.device}"):
            agent.to(args.device)
            agent.load_state_dict(weights)
        if args.capture_video:
            from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter  # slow to import

            height, width, _ = picture(envs).shape
            video = FFMPEG_VideoWriter(str(video_path), (width, height), envs.metadata.get("render_fps") or 30)
        for _ in range(EVAL_STEPS):
            if video:
                try:
                    video.write_frame(picture(envs))
                except Exception as error:  # the evaluation goes on
                    print(f"warning: the video ends early: {error}")
                    video.close()
                    video = None
            obs = torch.as_tensor(obs, device=args.device)
            action, _, _, _ = agent.get_action_and_value(obs, deterministic=args.deterministic)
            obs, _, terminations, truncations, infos = envs.step(action.cpu().numpy())
            episodes += ended_episodes(infos, playing)
            playing &= ~(terminations | truncations)
            if not playing.any():
                break
        if video:
            video.close()
    found = episode_means(episodes, "eval/")
    print(f"{len(episodes)} of {num_envs} episodes ended within {EVAL_STEPS} steps: {found}")
    return found


def name_run(args):
    """Environment, experiment, seed, flags that are not at their defaults, and the time, so that no two are equal."""
    elsewhere = {"env_id", "exp_name", "seed", *NOT_SAVED}
    changed = vars(args).items() - vars(type(args)()).items()
    flags = ",".join(f"{name}={value}" for name, value in sorted(changed) if name not in elsewhere)
    parts = args.env_id, args.exp_name, args.seed, flags[:100], time.time_ns()
    return re.sub(r"[^\w.,=-]", "-", "__".join(str(part) for part in parts if part != ""))


def train(args):
    """Train an agent. Returns it and the run's folder, which has the log and the checkpoint.

    Raises InputError for a mistake in the flags, FloatingPointError if a value is not finite, and OSError if the folder
    cannot be written. After Ctrl-C or SIGTERM the run is saved, and the program exits.
    """
    check_flags(args)
    checkpoint = load_checkpoint(args.resume, type(args)) if args.resume else None
    batch_size = args.num_steps * args.num_envs
    minibatch_size = args.minibatch_size or batch_size // args.num_minibatches
    num_iterations = args.total_timesteps // batch_size
    first_iteration = checkpoint["iteration"] if checkpoint else 0
    global_step = first_step = first_iteration * batch_size
    folder = args.resume or Path("runs", name_run(args))
    if checkpoint:
        for name in FIXED:
            saved = checkpoint["args"].get(name)
            message = f"--{name.replace('_', '-')}: {folder} has {saved}, and a resumed run cannot change it."
            require(vars(args).get(name) == saved, message)
    reason = f", because {folder} is finished" if checkpoint else ""
    message = f"--total-timesteps {args.total_timesteps}: give at least {first_step + batch_size}{reason}."
    require(first_iteration < num_iterations, message)

    set_threads(args)
    seed = seed_everything(args.seed, first_iteration)
    if args.capture_video:  # to fail now, not after the training
        with start_envs(args, 1, seed, render_mode="rgb_array"):
            pass
    with contextlib.ExitStack() as stack:
        envs, obs = stack.enter_context(start_envs(args, args.num_envs, seed))
        agent = args.Agent(envs, args)
        with input_error(f"--device {args.device}"):
            agent.to(args.device)
            next_obs = torch.as_tensor(obs, device=args.device)
        next_valid = np.ones(args.num_envs, bool)
        # the rate is a tensor, because --compile would bake in a number
        rate = torch.tensor(args.learning_rate)
        optimizer = torch.optim.Adam(agent.parameters(), rate, eps=1e-5, fused=not args.compile)
        action, logprob, _, _ = agent.get_action_and_value(next_obs)
        buffer = ReplayBuffer(args, next_obs, action, logprob)
        actors = deque(maxlen=args.policy_lag + 1)  # the policies of the last L + 1 iterations, the oldest first
        if checkpoint:
            agent.load_state_dict(checkpoint["agent"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            for name, field in vars(buffer).items():
                field.copy_(checkpoint["buffer"][name])
            for weights in checkpoint["actors"]:
                actors.append(copy.deepcopy(agent))
                actors[-1].load_state_dict(weights)
            torch.set_rng_state(checkpoint["rng"])
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"][: torch.cuda.device_count()])

        if args.track:
            with input_error("--track"):
                import wandb

                wandb.init(name=folder.name, sync_tensorboard=True, config=vars(args))
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder, first_iteration, args, agent, optimizer, buffer, actors)
        # steps after the checkpoint are logged again
        writer = stack.enter_context(SummaryWriter(folder, purge_step=first_step + 1))
        rows = [f"| {name} | {value} |" for name, value in vars(args).items()]
        writer.add_text("hyperparameters", "\n".join(["| flag | value |", "| --- | --- |", *rows]), first_step)
        gradient_step = update
        if args.compile:
            torch._dynamo.config.trace_autograd_ops = True  # backward() in the same graph
            gradient_step = torch.compile(update)
        stops = []

        def stop(signum, frame):
            signal.signal(signum, handlers[signum])  # before the line, whose reader may answer at once
            stops.append(signum)
            print("\nstops after this iteration; once more ends the program at once", flush=True)

        handlers = {}
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            for signum in (signal.SIGINT, signal.SIGTERM):
                handlers[signum] = signal.signal(signum, stop)
                stack.callback(signal.signal, signum, handlers[signum])
        print(f"{folder}: {'goes on' if checkpoint else 'starts'} after step {first_step}")
        start_time = time.time()
        progress = tqdm(range(first_iteration, num_iterations), initial=first_iteration, total=num_iterations)

        for iteration in progress:
            remaining = 1 - iteration / num_iterations if args.anneal_lr else 1.0
            lr = args.learning_rate * remaining
            optimizer.param_groups[0]["lr"].fill_(lr)
            actors.append(copy.deepcopy(agent))
            slot = iteration % args.buffer_epochs  # of the oldest rollout; a frozen buffer keeps it
            frozen = args.freeze_buffer_at is not None and global_step >= args.freeze_buffer_at
            episodes = []

            # Rollout
            for step in range(args.num_steps):
                obs, valid = next_obs, next_valid
                with torch.no_grad():
                    action, logprob, _, _ = actors[0].get_action_and_value(obs)
                next_obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())
                next_obs = torch.as_tensor(next_obs, device=args.device)
                next_valid = ~(terminations | truncations)
                episodes += ended_episodes(infos)
                if not frozen:
                    # in Atari a lost life ends the return, but the game continues, so no autoreset follows
                    terminated = terminations | getattr(envs, "life_lost", False)
                    buffer.write(slot, step, obs=obs, actions=action, logprobs=logprob, rewards=reward)
                    buffer.write(slot, step, terminated=terminated, dones=terminated | truncations, valid=valid)
            if not frozen:
                buffer.obs[slot, -1] = next_obs
                buffer.versions[slot] = iteration - (len(actors) - 1)  # in which the policy that acted was the newest
                # before the update: a critic that has learned unscaled rewards misleads the policy for long
                agent.update_return_stats(buffer.rewards[slot, :-1], buffer.dones[slot, :-1], buffer.valid[slot, :-1])
            global_step += batch_size

            # Advantages
            filled = buffer.versions >= 0
            newest = torch.zeros_like(filled)
            newest[slot] = not frozen
            refresh_advantages(buffer, newest if args.advantage_source == "stored" else filled, agent, args)

            # Update
            names = ("obs", "actions", "logprobs", "start_logprobs", "advantages", "returns")
            batch = [getattr(buffer, name).flatten(0, 2) for name in names]
            logged = []
            for _ in range(args.update_epochs):
                b_inds = buffer.sample(args.num_minibatches * minibatch_size)
                for mb_inds in b_inds.split(minibatch_size):
                    minibatch = [field[mb_inds] for field in batch]
                    logged.append(gradient_step(agent, optimizer, *minibatch, args))
            if not frozen:  # only now, because on fresh data log-ratios must start at 0
                agent.update_obs_stats(buffer.obs[slot, :-1])

            # Logging
            losses, logratios, advantages = zip(*logged)
            scalars = {tag: torch.stack([loss[tag] for loss in losses]).mean() for tag in losses[0]}
            scalars |= diagnostics(torch.cat(logratios), torch.cat(advantages), args)
            # of the last epoch's samples
            y_pred, y_true = buffer.values.flatten()[b_inds], buffer.returns.flatten()[b_inds]
            scalars["losses/explained_variance"] = 1 - (y_true - y_pred).var() / y_true.var().clamp(min=1e-8)
            ages = iteration - buffer.versions[filled].float()
            scalars |= {"offpolicy/age_mean": ages.mean(), "offpolicy/age_max": ages.max()}
            scalars |= episode_means(episodes, "charts/")
            seconds = time.time() - start_time
            scalars |= {"charts/learning_rate": lr, "charts/SPS": (global_step - first_step) / seconds}
            checked = {"observations": buffer.obs[slot], "rewards": buffer.rewards[slot]}
            checked |= scalars | agent.state_dict()
            broken = [name for name, value in checked.items() if not torch.as_tensor(value).isfinite().all()]
            if broken:
                sentence = f"{broken[:3]} not finite in iteration {iteration}; {folder} keeps its last checkpoint."
                raise FloatingPointError(sentence)
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, global_step)
            if episodes:
                progress.set_postfix(episodic_return=f"{scalars['charts/episodic_return']:.4g}")
            if stops or iteration + 1 == num_iterations or (iteration + 1) % args.checkpoint_interval == 0:
                writer.flush()  # before the checkpoint, which must not be ahead of the log
                save_checkpoint(folder, iteration + 1, args, agent, optimizer, buffer, actors)
            if stops:
                print(f"stopped after step {global_step}; --resume {folder} goes on if steps are left")
                sys.exit(128 + stops[0])

    if args.eval_episodes:
        found = evaluate(args, agent.state_dict(), folder / f"{global_step}.mp4")
        with SummaryWriter(folder) as writer:
            for tag, value in found.items():
                writer.add_scalar(tag, value, global_step)
    if args.track:
        wandb.finish()
    return agent, folder


# ---------------------------------------------------- Command line ----------------------------------------------------
Domain = Atari


def read_args():
    """The flags. With --resume or --evaluate the run's flags apply, except those given now."""
    args = tyro.cli(Domain, description=__doc__)
    folder = args.resume or args.evaluate
    if not folder:
        return args
    saved = load_checkpoint(folder, type(args))["args"]
    return tyro.cli(Domain, description=__doc__, default=replace(args, **saved))


def main():
    """Train or evaluate as the command line says. Returns the exit code."""
    sys.path.append(os.getcwd())  # for the module of --env-id module:id
    try:
        args = read_args()
        if args.evaluate:
            check_flags(args)
            checkpoint = load_checkpoint(args.evaluate, type(args))
            step = checkpoint["iteration"] * args.num_steps * args.num_envs
            evaluate(args, checkpoint["agent"], args.evaluate / f"{step}.mp4")
        else:
            train(args)
    except (InputError, FloatingPointError, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


if __name__ == "__main__":
    sys.exit(main())
