"""GIPO on MiniGrid vision: PPO with a Gaussian weight instead of its clip, so that old data still teaches.

    loss = -mean(w * r * A) + kl_coef * KL(mu || pi),  r = pi(a|s) / mu(a|s),  w = exp(-(log r)^2 / (2 sigma^2))

mu is the behaviour policy, which collected the sample; A is the sample's advantage. The KL term pulls pi back
towards mu, and mean(-log r) estimates it.
No gradient flows through w. The authors' released method also has a KL term. (Lu et al. 2026, arXiv:2603.03955)

    python gipo_minigrid_vision.py --buffer-epochs 8      # learn from the last 8 rollouts; --help explains every flag
    python gipo_minigrid_vision.py --resume runs/RUN      # continue a run; or --evaluate runs/RUN --capture-video
    tensorboard --logdir runs

`diff ppo_baseline.py gipo_atari.py` shows the method. The diffs with gipo_continuous.py and
gipo_minigrid_vision.py show it too. From `__main__` down, all four scripts are identical.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium>=1.4,<2", "moviepy>=2.2,<3", "numpy>=2,<3", "tensorboard>=2.21", "torch>=2.13,<3",
#     "tqdm>=4.70", "tyro>=1.0,<2", "wandb>=0.31,<1",
#     "minigrid>=3.2,<4",
# ]
# ///

import contextlib
import copy
import math
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, Union

import gymnasium as gym
import minigrid
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# -------------------------------------------------------- Loss --------------------------------------------------------
def policy_loss(logratio, advantages, args):
    """GIPO: the importance ratio times a detached Gaussian of its logarithm (Lu et al. 2026).

    logratio = log pi(a|s) - log mu(a|s), summed over action dimensions, and advantages are (B,). Returns the loss and
    the detached coefficient c of each sample. A sample's gradient is -c A grad log pi / B.
    """
    z = torch.where(advantages > 0, logratio / args.sigma, logratio / (args.sigma_neg or args.sigma)).detach()
    coef = torch.exp(logratio - 0.5 * z**2)  # ratio * weight in one exponential, which cannot overflow
    return -(coef * advantages).mean(), coef.detach()


def minibatch_loss(agent, obs, actions, logprobs, advantages, returns, args):
    """The loss of a minibatch (B, ...), and detached values for the log: scalars, log-ratios and coefficients (B,)."""
    _, newlogprob, entropy, newvalue = agent.get_action_and_value(obs, actions)
    logratio = newlogprob - logprobs
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    # Policy loss
    pg_loss, coef = policy_loss(logratio, advantages, args)
    kl = -logratio.mean()  # KL(mu || pi), estimated on samples of mu

    # Value loss
    v_loss = 0.5 * ((newvalue - returns) ** 2).mean()

    entropy_loss = entropy.mean()
    loss = pg_loss + args.kl_coef * kl - args.ent_coef * entropy_loss + args.vf_coef * v_loss
    scalars = {"losses/policy_loss": pg_loss, "losses/value_loss": v_loss, "losses/entropy": entropy_loss}
    return loss, {tag: value.detach() for tag, value in scalars.items()}, logratio.detach(), coef


def gradient_step(agent, optimizer, minibatch, args):
    """One step of Adam on the loss of a minibatch; returns the values for the log."""
    loss, scalars, logratio, coef = minibatch_loss(agent, *minibatch, args)
    parameters = optimizer.param_groups[0]["params"]
    # autograd.grad, because backward() does not compile into one graph with the rest
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.grad = gradient
    scalars["losses/grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    return scalars, logratio, coef


def diagnostics(logratio, coef):
    """Scalars: how far pi is from the behaviour policies, and how many samples (B,) still have a gradient."""
    ratio = logratio.clamp(max=20).exp()  # float32 ends at exp(88), and an outlier would swamp the mean
    weight = coef.abs() / coef.abs().max().clamp(min=1e-38)  # relative, because squares could overflow
    return {
        "losses/kl": -logratio.mean(),
        "losses/approx_kl": (ratio - 1 - logratio).mean(),
        "losses/clipfrac": ((ratio - 1).abs() > 0.2).float().mean(),
        # kthvalue, because torch.quantile takes 2**24 samples at most
        "offpolicy/abs_logratio_p95": logratio.abs().kthvalue(math.ceil(0.95 * len(logratio))).values,
        "offpolicy/ess": weight.sum() ** 2 / (len(weight) * (weight**2).sum()).clamp(min=1e-38),
        "offpolicy/dead_fraction": (coef.abs() < 1e-3).float().mean(),
        "offpolicy/coef_mean": coef.mean(),
    }


# ------------------------------------------------------- Flags --------------------------------------------------------
@dataclass
class Args:
    env_id: str = "MiniGrid-Fetch-5x5-N2-v0"
    """environment id; write module:id if a module of yours registers it"""
    total_timesteps: int = 150_000
    """environment steps in total, over all environments; rounded down to whole rollouts (100000 to 10000000)"""
    seed: int = 1
    """seed of torch and of the environments"""
    exp_name: str = Path(__file__).stem
    """name of the experiment; the name of the run's folder contains it"""
    device: str | None = None
    """device of the network and the replay buffer: cpu, cuda, cuda:1 or mps; None uses CUDA if it is available"""
    compile: bool = False
    """compile the gradient step with torch.compile: a slower start, then faster updates of small networks"""
    track: bool = False
    """also log to Weights and Biases; its environment variables apply (WANDB_PROJECT, WANDB_MODE, ...)"""

    checkpoint_interval: int = 50
    """iterations between checkpoints; each checkpoint replaces the last one (10 to 500)"""
    resume: Path | None = None
    """continue the run in this folder. Its flags apply, except those given now. The environments start new episodes.
    With a larger --total-timesteps, an annealed learning rate jumps up to that of the longer run"""
    evaluate: Path | None = None
    """play --eval-episodes episodes with the agent of the run in this folder, without training"""
    eval_episodes: int = 10
    """full episodes to play with the trained agent, on seeds that training does not use; 0 plays none (10 to 100)"""
    capture_video: bool = False
    """evaluate on a single episode and record it as an mp4 in the run's folder"""

    num_envs: int = 16
    """number N of parallel environments (4 to 64)"""
    num_steps: int = 64
    """steps T of each environment in a rollout; an iteration collects T x N transitions (64 to 2048)"""
    learning_rate: float = 1e-3
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
    ent_coef: float = 0.03
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
    """width of the Gaussian weight on the log-ratio of an action; a smaller width trusts old data less (0.2 to 2)"""
    sigma_neg: float | None = None
    """width for samples whose advantage is not positive; None uses --sigma (0.1 to 2)"""
    kl_coef: float = 0.1
    """weight of the KL(mu || pi) term, which pulls pi back towards the behaviour policy mu (0 to 0.3)"""


# smallest and largest value of the numeric flags
RANGES = (
    (0, 2e9, "seed"),
    (0, 1, "gamma gae_lambda"),
    (0, 1e9, "policy_lag eval_episodes ent_coef vf_coef kl_coef"),
    (1, 1e9, "num_envs update_epochs num_minibatches buffer_epochs freeze_buffer_at checkpoint_interval"),
    (2, 1e9, "num_steps minibatch_size"),
    (1e-9, 1, "learning_rate"),
    (1e-9, 1e9, "max_grad_norm"),
    (1e-9, 10, "sigma sigma_neg"),
)
EVAL_STEPS = 30_000  # limit of an evaluation episode, because some never end; an ALE game has at most 27,000 steps


# --------------------------------------------- Replay buffer, advantages ----------------------------------------------
class ReplayBuffer(nn.Module):
    """The last K rollouts of T x N transitions; K = 1 is PPO's storage. It is a module only to have a state_dict.

    Fields are (K, T + 1, N, ...). The next observation of row t is in row t + 1, so row T holds only an observation.
    `valid` is false in row T and in the row after the end of an episode. The latter is not a transition, because
    gymnasium ignores its action and resets (NEXT_STEP autoreset).
    """

    def __init__(self, obs, actions, args, device):
        """Allocates the fields; `obs` and `actions` are examples, arrays (N, ...)."""
        super().__init__()
        numbers = dict.fromkeys(
            ("logprobs", "rewards", "values", "advantages", "returns"), np.zeros(len(obs), np.float32)
        )
        marks = dict.fromkeys(("terminated", "dones", "valid"), np.zeros(len(obs), bool))
        for name, array in ({"obs": obs, "actions": actions} | numbers | marks).items():
            example = torch.as_tensor(array, device=device)
            self.register_buffer(name, example.new_zeros(args.buffer_epochs, args.num_steps + 1, *example.shape))
        self.versions = nn.Buffer(torch.full((args.buffer_epochs,), -1))  # iterations of mu, -1 if empty; on the CPU

    def rows(self, *names):
        """Views of these fields, flattened to one row for each of the K x (T + 1) x N entries."""
        return [getattr(self, name).flatten(0, 2) for name in names]

    def sample(self, n):
        """n flat indices of valid transitions, drawn uniformly; none comes twice before all have come once."""
        valid = self.valid.flatten().nonzero().squeeze(1)
        rounds = math.ceil(n / len(valid))
        return valid[torch.cat([torch.randperm(len(valid), device=valid.device) for _ in range(rounds)])[:n]]


def compute_gae(rewards, values, ratios, terminated, dones, gamma, gae_lambda):
    """Advantages (Schulman et al. 2016) and value targets, (..., T, N), corrected by V-trace (Espeholt et al. 2018).

    rewards, terminated and dones are (..., T, N); values and ratios = min(1, pi / mu) are (..., T + 1, N).
    Ratios of 1 give plain GAE. A terminated step does not bootstrap. A truncated step also ends the sum, but it
    bootstraps from the next row, which holds the final observation.
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
def refresh_advantages(buffer, slots, iteration, agent, args):
    """Recompute advantages and value targets of these slots with the current critic; V-trace also needs the policy."""
    obs, actions, logprobs, values = buffer.rows("obs", "actions", "logprobs", "values")  # views, to write values
    ratios = torch.ones_like(buffer.values)
    index = torch.arange(len(values), device=values.device).view_as(buffer.values)
    fresh = buffer.versions[slots] == iteration
    # A fresh rollout was valued while acting, with the same weights; only its final observation is missing.
    rows = torch.cat([index[slots[~fresh]].flatten(), index[slots[fresh], -1].flatten()])
    for chunk in rows.split(max(256, 16_384 // obs[0].numel())):  # fits a CPU's cache
        _, logprob, _, values[chunk] = agent.get_action_and_value(obs[chunk], actions[chunk])
        if args.advantage_source == "vtrace":
            ratios.view(-1)[chunk] = (logprob - logprobs[chunk]).clamp(max=0).exp()
    rewards = agent.scale_rewards(buffer.rewards[slots, :-1])
    terminated, dones = buffer.terminated[slots, :-1], buffer.dones[slots, :-1]
    gae = compute_gae(rewards, buffer.values[slots], ratios[slots], terminated, dones, args.gamma, args.gae_lambda)
    buffer.advantages[slots, :-1], buffer.returns[slots, :-1] = gae


# ---------------------------------------------- Checkpoints, evaluation -----------------------------------------------
def require(condition, message, code=2):
    """Exit with one sentence, on a line apart from the progress bar, unless the condition holds."""
    if not condition:
        tqdm.write(f"error: {message}", file=sys.stderr)
        sys.exit(code)


@contextlib.contextmanager
def exit_on_error(what, code=2):
    """Exit with one sentence instead of a traceback on any error, because each library has its own exceptions."""
    try:
        yield
    except Exception as error:
        require(False, f"{what}: {' '.join(str(error).split())[:300]} ({type(error).__name__}).", code)


def save_checkpoint(folder, iteration, args, parts):
    """Save everything except the environments. A rename puts the file in place, so that no crash leaves half of it."""
    checkpoint = {name: part.state_dict() for name, part in parts.items()} | {"iteration": iteration}
    checkpoint["args"] = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    checkpoint["rng"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    with exit_on_error(f"{folder}: the checkpoint cannot be written; any earlier one is kept", code=1):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "checkpoint.tmp").open("wb") as file:
            torch.save(checkpoint, file)
            os.fsync(file.fileno())
        (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")


def stream_seed(seed, stream):
    """Seed of the first environment. `stream` is the iteration that the run starts or resumes with; 10**9 evaluates."""
    # 30 bits, because seed + i must fit ALE's 31
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0]) // 4


def start_envs(make_envs, args, num_envs, seed, **render):
    """Make and reset environments with the seeds `seed`, `seed` + 1, ..."""
    with exit_on_error(f"--capture-video: {args.env_id} cannot be rendered" if render else f"--env-id {args.env_id}"):
        envs = make_envs(args, num_envs, seed, **render)
        obs, _ = envs.reset(seed=seed)
        require(not render or np.ndim(envs.render()[0]) == 3, f"--capture-video: {args.env_id} renders no picture.")
    return envs, obs


class Episodes:
    """Return, length and success of the episodes of N environments; a success at any step counts."""

    def __init__(self, num_envs):
        self.running = np.zeros((3, num_envs))
        self.ended, self.names = [], ["episodic_return", "episodic_length"]

    def step(self, rewards, valid, dones, infos):
        """Count one step of all environments, (N,) each; episodes that end with it move to `ended`."""
        self.running[:2] += (rewards * valid, valid)
        for i in np.flatnonzero(infos.get("_success", False) & valid):
            if np.ndim(infos["success"]) and isinstance(infos["success"][i], (int, float, np.generic)):
                self.running[2, i] = max(self.running[2, i], infos["success"][i] > 0)
                self.names[2:] = ["success_rate"]
        self.ended += self.running[:, dones].T.tolist()
        self.running[:, dones] = 0

    def means(self, prefix):
        """Means over the episodes in `ended`, by tag; success is left out until the environment has reported it."""
        return {prefix + name: float(np.mean(column)) for name, column in zip(self.names, zip(*self.ended))}


@torch.no_grad()
def evaluate(make_envs, agent, args, device, video_path):
    """Play one full episode in each environment, on seeds that training does not use; print and return the means.

    Actions are sampled. Each environment plays one episode, because the first N to end would over-represent short ones.
    """
    render = {"render_mode": "rgb_array"} if args.capture_video else {}
    num_envs = 1 if args.capture_video else args.eval_episodes
    envs, obs = start_envs(make_envs, args, num_envs, stream_seed(args.seed, 10**9), **render)
    episodes, playing = Episodes(num_envs), np.ones(num_envs, bool)
    if render:
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter  # slow to import

        size, fps = envs.render()[0].shape[1::-1], envs.metadata.get("render_fps") or 30
        video = FFMPEG_VideoWriter(str(video_path), size, fps)
    for _ in range(EVAL_STEPS):
        if render:
            video.write_frame(envs.render()[0])
        action, _, _, _ = agent.get_action_and_value(torch.as_tensor(obs, device=device))
        obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())
        dones = playing & (terminations | truncations)
        episodes.step(reward, playing, dones, infos)
        playing &= ~dones
        if not playing.any():
            break
    if render:
        video.close()
    envs.close()
    means = episodes.means("eval/")
    print(f"{len(episodes.ended)} of {num_envs} episodes ended within {EVAL_STEPS} steps: {means}")
    return means


def layer_init(layer, std=math.sqrt(2)):
    """Orthogonal weights of gain `std` (Saxe et al. 2014) and biases of 0."""
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.zeros_(layer.bias)
    return layer


# -------------------------------------------------- MiniGrid vision ---------------------------------------------------
# every word in the missions of minigrid 3.2 and its BabyAI levels; id 0 is padding
VOCABULARY = """a after and at avoid ball behind blue box door end fetch find from front get go goal green grey
    hallway in key lava left matching maze must near next object of on open opening pick purple put
    reach red right room rooms square the then to traverse unlock up use yellow you your""".split()
WORD_IDS = {word: i for i, word in enumerate(VOCABULARY, start=1)}
MAX_WORDS = 40  # a few of BabyAI's longest missions are cut off
TILE = 8
VIEW = 7 * TILE
PIXELS = VIEW * VIEW * 3
# tasks that need only some of the seven actions, by the beginning of their id
ACTIONS = {
    "MiniGrid-Fetch": (0, 1, 2, 3),  # left, right, forward, pickup
    "MiniGrid-GoTo": (0, 1, 2, 6),  # left, right, forward, done
}


@cache
def render_tile(kind, color, state, agent_here):
    """Pixels (8, 8, 3) of one cell of the agent's view; drawing is slow, so each kind of tile is drawn once."""
    tile = minigrid.core.world_object.WorldObj.decode(kind, color, state)
    visible = kind != minigrid.core.constants.OBJECT_TO_IDX["unseen"]
    agent_dir = 3 if agent_here else None
    return minigrid.core.grid.Grid.render_tile(tile, agent_dir=agent_dir, highlight=visible, tile_size=TILE)


class PixelsAndWords(gym.Wrapper):
    """Packs the agent's view and the mission into one uint8 vector: pixels (56, 56, 3), then 40 word ids."""

    def __init__(self, env, env_id):
        super().__init__(env)
        self.env_id = env_id
        tasks = [task for task in ACTIONS if env_id.startswith(task)]
        self.actions = ACTIONS[tasks[0]] if tasks else range(env.action_space.n)
        self.action_space = gym.spaces.Discrete(len(self.actions))
        self.observation_space = gym.spaces.Box(0, 255, (PIXELS + MAX_WORDS,), np.uint8)

    def pack(self, obs):
        packed = np.zeros(PIXELS + MAX_WORDS, np.uint8)
        pixels = packed[:PIXELS].reshape(VIEW, VIEW, 3)
        for i, column in enumerate(obs["image"].tolist()):
            for j, cell in enumerate(column):
                tile = render_tile(*cell, agent_here=(i, j) == (3, 6))
                pixels[j * TILE : (j + 1) * TILE, i * TILE : (i + 1) * TILE] = tile
        words = re.findall(r"\w+", obs["mission"].lower())
        unknown = [word for word in words if word not in WORD_IDS]
        require(not unknown, f"--env-id {self.env_id}: the mission's words {unknown} are not in VOCABULARY; add them.")
        ids = [WORD_IDS[word] for word in words[:MAX_WORDS]]
        packed[PIXELS : PIXELS + len(ids)] = ids
        return packed

    def reset(self, **kwargs):
        with contextlib.redirect_stdout(None):  # BabyAI prints each level that it rejects
            obs, info = self.env.reset(**kwargs)
        return self.pack(obs), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(self.actions[action])
        return self.pack(obs), reward, terminated, truncated, {"success": bool(reward > 0)} | info


def make_minigrid_envs(args, num_envs, seed, **render):
    """Vector of grid worlds with observations (9448,) uint8."""

    def make_env():
        env = gym.make(args.env_id, disable_env_checker=True, **render)
        obs, action = env.observation_space, env.action_space
        shapes = {key: part.shape for key, part in obs.items()} if isinstance(obs, gym.spaces.Dict) else {}
        rule = f"--env-id {args.env_id}: it needs MiniGrid's 7 x 7 view, a mission, and actions that count from 0."
        require("mission" in shapes and shapes.get("image") == (7, 7, 3), rule)
        require(isinstance(action, gym.spaces.Discrete) and action.start == 0, rule)
        return PixelsAndWords(env, args.env_id)

    return gym.vector.SyncVectorEnv([make_env] * num_envs)


class MinigridAgent(nn.Module):
    """Embeds each 8 x 8 patch and scales it by 1 + the sum of the mission's word embeddings, so word order is lost.

    This is FiLM (Perez et al. 2018) without its shift; observations (B, 9448) uint8.
    """

    def __init__(self, envs, args):
        super().__init__()
        self.patches = layer_init(nn.Conv2d(3, 128, TILE, stride=TILE))
        self.norm = nn.LayerNorm(128)
        self.words = nn.EmbeddingBag(len(VOCABULARY) + 1, 128, mode="sum", padding_idx=0)
        self.project = nn.Linear(128, 32)
        self.network = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(49 * 32, 128), nn.ReLU())
        self.actor = layer_init(nn.Linear(128, int(envs.single_action_space.n)), std=0.01)
        self.critic = layer_init(nn.Linear(128, 1), std=1.0)

    def get_action_and_value(self, obs, action=None):
        pixels = obs[:, :PIXELS].view(-1, VIEW, VIEW, 3).permute(0, 3, 1, 2) / 127.5 - 1
        patches = self.norm(self.patches(pixels).flatten(2).mT)  # (B, 49, 128)
        scale = 1 + self.words(obs[:, PIXELS:].int()).unsqueeze(1)
        hidden = self.network(self.project(scale * patches))
        probs = Categorical(logits=self.actor(hidden), validate_args=False)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(hidden).squeeze(-1)

    def scale_rewards(self, rewards):
        return rewards

    def update_statistics(self, obs, rewards, dones, valid):
        """Pixels, words and rewards of at most 1 need no statistics."""


# ---------------------------------------------------- Command line ----------------------------------------------------
DOMAINS = {
    Args: (make_minigrid_envs, MinigridAgent),
}


def read_args():
    """The flags, and the checkpoint of --resume or --evaluate. Its flags apply, except those given now."""
    Flags = Union[tuple(DOMAINS)]  # noqa: UP007 (one class here, three in the baseline)
    args, checkpoint = tyro.cli(Flags, description=__doc__), {"iteration": 0}
    folder = args.evaluate or args.resume
    if folder:
        with exit_on_error(f"{folder} has no checkpoint that this script can read"):
            damaged = zipfile.ZipFile(folder / "checkpoint.pt").testzip()  # torch.load does not notice flipped bits
            checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            require(not damaged and checkpoint["iteration"] >= 0, f"{folder / 'checkpoint.pt'} is damaged.")
            args = replace(args, **checkpoint["args"])
        args = tyro.cli(Flags, description=__doc__, default=args)

    for low, high, names in RANGES:
        for name in names.split():
            value = getattr(args, name)
            rule = f"--{name.replace('_', '-')} {value}: give {low:g} to {high:g}."
            require(value is None or low <= value <= high, rule)
    rollout = args.num_steps * args.num_envs
    least = rollout if args.evaluate else (checkpoint["iteration"] + 1) * rollout
    fits = args.minibatch_size or (rollout % args.num_minibatches == 0 and rollout > args.num_minibatches)
    require(least <= args.total_timesteps, f"--total-timesteps {args.total_timesteps}: give at least {least}.")
    require(fits, f"--num-minibatches {args.num_minibatches}: give a proper divisor of {rollout}, a rollout's size.")
    require(args.eval_episodes or not (args.evaluate or args.capture_video), "--eval-episodes 0: give 1 or more.")
    return args, checkpoint


if __name__ == "__main__":
    sys.stderr = sys.stderr or open(os.devnull, "w")  # it is None after `2>&-`
    args, checkpoint = read_args()
    make_envs, Agent = DOMAINS[type(args)]
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # so that one seed gives one result on a GPU too
    with exit_on_error(f"--device {args.device}"):
        device = torch.zeros(0, device=args.device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    batch_size = args.num_steps * args.num_envs
    minibatch_size = args.minibatch_size or batch_size // args.num_minibatches
    num_iterations = args.total_timesteps // batch_size
    first_iteration = checkpoint["iteration"]
    global_step = first_step = first_iteration * batch_size

    seed = stream_seed(args.seed, first_iteration)
    envs, obs = start_envs(make_envs, args, args.num_envs, seed)
    agent = Agent(envs, args).to(device)
    # a tensor, because --compile would bake in a number
    optimizer = torch.optim.Adam(agent.parameters(), torch.tensor(args.learning_rate), eps=1e-5, fused=not args.compile)
    buffer = ReplayBuffer(obs, envs.action_space.sample(), args, device)
    actors = nn.ModuleList(copy.deepcopy(agent) for _ in range(args.policy_lag + 1))  # version v is at v % (L + 1)
    parts = {"agent": agent, "optimizer": optimizer, "buffer": buffer, "actors": actors}
    resumed = args.evaluate or args.resume
    if resumed:
        with exit_on_error(f"the checkpoint of {resumed} does not fit these flags"):
            for name, part in parts.items():
                part.load_state_dict(checkpoint.pop(name))
            torch.set_rng_state(checkpoint["rng"][0])
            torch.cuda.set_rng_state_all(checkpoint["rng"][1:][: torch.cuda.device_count()])

    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"  # no two runs may share it
    folder = resumed or Path("runs", re.sub(r"[^\w.-]", "-", run_name))
    if args.evaluate:
        evaluate(make_envs, agent, args, device, folder / f"{global_step}.mp4")
        sys.exit()
    if args.capture_video:
        start_envs(make_envs, args, 1, seed, render_mode="rgb_array")[0].close()  # to fail now, not after the training
    if args.track:
        try:
            import wandb

            wandb.init(name=folder.name, sync_tensorboard=True, config=vars(args))
        except Exception as error:  # tracking must not end a run
            print(f"warning: the run goes on without Weights and Biases: {error}", file=sys.stderr)
    save_checkpoint(folder, first_iteration, args, parts)
    writer = SummaryWriter(folder, purge_step=first_step + 1)  # steps after the checkpoint are logged again
    writer.add_text("hyperparameters", f"`{args}`", first_step)
    print(f"{folder}: {'goes on' if resumed else 'starts'} after step {first_step}")
    if args.compile:
        gradient_step = torch.compile(gradient_step)
        torch._dynamo.config.trace_autograd_ops = True
    stops = []  # signals received; the run stops at the end of the iteration
    handlers = {
        s: signal.signal(s, lambda signum, _: stops.append(signum))
        for s in signal.Signals
        if s.name in ("SIGINT", "SIGTERM", "SIGHUP") and signal.getsignal(s) != signal.SIG_IGN  # nohup ignores SIGHUP
    }

    next_obs = torch.as_tensor(envs.reset(seed=seed)[0], device=device)  # again: the agent may have taken random steps
    next_valid = np.ones(args.num_envs, bool)
    episodes = Episodes(args.num_envs)
    start_time = time.time()
    progress = tqdm(range(first_iteration, num_iterations), initial=first_iteration, total=num_iterations)

    for iteration in progress:
        lr = args.learning_rate * (1 - iteration / num_iterations if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"].fill_(lr)
        version = max(0, iteration - args.policy_lag)
        actors[iteration % len(actors)].load_state_dict(agent.state_dict())
        frozen = args.freeze_buffer_at is not None and global_step >= args.freeze_buffer_at
        slot = iteration % args.buffer_epochs  # the oldest rollout, which the new one overwrites
        rollout = {name: field[slot] for name, field in buffer.named_buffers()}  # views

        # Rollout
        episodes.ended.clear()
        for step in range(args.num_steps):
            obs, valid = next_obs, next_valid
            with torch.no_grad():
                action, logprob, _, value = actors[version % len(actors)].get_action_and_value(obs)
            next_obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())
            next_obs = torch.as_tensor(next_obs, device=device)
            next_valid = ~(terminations | truncations)
            episodes.step(reward, valid, ~next_valid, infos)
            if not frozen:
                # in Atari a lost life ends the return, but the game continues, so no autoreset follows
                terminated = terminations | infos.get("life_lost", False)
                row = {"obs": obs, "actions": action, "logprobs": logprob, "values": value, "rewards": reward}
                row |= {"terminated": terminated, "dones": terminated | truncations, "valid": valid}
                for name, entry in row.items():
                    rollout[name][step] = torch.as_tensor(entry)
        if not frozen:
            rollout["obs"][-1] = next_obs
            rollout["versions"].fill_(version)
        global_step += batch_size

        # Advantages
        slots = (buffer.versions >= 0).nonzero().squeeze(1)
        ages = iteration - buffer.versions[slots].float()
        if args.advantage_source == "stored":
            slots = slots[:0] if frozen else slots[slots == slot]  # advantages are computed once
        refresh_advantages(buffer, slots, iteration, agent, args)

        # Update
        batch = buffer.rows("obs", "actions", "logprobs", "advantages", "returns")
        logged = []
        for _ in range(args.update_epochs):
            b_inds = buffer.sample(args.num_minibatches * minibatch_size)
            for mb_inds in b_inds.split(minibatch_size):
                logged.append(gradient_step(agent, optimizer, [field[mb_inds] for field in batch], args))
        if not frozen:  # only now, because the update must start from the policy that acted
            agent.update_statistics(*(rollout[name][:-1] for name in ("obs", "rewards", "dones", "valid")))

        # Logging
        losses, logratios, coefs = zip(*logged)
        y_pred, y_true = buffer.values.flatten()[b_inds], buffer.returns.flatten()[b_inds]
        scalars = {tag: torch.stack([loss[tag] for loss in losses]).mean() for tag in losses[0]}
        scalars |= diagnostics(torch.cat(logratios), torch.cat(coefs))
        scalars["losses/explained_variance"] = 1 - (y_true - y_pred).var() / y_true.var().clamp(min=1e-8)
        scalars |= {"offpolicy/age_mean": ages.mean(), "offpolicy/age_max": ages.max()}
        scalars |= episodes.means("charts/")
        scalars |= {"charts/learning_rate": lr, "charts/SPS": (global_step - first_step) / (time.time() - start_time)}
        checked = {"observations": rollout["obs"], "rewards": rollout["rewards"]} | scalars | agent.state_dict()
        broken = [name for name, value in checked.items() if not torch.as_tensor(value).isfinite().all()]
        require(not broken, f"{broken[:3]} not finite in iteration {iteration}; {folder} keeps its last checkpoint.", 1)
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, global_step)
        progress.set_postfix(episodic_return=scalars.get("charts/episodic_return"))
        if stops or iteration + 1 == num_iterations or (iteration + 1) % args.checkpoint_interval == 0:
            writer.flush()  # before the checkpoint, which must not be ahead of the log
            save_checkpoint(folder, iteration + 1, args, parts)
        if stops:
            print(f"stopped after step {global_step}; --resume {folder} goes on if steps are left")
            sys.exit(128 + stops[0])

    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    if args.eval_episodes:
        for tag, value in evaluate(make_envs, agent, args, device, folder / f"{global_step}.mp4").items():
            writer.add_scalar(tag, value, global_step)
    writer.close()
