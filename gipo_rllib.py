"""GIPO on Ray RLlib's asynchronous engine: APPO's actors and circular buffer, with GIPO's loss in place of APPO's clip.

    loss = -mean(w * r * A) + kl_coef * KL(mu || pi),  r = pi(a|s) / mu(a|s),  w = exp(-(log r)^2 / (2 sigma^2))

mu is the behaviour policy, which acted some updates ago in another process or on another machine. A is the advantage
under V-trace's value targets. No gradient flows through w.

    pip install -r requirements-rllib.txt                         # in its own virtual environment
    python gipo_rllib.py --reward-scale 0.1                       # CartPole, two actors on this machine
    python gipo_rllib.py --env-id Pendulum-v1 --reward-scale 0.01 --buffer-batches 32
    python gipo_rllib.py --env-id ALE/Pong-v5 --num-env-runners 32 --num-learners 1 --num-gpus 1 --address auto
    python gipo_rllib.py --resume runs/RUN
    tensorboard --logdir runs

--surrogate clip selects APPO's clipped loss, by default without the KL term. Value targets and bootstrap are the same.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import ray
import torch
import tyro
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.appo.torch.appo_torch_learner import APPOTorchLearner
from ray.rllib.algorithms.impala.torch.vtrace_torch_v2 import make_time_major, vtrace_torch
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.connectors.learner.frame_stacking import FrameStackingLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.wrappers.atari_wrappers import FireResetEnv
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from ray.tune.registry import register_env
from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint-*"  # in the run's folder, as is ARGS; the star is the step
ARGS = "args.json"
SHOWN = ("charts/episodic_return", "offpolicy/age_mean", "offpolicy/abs_logratio_p95", "charts/SPS")


@dataclass(kw_only=True)
class Args:
    """GIPO on RLlib's APPO."""

    env_id: str = "CartPole-v1"
    """environment id: one with vector observations, or ALE/*-v5; actions may be discrete or continuous"""
    total_timesteps: int = 300_000
    """environment steps in total, over all actors (100000 to 1000000000)"""
    address: str | None = None
    """address of the Ray cluster to join, as in ray.init; None joins one on this machine, or starts one"""
    resume: Path | None = None
    """continue the run in this folder with its flags.
    Only --address, --total-timesteps, --checkpoint-interval and --iteration-seconds may be new"""
    checkpoint_interval: int = 10
    """iterations between checkpoints; each checkpoint replaces the last one (1 to 100). One more is saved at the end.
    The run stops without saving when an observation, reward, loss or weight is not finite"""
    iteration_seconds: float = 5.0
    """shortest time of an iteration, which writes one line of the log, in seconds (1 to 60)"""

    seed: int = 1
    """seed of the actors' environments and of the learners; the order of batches still varies"""
    exp_name: str = Path(__file__).stem
    """name of the experiment; the name of the run's folder contains it"""
    num_env_runners: int = 2
    """number of actors; each takes one process and one core (1 to 1000)"""
    num_envs: int = 4
    """environments per actor (1 to 64)"""
    num_steps: int = 50
    """steps per environment in each rollout of an actor (20 to 200)"""
    num_learners: int = 0
    """number of learner processes; 0 learns in the main process (0 to 8)"""
    num_gpus: int = 0
    """GPUs per learner (0 or 1)"""

    batch_size: int = 600
    """transitions per gradient step of a learner, rounded up to whole rollouts of an actor (200 to 4000)"""
    buffer_batches: int = 8
    """batches in the circular buffer; offpolicy/age_mean logs their age in gradient steps (1 to 64)"""
    buffer_reuse: int = 2
    """largest number of gradient steps on a batch before it is dropped (1 to 32)"""
    learning_rate: float = 5e-4
    """Adam's step size (1e-4 to 1e-3)"""
    reward_scale: float = 1.0
    """factor on the rewards that are learned from, to bring discounted returns to an order of 10 (0.001 to 1).
    Logged returns are unscaled"""
    gamma: float = 0.99
    """discount factor (0.9 to 0.999)"""
    norm_adv: bool = True
    """normalize the advantages of each batch to mean 0 and standard deviation 1; APPO itself does not"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (0 to 0.02)"""
    vf_coef: float = 0.5
    """weight of the value loss (0.05 to 1)"""
    max_grad_norm: float = 20.0
    """largest norm of the gradient; a longer gradient is scaled down to this norm (0.5 to 40)"""

    surrogate: Literal["gipo", "clip"] = "gipo"
    """policy loss; clip is APPO's own"""
    sigma: float = 0.5
    """gipo: width of the Gaussian weight on the log-ratio of an action (0.2 to 2)"""
    clip_coef: float = 0.4
    """clip: how far the ratio to the target network may move from 1 (0.1 to 0.4)"""
    kl_coef: float | None = None
    """weight of the KL(mu || pi) term, which pulls pi back to mu (0 to 0.3); None is 0.1 for gipo and 0 for clip"""

    def __post_init__(self):
        if self.kl_coef is None:
            self.kl_coef = 0.1 if self.surrogate == "gipo" else 0.0
        for low, high, names in RANGES:
            for name in names.split():
                value = getattr(self, name)
                rule = f"--{name.replace('_', '-')} {value}: give {low:g} to {high:g}."
                require(value is None or low <= value <= high, rule)


# smallest and largest value of the numeric flags
RANGES = (
    (0, 2e9, "seed"),
    (0, 1, "gamma"),
    (0, 1e9, "num_learners num_gpus ent_coef vf_coef kl_coef iteration_seconds"),
    (1, 1e9, "num_env_runners num_envs buffer_batches buffer_reuse checkpoint_interval"),
    (1, 1e15, "total_timesteps"),
    (2, 1e9, "num_steps batch_size"),
    (1e-6, 1e38, "learning_rate max_grad_norm reward_scale clip_coef"),
    (1e-6, 10, "sigma"),
)


class Failure(ValueError):
    """Ends the script with this exit code and one sentence."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def require(condition: bool, message: str, code: int = 2):
    """Raise `Failure(message)` unless the condition holds. NaN fails every range, because it compares false."""
    if not condition:
        raise Failure(message, code)


def place(error):
    """Where an error comes from, if that is no library: the innermost file and line."""
    libraries = (sys.prefix, sys.base_prefix, "<", __file__)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""


@contextlib.contextmanager
def one_sentence(what: str, code: int = 2):
    """Turn any error in this block into a `Failure`, because each library has its own exceptions."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        error = error.__cause__ or error
        text = str(error) or "it failed"
        raise Failure(f"{what}: {text} ({type(error).__name__}{place(error)}).", code) from None


# ------------------------------------------------------- Loss --------------------------------------------------------
def policy_loss(logratio, advantages, args):
    """GIPO: the importance ratio times a detached Gaussian of its logarithm (Lu et al. 2026).

    logratio = log pi(a|s) - log mu(a|s) is (B, D), with a column for each part of an action that has a ratio of its
    own: the whole action (D = 1), or each of its dimensions. advantages are (B, 1). Returns a scalar.
    """
    z = (logratio / args.sigma).detach()
    return -(torch.exp(logratio - 0.5 * z**2) * advantages).sum(1).mean()  # w * r as one exp, which cannot overflow


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


def clip_loss(logratio, old_logratio, pg_advantages, args):
    """APPO's own loss: it clips the ratio to the target network. All three are (B,).

    old_logratio = log pi_target(a|s) - log mu(a|s). V-trace scales pg_advantages by its exponential, at most 1.
    """
    ratio = torch.exp(-old_logratio).clamp(0, 2) * torch.exp(logratio)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    return -torch.min(ratio * pg_advantages, clipped * pg_advantages).mean()


def clip_diagnostics(logratio, old_logratio, advantages, args):
    """What replaces the scalars of `diagnostics` that tell of GIPO's coefficient, for APPO's loss."""
    sign = torch.where(advantages > 0, 1.0, -1.0)
    x = logratio.clone().requires_grad_()
    loss = clip_loss(x, old_logratio, sign * torch.exp(old_logratio).clamp(max=1), args)
    (gradient,) = torch.autograd.grad(loss, x)
    coef = -sign * gradient * len(sign)
    relative = coef.abs() / coef.abs().max().clamp(min=1e-38)
    return {
        "offpolicy/ess": relative.sum() ** 2 / (len(relative) * (relative**2).sum()).clamp(min=1e-38),
        "offpolicy/dead_fraction": (coef.abs() < 1e-3).float().mean(),
        "offpolicy/coef_mean": coef.mean(),
    }


class Learner(APPOTorchLearner):
    """APPO's learner with the policy loss that --surrogate names, and the diagnostics of gipo_continuous.py."""

    broken = False  # true once a loss was not finite

    def update(self, *args, **kwargs):
        # RLlib queues a mean every few gradient steps, but reads one every few batches. With reuse the log would fall
        # further and further behind.
        while self._learner_thread_out_queue.qsize() > 1:
            self._learner_thread_out_queue.get()
        return super().update(*args, **kwargs)

    def compute_loss_for_module(self, *, module_id, config, batch, fwd_out):
        args, module = config.learner_config_dict["args"], self.module[module_id].unwrapped()
        mask = batch[Columns.LOSS_MASK]  # false in the row that APPO adds to bootstrap from
        distribution = module.get_train_action_dist_cls()
        policy = distribution.from_logits(fwd_out[Columns.ACTION_DIST_INPUTS])
        target = distribution.from_logits(module.forward_target(batch)[TARGET_NETWORK_ACTION_DIST_INPUTS])
        logprobs = batch[Columns.ACTION_LOGP]
        logratio = policy.logp(batch[Columns.ACTIONS]) - logprobs
        old_logprobs = target.logp(batch[Columns.ACTIONS])

        # V-trace, (T, B) from here
        def rows(tensor):
            return make_time_major(tensor, trajectory_len=config.get_rollout_fragment_length())

        values = rows(module.compute_values(batch, embeddings=fwd_out.get(Columns.EMBEDDINGS)))
        rewards, valid = args.reward_scale * batch[Columns.REWARDS], rows(mask)
        rewards = rows(rewards.clamp(-1, 1) if args.env_id.startswith("ALE/") else rewards)
        # a masked row's reward is its value, because RLlib's 0 would make every end of a rollout a termination
        rewards = torch.where(valid, rewards, values.detach())
        discounts = config.gamma * (1 - rows(batch[Columns.TERMINATEDS].float())) * valid
        bootstrap = values[0].roll(-1)  # a column goes on in the next one; the last column ends with a masked row
        targets, pg_advantages = vtrace_torch(
            target_action_log_probs=rows(old_logprobs),
            behaviour_action_log_probs=rows(logprobs),
            discounts=discounts,
            rewards=rewards,
            values=values,
            bootstrap_values=bootstrap,
            clip_rho_threshold=config.vtrace_clip_rho_threshold,
            clip_pg_rho_threshold=config.vtrace_clip_pg_rho_threshold,
        )

        if args.surrogate == "gipo":
            # without V-trace's own ratio, because GIPO's loss contains one
            next_targets = torch.cat([targets[1:], bootstrap.unsqueeze(0)])
            pg_advantages = (rewards + discounts * next_targets - values).detach()
        advantages = pg_advantages[valid]
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        # Policy loss
        logratio, old_logratio = rows(logratio)[valid], rows(old_logprobs - logprobs)[valid]
        if args.surrogate == "gipo":
            # one column, because RLlib's distributions have the ratio of the whole action
            pg_loss = policy_loss(logratio.unsqueeze(1), advantages.unsqueeze(1), args)
        else:
            pg_loss = clip_loss(logratio, old_logratio, advantages, args)

        kl = -logratio.mean()  # KL(mu || pi), estimated on samples of mu

        # Value loss
        v_loss = 0.5 * ((values - targets)[valid] ** 2).mean()

        entropy_loss = policy.entropy()[mask].mean()
        loss = pg_loss + args.kl_coef * kl - args.ent_coef * entropy_loss + args.vf_coef * v_loss
        # noted here, because RLlib turns such a loss into a step of 0 and drops NaN from its means
        self.broken = ~loss.detach().isfinite() | self.broken
        # the age is in gradient steps, and RLlib has already counted this one
        age = (self._weights_seq_no - 1 - batch[WEIGHTS_SEQ_NO][mask]).float()
        logratio = logratio.detach()
        scalars = diagnostics(logratio.unsqueeze(1), advantages.unsqueeze(1), args)
        if args.surrogate == "clip":
            scalars |= clip_diagnostics(logratio, old_logratio, advantages, args)
        scalars |= {"losses/policy_loss": pg_loss, "losses/value_loss": v_loss, "losses/entropy": entropy_loss}
        scalars["losses/kl"] = kl
        scalars |= {"offpolicy/age_mean": age.mean(), "offpolicy/age_max": age.max()}
        self.metrics.log_dict({tag: value.detach() for tag, value in scalars.items()}, key=module_id, window=100)
        self.metrics.log_value((module_id, "charts/gradient_steps"), self._weights_seq_no, reduce="max", window=100)
        self.metrics.log_value((module_id, "not_finite/losses"), self.broken.float(), reduce="max", window=100)
        return loss


# ------------------------------------------------------- Engine -------------------------------------------------------
class Finite(gym.Wrapper):
    """Replaces an observation or reward that is not finite by 0, and notes which in `broken`.

    NaN would stay in the means that normalize the observations of all actors, and no action can be drawn from NaN.
    """

    def __init__(self, env):
        super().__init__(env)
        self.broken = set()

    def checked(self, name: str, value):
        if np.isfinite(value).all():
            return value
        self.broken.add(name)
        return np.zeros_like(value)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.checked("observations", obs), info

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return self.checked("observations", obs), self.checked("rewards", reward), *rest


def report_broken(env_runner, metrics_logger, **_):
    """Send what an actor's environments noted to the main process, together with its rollouts."""
    names = set().union(*env_runner.env.unwrapped.get_attr("broken"))
    for name in ("observations", "rewards"):
        metrics_logger.log_value(f"not_finite/{name}", float(name in names), reduce="max")


def make_config(args: Args) -> APPOConfig:
    """RLlib's settings for these flags. Raises `Failure` if the environment does not fit."""
    with_pixels = args.env_id.startswith("ALE/")

    def make_env(_):
        if with_pixels:
            import ale_py

            gym.register_envs(ale_py)  # in each actor's process
            env = gym.make(args.env_id, frameskip=1)
            env = gym.wrappers.AtariPreprocessing(env, grayscale_newaxis=True, scale_obs=True)
            return Finite(FireResetEnv(env) if "FIRE" in env.unwrapped.get_action_meanings() else env)
        env = gym.make(args.env_id)
        space = env.observation_space
        if isinstance(space, gym.spaces.Box) and not np.issubdtype(space.dtype, np.floating):
            env = gym.wrappers.DtypeObservation(env, np.float32)  # RLlib's networks take no integers
        return Finite(env)

    def flat(space):
        return isinstance(space, gym.spaces.Box) and len(space.shape) == 1

    with one_sentence(f"--env-id {args.env_id}"):
        env = make_env(None)
        space, actions = env.observation_space, env.action_space
        env.close()
    rule = f"--env-id {args.env_id}: observations must be a flat Box, not {space}; try CartPole-v1."
    require(with_pixels or flat(space), rule)
    continuous = flat(actions)
    fits = continuous or (isinstance(actions, gym.spaces.Discrete) and actions.start == 0)
    rule = f"--env-id {args.env_id}: actions must be Discrete and count from 0, or a flat Box, not {actions}."
    require(fits, rule)
    rule = f"--env-id {args.env_id}: actions must be of a floating point type, not {actions}."
    require(not continuous or np.issubdtype(actions.dtype, np.floating), rule)
    register_env(args.env_id, make_env)
    layers = {"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh"}
    model = DefaultModelConfig(**layers, free_log_std=continuous, vf_share_layers=False)
    if with_pixels:
        filters = [[32, 8, 4], [64, 4, 2], [64, 3, 1]]  # Mnih et al. 2015
        model = DefaultModelConfig(conv_filters=filters, head_fcnet_hiddens=[512], vf_share_layers=True)
    prepare = partial(FrameStackingEnvToModule, num_frames=4) if with_pixels else MeanStdFilter
    # Actions keep the environment's own units, as in gipo_continuous.py. If they were scaled to (-1, 1), the mean would
    # drift past the bounds, where all actions are equal and nothing can be learned.
    config = APPOConfig().environment(args.env_id, normalize_actions=False, clip_actions=True)
    config.env_runners(
        num_env_runners=args.num_env_runners,
        create_env_on_local_worker=True,  # plays while no actor is alive, and reports errors of the environment
        num_envs_per_env_runner=args.num_envs,
        rollout_fragment_length=args.num_steps,
        env_to_module_connector=lambda *_, **__: prepare(),
    )
    config.learners(
        num_learners=args.num_learners,
        num_gpus_per_learner=args.num_gpus,
        learner_class=Learner,
        learner_config_dict={"args": args},
        learner_connector=(lambda *_, **__: FrameStackingLearner(num_frames=4)) if with_pixels else None,
    )
    config.training(
        lr=args.learning_rate,
        gamma=args.gamma,
        grad_clip=args.max_grad_norm,
        train_batch_size_per_learner=args.batch_size,
        circular_buffer_num_batches=args.buffer_batches,
        circular_buffer_iterations_per_batch=args.buffer_reuse,
        clip_param=args.clip_coef,
        entropy_coeff=args.ent_coef,
        vf_loss_coeff=args.vf_coef,
    )
    config.fault_tolerance(delay_between_env_runner_restarts_s=1)  # instead of RLlib's minute
    config.callbacks(on_sample_end=report_broken)
    config.rl_module(model_config=model)
    config.reporting(min_time_s_per_iteration=args.iteration_seconds)
    return config.debugging(seed=args.seed, log_level="ERROR")


def read_args() -> Args:
    """The flags, on top of those of the run that --resume names. A mistake raises `Failure`."""
    args = tyro.cli(Args, description=__doc__)
    folder = args.resume
    if not folder:
        return args
    with one_sentence(f"--resume {folder}: give the folder of a run with a checkpoint"):
        # runs of the first edition had no KL term, and those of the second one had one more flag
        flags = {"kl_coef": 0.0, "sigma_neg": None} | json.loads((folder / ARGS).read_text())
        require(flags.pop("sigma_neg") is None, f"--resume {folder}: it was run with --sigma-neg, which is gone.")
        saved = Args(**flags, resume=folder)
        step = step_of(newest_checkpoint(folder))
    args = tyro.cli(Args, default=saved)
    fields = [field.name for field in dataclasses.fields(Args)]
    for name in ("env_id", *fields[fields.index("seed") :]):
        rule = f"--{name.replace('_', '-')}: {folder} was run with {getattr(saved, name)}; leave the flag out."
        require(getattr(args, name) == getattr(saved, name), rule)
    rule = f"--total-timesteps {args.total_timesteps}: {folder} has {step} steps already; give more."
    require(args.total_timesteps > step, rule)
    return args


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-")[-1])


def newest_checkpoint(folder: Path) -> Path:
    return max(folder.glob(CHECKPOINT), key=step_of)


def save(algorithm, folder: Path, step: int):
    """Save a checkpoint by RLlib's own method. It gets its name once it is complete; then older ones are deleted."""
    named = folder / CHECKPOINT.replace("*", str(step))
    if named.exists():
        return  # there was no step since
    new = folder / "saving"
    with one_sentence(f"{folder} keeps its last checkpoint, because the new one cannot be written", code=1):
        shutil.rmtree(new, ignore_errors=True)
        algorithm.save_to_path(str(new.absolute()))
        older = list(folder.glob(CHECKPOINT))
        new.rename(named)
        for path in older:
            shutil.rmtree(path)


def scalars_of(result: dict) -> dict[str, float]:
    """What RLlib reports about an iteration, under the tags of gipo_continuous.py."""
    actors, tolerance = result["env_runners"], result["fault_tolerance"]
    scalars = {
        "charts/episodic_return": actors.get("episode_return_mean"),
        "charts/episodic_length": actors.get("episode_len_mean"),
        "charts/healthy_actors": tolerance.get("num_healthy_workers"),
        "charts/actor_restarts": tolerance.get("num_remote_worker_restarts"),
    }
    learner = result.get("learners", {}).get("default_policy", {})
    scalars |= {tag: value for tag, value in learner.items() if tag.startswith(("charts/", "losses/", "offpolicy/"))}
    # RLlib reports NaN for what did not happen in this iteration
    return {tag: float(value) for tag, value in scalars.items() if value is not None and math.isfinite(value)}


def not_finite(result: dict, weights: dict) -> list[str]:
    """Names of what was not finite in an iteration."""
    counts = result["env_runners"] | result.get("learners", {}).get("default_policy", {})
    names = [name for name in ("observations", "rewards", "losses") if counts.get(f"not_finite/{name}", 0) > 0]
    return names + ["weights"] * (not all(np.isfinite(w).all() for w in weights.values()))


def main(args: Args, config: APPOConfig):
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the actors need the cores, and two runs with more threads wait for each other
    stops = []

    def stop(signum, _):
        stops.append(signum)
        if signum in (signal.SIGINT, signal.SIGTERM):  # a closing terminal sends its signal twice
            signal.signal(signum, signal.SIG_DFL)  # before the line, whose reader may answer at once
            print("\nstops after this iteration; once more ends the program at once", flush=True)

    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup:
        # ignored, so that Ray's processes inherit this; a closing terminal sends the signal to all of them
        before = signal.signal(hangup, signal.SIG_IGN)
    with one_sentence(f"--address {args.address}"):
        ray.init(address=args.address, include_dashboard=None if args.address else False, log_to_driver=False)
    for signum in (signal.SIGINT, signal.SIGTERM):  # now, because Ray sets handlers of its own
        signal.signal(signum, stop)
    if hangup and before != signal.SIG_IGN:
        signal.signal(hangup, stop)
    with one_sentence("RLlib cannot start", code=1):
        algorithm = config.build_algo()
    first_step = 0
    if args.resume:
        with one_sentence(f"--resume {args.resume}: its checkpoint cannot be read"):
            checkpoint = newest_checkpoint(args.resume)
            algorithm.restore_from_path(str(checkpoint.absolute()))
        first_step = step_of(checkpoint)
    # in nanoseconds, because runs that start together must not share a folder
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    folder = args.resume or Path("runs", re.sub(r"[^A-Za-z0-9_.-]", "-", run_name))
    with one_sentence(f"{folder} cannot be written", code=1):
        folder.mkdir(parents=True, exist_ok=True)
    saved = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("resume", "address")}
    (folder / ARGS).write_text(json.dumps(saved, indent=1))
    writer = SummaryWriter(folder, purge_step=first_step + 1)  # steps after the checkpoint are logged again
    if not args.resume:
        save(algorithm, folder, 0)  # so that there is one, however early the run stops
        table = "\n".join(f"|{name}|{value}|" for name, value in saved.items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    print(f"{folder}: waits for {args.num_env_runners} actors; each takes one core", flush=True)

    step, restarts, first = 0, 0, None
    for iteration in itertools.count(1):
        with one_sentence(f"RLlib failed, and {folder} keeps its last checkpoint", code=1):
            result = algorithm.train()
        if result["fault_tolerance"]["num_remote_worker_restarts"] > restarts:
            restarts = int(result["fault_tolerance"]["num_remote_worker_restarts"])
            print(f"an actor died and was started again; {restarts} restarts so far", flush=True)
        if result["num_env_steps_sampled_lifetime"] <= first_step and not stops:
            continue  # the actors are still starting
        step = int(result["num_env_steps_sampled_lifetime"])
        first = first or (step, time.time())
        scalars = scalars_of(result)
        if step > first[0]:
            scalars["charts/SPS"] = (step - first[0]) / (time.time() - first[1])
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
        shown = (f"{tag.split('/')[1]} {scalars[tag]:.3g}" for tag in SHOWN if tag in scalars)
        print(f"step {step}: {', '.join(shown)}", flush=True)
        broken = not_finite(result, algorithm.learner_group.get_weights()["default_policy"])
        rule = f"{' and '.join(broken)} not finite by step {step}; {folder} keeps its last checkpoint."
        require(not broken, rule, 1)
        last = stops or step >= args.total_timesteps
        if last or iteration % args.checkpoint_interval == 0:
            writer.flush()  # before the checkpoint, which must not be ahead of the log
            save(algorithm, folder, step)
        if last:
            break
    writer.close()
    algorithm.stop()
    ray.shutdown()
    if stops:
        print(f"stopped after step {step}; go on with --resume {folder}")
        sys.exit(128 + stops[0])


if __name__ == "__main__":
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed by `2>&-`
    try:
        args = read_args()
        main(args, make_config(args))
    except Failure as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(error.code)
