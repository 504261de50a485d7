"""GIPO on RLlib: its loss is the scripts', APPO's clip is APPO's, it learns, resumes and outlives its actors.

Needs the environment of requirements-rllib.txt, and is skipped elsewhere.
"""
# ruff: noqa: E402 (what follows the skip needs Ray)

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

import gipo_rllib

ROOT = Path(__file__).parents[1]
MODULE = "default_policy"


def make_learner(env_id: str, **flags):
    """The flags, their config and a learner in this process."""
    args = gipo_rllib.Args(env_id=env_id, norm_adv=False, **flags)
    config = gipo_rllib.make_config(args)
    return args, config, config.build_learner(env=gym.make(env_id))


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


def test_loss_and_gradients_are_those_of_the_scripts(env_id):
    args, config, learner = make_learner(env_id, sigma=0.4, sigma_neg=0.2, kl_coef=0.0, vf_coef=0.0)
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
    expected, _ = gipo_rllib.policy_loss(logratio[keep], advantages[keep], args)
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
    for flag in ("sigma", "sigma_neg"):
        with pytest.raises(gipo_rllib.Failure, match=f"--{flag.replace('_', '-')} 11: give"):
            gipo_rllib.Args(**{flag: 11})
    args = gipo_rllib.Args(sigma=10)
    _, coef = gipo_rllib.policy_loss(torch.linspace(-200, 200, 401), torch.ones(401), args)  # its top is at 100
    assert coef.isfinite().all() and coef.max() > 1e21


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
    del saved["kl_coef"]  # a run of the first edition
    (tmp_path / "args.json").write_text(json.dumps(saved))
    assert resume(monkeypatch, tmp_path).kl_coef == 0


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("rllib_probes:From5-v0", "count from 0"),
        ("rllib_probes:Bits-v0", "or a flat Box"),
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
    torch.testing.assert_close(seen[0], torch.tensor(expected), atol=1e-4, rtol=0)


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


def test_clip_s_coefficient_is_what_autograd_finds():
    args = gipo_rllib.Args(surrogate="clip", clip_coef=0.3)
    generator = torch.Generator().manual_seed(1)
    logratio, old, advantages = (torch.randn(200, generator=generator) for _ in range(3))
    logratio.requires_grad_()
    loss, coef = gipo_rllib.clip_loss(logratio, old, advantages * old.exp().clamp(max=1), args)
    loss.backward()
    torch.testing.assert_close(-logratio.grad * 200, coef * advantages, atol=1e-5, rtol=1e-5)
    assert 0.1 < (coef == 0).float().mean() < 0.9


def start(folder: Path, *flags, stderr=subprocess.STDOUT, **settings) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "gipo_rllib.py"), *map(str, flags)]
    # not Ray's niceness of 15, which starves its actors beside other work
    env = os.environ | {"RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, **settings)


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
    assert process.returncode == 130 and "go on with --resume" in rest
    assert len(list(folder.glob("checkpoint-*"))) == 1


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

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.close(2)

    for preparation, code in ((None, 129), (ignore, 0)):
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
