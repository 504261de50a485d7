"""GIPO on RLlib: its loss is the scripts', APPO's clip is APPO's, it learns, resumes and outlives its actors.

Needs the environment of requirements-rllib.txt, and is skipped elsewhere.
"""
# ruff: noqa: E402 (what follows the skip needs Ray)

import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray", reason="needs the environment of requirements-rllib.txt")

import gymnasium as gym
import numpy as np
import psutil
import torch
from ray.rllib.algorithms.appo.torch.appo_torch_learner import APPOTorchLearner
from ray.rllib.algorithms.impala.torch.vtrace_torch_v2 import make_time_major, vtrace_torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import gipo_rllib

ROOT = Path(__file__).parents[2]
MODULE = "default_policy"


def make_learner(env_id: str, **flags):
    """The flags, their config and a learner in this process."""
    args = gipo_rllib.Args(env_id=env_id, norm_adv=False, **flags)
    config = gipo_rllib.make_config(args)
    learner = config.build_learner(env=gym.make(env_id))
    learner.shutdown()  # ends its thread, which waits for batches by polling: ten of them take a core
    return args, config, learner


def recorded(learner, rows: int = 150) -> dict:
    """A batch (rows,) of actions sampled by the learner's own policy, with drifted log-probabilities."""
    torch.manual_seed(0)
    module = learner.module[MODULE]
    obs = torch.randn(rows, *module.observation_space.shape)
    distribution = module.get_train_action_dist_cls()
    with torch.no_grad():
        policy = distribution.from_logits(module.forward_train({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS])
    actions = policy.sample()
    mask = torch.arange(rows) % 51 != 50
    return {
        Columns.OBS: obs,
        Columns.ACTIONS: actions,
        Columns.ACTION_LOGP: policy.logp(actions) + 0.5 * torch.randn(rows),
        "logp": policy.logp(actions),
        Columns.REWARDS: torch.randn(rows),
        Columns.TERMINATEDS: torch.arange(rows) % 37 == 36,
        Columns.LOSS_MASK: mask,
        "weights_seq_no": torch.arange(rows) // 50,
    }


def gradients(loss, module) -> torch.Tensor:
    module.zero_grad()
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])


def loss_of(learner, config, batch, kind=None):
    fwd_out = learner.module[MODULE].forward_train(batch)
    method = (kind or type(learner)).compute_loss_for_module
    return method(learner, module_id=MODULE, config=config, batch=batch, fwd_out=fwd_out)


@pytest.fixture(scope="module", params=["CartPole-v1", "Pendulum-v1"])
def env_id(request):
    return request.param


@pytest.mark.parametrize("name", ["policy_loss", "diagnostics"])
def test_loss_and_diagnostics_are_the_scripts_to_the_letter(name):
    assert inspect.getsource(getattr(gipo_rllib, name)) in (ROOT / "gipo_continuous.py").read_text()


def test_loss_and_gradients_are_those_of_the_scripts(env_id):
    args, config, learner = make_learner(env_id, sigma=0.4, kl_coef=0.0, vf_coef=0.0)
    batch, module = recorded(learner), learner.module[MODULE].unwrapped()
    found = loss_of(learner, config, batch)
    own = gradients(found, learner.module[MODULE])

    distribution = module.get_train_action_dist_cls()
    policy = distribution.from_logits(module.forward_train(batch)[Columns.ACTION_DIST_INPUTS])
    new = policy.logp(batch[Columns.ACTIONS])

    def rows(tensor):
        return make_time_major(tensor, trajectory_len=50)

    with torch.no_grad():  # the target network is still the policy itself
        values = rows(module.compute_values(batch))
        discounts = 0.99 * rows((~batch[Columns.TERMINATEDS] & batch[Columns.LOSS_MASK]).float())
        last = torch.cat([values[0][1:], values[0][:1]])
        rewards = torch.where(rows(batch[Columns.LOSS_MASK].float()) > 0, rows(batch[Columns.REWARDS]), values)
        targets, _ = vtrace_torch(
            target_action_log_probs=rows(new),
            behaviour_action_log_probs=rows(batch[Columns.ACTION_LOGP]),
            discounts=discounts,
            rewards=rewards,
            values=values,
            bootstrap_values=last,
        )
        advantages = rewards + discounts * torch.cat([targets[1:], last[None]]) - values
    keep = rows(batch[Columns.LOSS_MASK].float()) > 0
    logratio = rows(new - batch[Columns.ACTION_LOGP])
    assert logratio.abs().max() > 1
    expected = gipo_rllib.policy_loss(logratio[keep].unsqueeze(1), advantages[keep].unsqueeze(1), args)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(own, gradients(expected, learner.module[MODULE]), atol=1e-6, rtol=1e-5)
    assert own.abs().max() > 1e-4


def test_clip_is_appo_s_own_loss(env_id):
    _, config, learner = make_learner(env_id, surrogate="clip", clip_coef=0.2, ent_coef=0.02, vf_coef=0.3)
    batch = recorded(learner)
    with torch.no_grad():
        # RLlib has 0 in these rows, and so takes the end of a rollout for a death
        masked = ~batch[Columns.LOSS_MASK]
        for p in learner.module[MODULE].unwrapped().parameters():
            p += 0.05 * torch.randn_like(p)  # policy and target network differ
        batch[Columns.REWARDS][masked] = learner.module[MODULE].unwrapped().compute_values(batch)[masked]
    own, theirs = loss_of(learner, config, batch), loss_of(learner, config, batch, APPOTorchLearner)
    torch.testing.assert_close(own, theirs, atol=1e-6, rtol=1e-5)
    module = learner.module[MODULE]
    torch.testing.assert_close(gradients(own, module), gradients(theirs, module), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("surrogate", ["gipo", "clip"])
def test_the_kl_term_is_minus_the_mean_log_ratio_of_the_samples(surrogate):
    found = {}
    for kl_coef in (0.0, 0.3):
        _, config, learner = make_learner("CartPole-v1", surrogate=surrogate, kl_coef=kl_coef)
        batch = recorded(learner)
        found[kl_coef] = loss_of(learner, config, batch)
    logratio = (batch["logp"] - batch[Columns.ACTION_LOGP])[batch[Columns.LOSS_MASK]]
    assert abs(logratio.mean()) > 0.01
    torch.testing.assert_close(found[0.3] - found[0.0], -0.3 * logratio.mean(), atol=1e-5, rtol=1e-4)


def test_the_kl_term_is_gipo_s_alone_unless_it_is_asked_for():
    kl_coef = {surrogate: gipo_rllib.Args(surrogate=surrogate).kl_coef for surrogate in ("gipo", "clip")}
    assert kl_coef == {"gipo": 0.1, "clip": 0.0}
    assert gipo_rllib.Args(surrogate="clip", kl_coef=0.2).kl_coef == 0.2
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(gipo_rllib.Failure, match="--kl-coef"):
            gipo_rllib.Args(kl_coef=value)


def test_no_width_that_is_allowed_overflows():
    with pytest.raises(gipo_rllib.Failure, match="--sigma 11: give"):
        gipo_rllib.Args(sigma=11)
    logratio = torch.linspace(-200, 200, 401).unsqueeze(1).requires_grad_()  # the coefficient's top is at 100
    loss = gipo_rllib.policy_loss(logratio, torch.ones(401, 1), gipo_rllib.Args(sigma=10))
    loss.backward()
    assert loss.isfinite() and logratio.grad.isfinite().all() and -401 * logratio.grad.min() > 1e21


def resume(monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["gipo_rllib.py", "--resume", str(folder), *map(str, flags)])
    return gipo_rllib.read_args()


def test_what_cannot_be_resumed_is_refused(monkeypatch, tmp_path):
    saved = {name: value for name, value in vars(gipo_rllib.Args()).items() if name not in ("resume", "address")}
    (tmp_path / "args.json").write_text(json.dumps(saved | {"total_timesteps": 500}))
    with pytest.raises(gipo_rllib.Failure, match="folder of a run with a checkpoint"):
        resume(monkeypatch, tmp_path)
    (tmp_path / "checkpoint-500").mkdir()
    for flags in ([], ["--total-timesteps", 400]):
        with pytest.raises(gipo_rllib.Failure, match="has 500 steps already"):
            resume(monkeypatch, tmp_path, *flags)
    assert resume(monkeypatch, tmp_path, "--total-timesteps", 501).kl_coef == 0.1
    (tmp_path / "args.json").write_text(json.dumps(saved | {"sigma_neg": None}))  # a run of the second edition
    assert resume(monkeypatch, tmp_path).sigma == 0.5
    (tmp_path / "args.json").write_text(json.dumps(saved | {"sigma_neg": 0.2}))
    with pytest.raises(gipo_rllib.Failure, match="was run with --sigma-neg"):
        resume(monkeypatch, tmp_path)
    del saved["kl_coef"]  # a run of the first edition
    (tmp_path / "args.json").write_text(json.dumps(saved))
    assert resume(monkeypatch, tmp_path).kl_coef == 0


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("rllib_probes:From5-v0", "count from 0"),
        ("rllib_probes:Bits-v0", "or a flat Box"),
        ("rllib_probes:IntActions-v0", "actions must be of a floating point type, not Box(0, 9, (2,), int64)"),
        ("./my.py:Id", "--env-id ./my.py:Id"),
        (".my:Id", "--env-id .my:Id"),
        ("FrozenLake-v1", "observations must be a flat Box"),
        ("nomodule:X-v0", "nomodule"),
        ("rllib_probes:No-v0", "--env-id rllib_probes:No-v0"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(env_id, words):
    with pytest.raises(gipo_rllib.Failure, match=re.escape(words)):
        gipo_rllib.make_config(gipo_rllib.Args(env_id=env_id))


def test_an_error_in_a_module_of_the_user_s_comes_with_its_line(monkeypatch, tmp_path):
    (tmp_path / "of_a_user.py").write_text("\n\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    sentence = re.escape(f"division by zero (ZeroDivisionError in {tmp_path / 'of_a_user.py'}, line 3).")
    with pytest.raises(gipo_rllib.Failure, match=sentence):
        gipo_rllib.make_config(gipo_rllib.Args(env_id="of_a_user:Mine-v0"))


def test_an_actor_plays_an_environment_with_integer_observations():
    config = gipo_rllib.make_config(gipo_rllib.Args(env_id="rllib_probes:IntObservations-v0"))
    runner = SingleAgentEnvRunner(config=config)
    episode, *_ = runner.sample(num_timesteps=40)
    runner.stop()
    assert len(episode) == 10 and episode.get_observations().dtype == np.float32


@pytest.mark.parametrize(("name", "broken"), [("NanObservation", "observations"), ("NanReward", "rewards")])
def test_what_is_not_finite_is_noted_and_goes_no_further(name, broken):
    envs = gym.vector.SyncVectorEnv([lambda: gipo_rllib.Finite(gym.make(f"rllib_probes:{name}-v0"))])
    envs.reset(seed=1)
    for step in range(40):
        assert bool(envs.get_attr("broken")[0]) == (step >= 27)  # its 25th step, because two were resets
        obs, rewards, *_ = envs.step(envs.action_space.sample())
        assert np.isfinite(obs).all() and np.isfinite(rewards).all()
    logged = {}
    actor = SimpleNamespace(env=envs)
    logger = SimpleNamespace(log_value=lambda name, value, reduce: logged.update({name: value}))
    gipo_rllib.report_broken(actor, logger)
    weights = {"layer": np.ones(2)}
    assert gipo_rllib.not_finite({"env_runners": logged}, weights) == [broken]
    nan = {f"not_finite/{name}": math.nan for name in ("observations", "rewards")}  # RLlib's word for none reported
    assert gipo_rllib.not_finite({"env_runners": nan}, weights) == []
    assert gipo_rllib.not_finite({"env_runners": nan}, {"layer": np.array([1, np.inf])}) == ["weights"]


def test_a_loss_that_is_not_finite_stays_noted(monkeypatch):
    _, config, learner = make_learner("CartPole-v1")
    logged = []
    monkeypatch.setattr(learner.metrics, "log_value", lambda key, value, **_: logged.append((key[-1], float(value))))
    for first_reward in (1.0, math.inf, 1.0):
        batch = recorded(learner)
        batch[Columns.REWARDS][0] = first_reward
        loss_of(learner, config, batch)
    assert [value for key, value in logged if key == "not_finite/losses"] == [0, 1, 1]


def test_a_rollout_that_is_cut_off_is_bootstrapped(monkeypatch):
    _, config, learner = make_learner("CartPole-v1", num_steps=6)
    module, batch, seen = learner.module[MODULE].unwrapped(), recorded(learner, rows=6), []
    batch[Columns.LOSS_MASK] = torch.tensor([True] * 5 + [False])
    batch[Columns.TERMINATEDS] = torch.zeros(6, dtype=torch.bool)
    batch[Columns.REWARDS] = torch.tensor([1.0] * 5 + [0.0])
    batch[Columns.ACTION_LOGP] = batch["logp"]  # on-policy
    monkeypatch.setattr(module, "compute_values", lambda batch, embeddings=None: torch.full((6,), 10.0))
    policy_loss = gipo_rllib.policy_loss
    monkeypatch.setattr(gipo_rllib, "policy_loss", lambda x, adv, args: seen.append(adv) or policy_loss(x, adv, args))
    loss_of(learner, config, batch)
    value, expected = 10.0, []
    for _ in range(5):
        value = 1 + 0.99 * value
        expected.insert(0, value - 10)
    torch.testing.assert_close(seen[0], torch.tensor(expected).unsqueeze(1), atol=1e-4, rtol=0)


def test_age_counts_the_gradient_steps_between(monkeypatch):
    _, config, learner = make_learner("CartPole-v1")
    batch, logged = recorded(learner), {}
    monkeypatch.setattr(learner.metrics, "log_dict", lambda scalars, **_: logged.update(scalars))
    learner._weights_seq_no = 3  # while the third step is taken: two were before it
    loss_of(learner, config, batch)
    assert logged["offpolicy/age_max"] == 2
    age = (2 - batch["weights_seq_no"][batch[Columns.LOSS_MASK]]).float().mean()
    assert logged["offpolicy/age_mean"] == age and logged["offpolicy/ess"] < 1


def test_means_that_are_logged_are_the_newest(monkeypatch):
    _, _, learner = make_learner("CartPole-v1")
    waiting = learner._learner_thread_out_queue
    for number in range(3):
        waiting.put(number)
    monkeypatch.setattr(APPOTorchLearner, "update", lambda self, *_, **__: self._learner_thread_out_queue.get_nowait())
    assert learner.update() == 2


def test_a_second_save_at_the_same_step_keeps_the_first(tmp_path):
    class Algorithm:
        def save_to_path(self, path):
            (Path(path) / "weights").mkdir(parents=True)

    for step in (100, 100, 200):
        gipo_rllib.save(Algorithm(), tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == [gipo_rllib.CHECKPOINT.replace("*", "200")]


TAGS = {
    *("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/kl", "losses/approx_kl", "losses/clipfrac"),
    *("offpolicy/abs_logratio_p95", "offpolicy/ess", "offpolicy/dead_fraction", "offpolicy/coef_mean"),
    *("offpolicy/age_mean", "offpolicy/age_max"),
}


@pytest.mark.parametrize("surrogate", ["gipo", "clip"])
def test_the_log_tells_of_the_loss_s_own_coefficient(surrogate, monkeypatch):
    """It is what a sample's gradient is multiplied with, beside its advantage: here by the published formula."""
    _, config, learner = make_learner("CartPole-v1", surrogate=surrogate, clip_coef=0.3, sigma=0.4)
    batch, module, logged = recorded(learner), learner.module[MODULE].unwrapped(), {}
    with torch.no_grad():
        for p in module.parameters():  # those of the target network, too
            p += 0.1 * torch.randn_like(p)
    monkeypatch.setattr(learner.metrics, "log_dict", lambda scalars, **_: logged.update(scalars))
    adv, clip_loss = [], gipo_rllib.clip_loss
    monkeypatch.setattr(gipo_rllib, "clip_loss", lambda *found: adv.append(found[2]) or clip_loss(*found))
    loss_of(learner, config, batch)
    assert logged.keys() == TAGS

    def logratio(outputs):
        policy = module.get_train_action_dist_cls().from_logits(outputs)
        found = (policy.logp(batch[Columns.ACTIONS]) - batch[Columns.ACTION_LOGP]).detach()
        rows, valid = (make_time_major(part, trajectory_len=50) for part in (found, batch[Columns.LOSS_MASK]))
        return rows[valid]

    x = logratio(module.forward_train(batch)[Columns.ACTION_DIST_INPUTS])
    old = logratio(module.forward_target(batch)[TARGET_NETWORK_ACTION_DIST_INPUTS])
    coef = torch.exp(x - x**2 / (2 * 0.4**2))
    if surrogate == "clip":
        ratio = torch.exp(-old).clamp(max=2) * x.exp()
        inside = torch.where(adv[0] > 0, ratio <= 1.3, ratio >= 0.7)
        coef = ratio * inside * old.exp().clamp(max=1)
        assert 0.05 < (coef == 0).float().mean() < 0.95
    torch.testing.assert_close(logged["offpolicy/coef_mean"], coef.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logged["offpolicy/dead_fraction"], (coef < 1e-3).float().mean(), atol=1e-6, rtol=0)
    ess = coef.sum() ** 2 / (len(coef) * (coef**2).sum())
    torch.testing.assert_close(logged["offpolicy/ess"], ess, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logged["losses/kl"], -x.mean(), atol=1e-6, rtol=1e-4)


def curve(folder: Path) -> list[tuple[int, float]]:
    """(step, value) of the returns in a run's log, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tag = "charts/episodic_return"
    return [(e.step, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


class Killed(BaseException):
    pass


class LateWriter(SummaryWriter):
    """Writes no number before it must; the real one's thread may be as late."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.waiting = []

    def add_scalar(self, *args):
        self.waiting.append(args)

    def flush(self):
        while self.waiting:
            super().add_scalar(*self.waiting.pop(0))
        super().flush()

    def close(self):
        self.flush()
        super().close()


class Algorithm:
    """RLlib's part of a run: 1000 steps an iteration but the first, with this return, until it is killed."""

    def __init__(self, episodic_return=1.0, killed_after=math.inf):
        self.episodic_return, self.killed_after, self.step, self.saved = episodic_return, killed_after, 0, []
        self.learner_group = SimpleNamespace(get_weights=lambda: {MODULE: {}})
        self.starting = True

    def train(self):
        if self.step == self.killed_after:
            raise Killed
        self.step += 0 if self.starting else 1000  # at first its actors are not there yet
        self.starting = False
        tolerance = {"num_remote_worker_restarts": 0, "num_healthy_workers": 2}
        actors = {"episode_return_mean": self.episodic_return}
        return {"env_runners": actors, "fault_tolerance": tolerance, "num_env_steps_sampled_lifetime": self.step}

    def save_to_path(self, path):
        Path(path).mkdir()
        (Path(path) / "step").write_text(str(self.step))
        self.saved.append((self.step, [step for step, _ in curve(Path(path).parent)]))

    def restore_from_path(self, path):
        self.step = int((Path(path) / "step").read_text())

    def stop(self):
        pass


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """The script's main with an algorithm in RLlib's place; returns the run's folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(gipo_rllib, "ray", SimpleNamespace(init=lambda **_: None, shutdown=lambda: None))
    monkeypatch.chdir(tmp_path)

    def run(algorithm, **flags):
        gipo_rllib.main(gipo_rllib.Args(**flags), SimpleNamespace(build_algo=lambda: algorithm))
        return max(Path("runs").iterdir())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_checkpoint_is_never_ahead_of_the_log(run_main, monkeypatch):
    monkeypatch.setattr(gipo_rllib, "SummaryWriter", LateWriter)
    algorithm = Algorithm()
    run_main(algorithm, total_timesteps=4000, checkpoint_interval=2)
    assert algorithm.saved == [(0, []), (1000, [1000]), (3000, [1000, 2000, 3000]), (4000, [1000, 2000, 3000, 4000])]


def test_no_curve_goes_back_after_a_kill(run_main, monkeypatch):
    writers = []

    def remembered(*args, **kwargs):
        writers.append(SummaryWriter(*args, **kwargs))
        return writers[-1]

    monkeypatch.setattr(gipo_rllib, "SummaryWriter", remembered)
    flags = {"total_timesteps": 5000, "checkpoint_interval": 2}
    with pytest.raises(Killed):
        run_main(Algorithm(killed_after=4000), **flags)
    writers[0].close()  # its thread would write the last step, too
    (folder,) = Path("runs").iterdir()
    assert curve(folder) == [(1000, 1), (2000, 1), (3000, 1), (4000, 1)]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3000"]
    run_main(Algorithm(episodic_return=2.0), resume=folder, **flags)
    assert curve(folder) == [(1000, 1), (2000, 1), (3000, 1), (4000, 2), (5000, 2)]


@pytest.mark.parametrize(("variable", "expected"), [(None, [1]), ("2", [])])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "ALE/Pong-v5"])
def test_torch_has_one_thread_unless_the_environment_says_otherwise(run_main, monkeypatch, env_id, variable, expected):
    """Two runs with torch's own number wait for each other."""
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    run_main(Algorithm(), env_id=env_id, total_timesteps=1000)
    assert found == expected


def test_it_runs_on_windows_which_has_no_sighup(run_main, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    assert curve(run_main(Algorithm(), total_timesteps=1000)) == [(1000, 1)]


def start(folder: Path, *flags, program=(ROOT / "gipo_rllib.py",), stderr=subprocess.STDOUT, **settings):
    """The script as a process whose output one can read."""
    command = [sys.executable, *map(str, program), *map(str, flags)]
    # not Ray's niceness of 15, which starves its actors beside other work
    env = os.environ | {"RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT / "tests" / "engines")}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, **settings)


STOPS_SOON = "stops after this iteration; once more ends the program at once\n"


def returns(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"episodic_return (-?[\d.e+]+)", output)]


def test_cartpole_is_learned_though_an_actor_is_killed_and_the_run_resumed(tmp_path):
    flags = ["--iteration-seconds", 2, "--seed", 3]
    process = start(tmp_path, *flags, "--total-timesteps", 40_000)
    lines, killed = [], False
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step") and not killed:
            children = psutil.Process(process.pid).children(recursive=True)
            victim = next(child for child in children if "EnvRunner" in " ".join(child.cmdline()))
            os.kill(victim.pid, signal.SIGKILL)
            killed = True
    assert process.wait() == 0, "".join(lines)
    assert killed and any("an actor died and was started again" in line for line in lines)
    (folder,) = (tmp_path / "runs").iterdir()
    before = int(re.findall(r"step (\d+)", "".join(lines))[-1])

    process = start(tmp_path, "--resume", folder, "--surrogate", "clip")
    assert process.wait() == 2 and "leave the flag out" in process.stdout.read()
    process = start(tmp_path, "--resume", folder, "--total-timesteps", 400_000)
    found = []
    for line in process.stdout:
        found.append(line)
        if max(returns(line), default=0) >= 450:
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    assert max(returns("".join(found))) >= 450, "".join(found)
    assert int(re.search(r"step (\d+)", "".join(found))[1]) >= before
    assert process.returncode == 130 and "go on with --resume" in rest and rest.count(STOPS_SOON) == 1
    assert len(list(folder.glob("checkpoint-*"))) == 1
    steps = [step for step, _ in curve(folder)]
    assert steps == sorted(set(steps)) and steps[0] < before < steps[-1]


def test_a_continuous_task_is_learned(tmp_path):
    flags = ["--env-id", "InvertedPendulum-v5", "--total-timesteps", 200_000, "--iteration-seconds", 2]
    flags += ["--batch-size", 200, "--buffer-reuse", 8, "--reward-scale", 0.1]
    process = start(tmp_path, *flags)
    found = []
    for line in process.stdout:
        found.append(line)
        if max(returns(line), default=0) >= 150:
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=60)
    output = "".join(found)
    assert returns(output)[0] < 30 and max(returns(output)) >= 150, output


HURRIES = """
import builtins, os, runpy, signal, sys

written = builtins.print

def answered(*words, **settings):
    written(*words, **settings)
    if "once more" in str(words):
        os.kill(os.getpid(), signal.SIGINT)

builtins.print = answered
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_second_ctrl_c_ends_the_run_and_its_actors_at_once(tmp_path):
    """Even one that comes as soon as the answer to the first is there."""
    process = start(tmp_path, "--iteration-seconds", 600, program=("-c", HURRIES, ROOT / "gipo_rllib.py"))
    assert "waits for 2 actors" in next(line for line in process.stdout if line.startswith("runs/"))
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in children)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and output == "\n" + STOPS_SOON
    # Ray's two agents, which only watch, take a minute to notice
    _, alive = psutil.wait_procs([child for child in children if not child.name().endswith("Agent")], timeout=30)
    assert not alive
    assert [path.name for path in tmp_path.glob("runs/*/checkpoint-*")] == ["checkpoint-0"]


STOPS = {
    "(losses|weights) not finite": ["--learning-rate", 1e30, "--checkpoint-interval", 1, "--iteration-seconds", 1],
    "error: observations not finite": ["--env-id", "rllib_probes:NanObservation-v0"],
    "simulator lost": ["--env-id", "rllib_probes:Raises-v0"],
}


@pytest.mark.parametrize("words", STOPS)
def test_a_run_that_went_wrong_stops_with_a_sentence_and_keeps_its_checkpoint(words, tmp_path):
    process = start(tmp_path, *STOPS[words], "--total-timesteps", 10**6)
    output, _ = process.communicate(timeout=300)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert process.returncode == 1 and re.search(words, error) and "keeps its last checkpoint" in error, output
    assert len(list(tmp_path.glob("runs/*/checkpoint-*"))) == 1


def test_a_terminal_that_closes_stops_the_run_but_not_under_nohup(tmp_path):
    """Its signal goes to all processes of the terminal, Ray's too; standard error may be closed."""
    flags = ["--iteration-seconds", 1, "--exp-name", "a:b/c d", "--total-timesteps", 3000]

    def obey():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.close(2)

    for preparation, code in ((obey, 129), (ignore, 0)):
        longer = ["--total-timesteps", 10**6] if code else []
        process = start(tmp_path, *flags, *longer, stderr=None, start_new_session=True, preexec_fn=preparation)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("runs/"):
                os.killpg(process.pid, signal.SIGHUP)
        assert process.wait() == code, "".join(lines)
        assert code == 0 or "go on with --resume" in lines[-1]
    assert all(re.fullmatch(r"CartPole-v1__a-b-c-d__1__\d+", path.name) for path in (tmp_path / "runs").iterdir())
    assert len(list(tmp_path.glob("runs/*/checkpoint-*"))) == 2


def test_a_mistake_is_one_sentence(tmp_path):
    cases = {"CartPol": ["--env-id", "CartPol-v1"], "--sigma 0": ["--sigma", 0], "--resume x": ["--resume", "x"]}
    for words, flags in cases.items():
        process = start(tmp_path, *flags)
        output, _ = process.communicate()
        assert process.returncode == 2 and words in output and "Traceback" not in output
    assert not (tmp_path / "runs").exists()
