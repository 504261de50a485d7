"""GIPO on RLlib: its loss is the scripts', APPO's clip is APPO's, it learns, resumes and outlives its actors.

Needs the environment of requirements-rllib.txt, and is skipped elsewhere.
"""
# ruff: noqa: E402 (what follows the skip needs Ray)

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="needs the environment of requirements-rllib.txt")

import gymnasium as gym
import psutil
import torch
from ray.rllib.algorithms.appo.torch.appo_torch_learner import APPOTorchLearner
from ray.rllib.algorithms.impala.torch.vtrace_torch_v2 import make_time_major, vtrace_torch
from ray.rllib.core.columns import Columns

import gipo_rllib

ROOT = Path(__file__).parents[1]
MODULE = "default_policy"


def scripts_policy_loss(name: str):
    """The function as a script ships it, without the script's imports."""
    body = ast.parse((ROOT / f"{name}.py").read_text()).body
    (node,) = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == "policy_loss")
    space = {"torch": torch, "Args": object}
    exec(compile(ast.Module([node], []), name, "exec"), space)
    return space["policy_loss"]


def make_learner(env_id: str, **flags):
    """A learner in this process, whose policy has moved on since `batch` and whose target network has not."""
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
    args, config, learner = make_learner(env_id, sigma=0.4, sigma_neg=0.2, vf_coef=0.0)
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
        log_rhos = rows(new - batch[Columns.ACTION_LOGP])
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
    assert log_rhos.abs().max() > 1
    keep = rows(batch[Columns.LOSS_MASK].float()) > 0
    logratio = rows(new - batch[Columns.ACTION_LOGP])
    expected, _ = scripts_policy_loss("gipo_continuous")(logratio[keep], advantages[keep], args)
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


def start(folder: Path, *flags) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "gipo_rllib.py"), *map(str, flags)]
    env = os.environ | {"RAY_worker_niceness": "0"}  # not Ray's 15, which starves its actors beside other work
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    flags = ["--learning-rate", 1e30, "--checkpoint-interval", 1, "--iteration-seconds", 1]
    process = start(tmp_path, *flags)
    output, _ = process.communicate()
    assert process.returncode == 1 and "weight not finite" in output, output


def test_a_mistake_is_one_sentence(tmp_path):
    cases = {"CartPol": ["--env-id", "CartPol-v1"], "--sigma 0": ["--sigma", 0], "--resume x": ["--resume", "x"]}
    cases |= {"flat Box": ["--env-id", "FrozenLake-v1"], "nomodule": ["--env-id", "nomodule:X-v0"]}
    for words, flags in cases.items():
        process = start(tmp_path, *flags)
        output, _ = process.communicate()
        assert process.returncode == 2 and words in output and "Traceback" not in output
    assert not (tmp_path / "runs").exists()
