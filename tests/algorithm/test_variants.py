"""The methods that GIPO is compared with: the baseline with one change each, which its flags and checkpoints know."""

import inspect
import re
import runpy
import sys

import pytest
import torch
from harness import DOMAIN_OF, ROOT, flags, load, load_variant, run, scalars, watch

from benchmark import variants
from benchmark.variants import FLAGS, PATCHES, VARIANTS

SMALL = "--env-id Hopper-v5 --num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 2".split()
TINY = {
    "atari": "--env-id probes:Frames-v0 --num-envs 2 --num-steps 8 --total-timesteps 32 --learning-rate 3e-3".split(),
    "continuous": "--env-id Hopper-v5 --num-envs 4 --num-steps 32 --total-timesteps 256 --learning-rate 0.03".split(),
    "minigrid": "--num-envs 2 --num-steps 16 --total-timesteps 64 --learning-rate 0.03".split(),
}


def refused(module, monkeypatch, folder, argv, capsys) -> str:
    """The one sentence with which a script refuses to start."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(module, monkeypatch, folder, argv)
    assert stopped.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: .*\.", sentence), sentence
    return sentence


@pytest.mark.parametrize("script", ["ppo_baseline", "gipo_continuous"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_the_loss_and_the_flags_alone(name, script):
    plain, module = load(script), load_variant(name, script)
    own = {key for key, value in vars(module).items() if getattr(value, "__module__", "") == "benchmark.variants"}
    assert own == {"minibatch_loss" if name in PATCHES else "policy_loss", "replace"}  # which guards a resume
    texts = [
        {key: inspect.getsource(value) for key, value in vars(m).items() if inspect.isfunction(value)}
        for m in (plain, module)
    ]
    assert {key for key in texts[0] | texts[1] if texts[0].get(key) != texts[1].get(key)} == own
    assert [*module.DOMAINS.values()] == [
        (vars(module)[e.__name__], vars(module)[a.__name__]) for e, a in plain.DOMAINS.values()
    ]
    for domain in range(len(plain.DOMAINS)):
        before, after = vars(flags(plain, domain)), vars(flags(module, domain))
        assert before == {key: after[key] for key in before} | {"exp_name": script}
        assert after.keys() - before.keys() == {f"variant_{name.replace('-', '_')}", *VARIANTS[name][1:]}


def watch_first_gradient(monkeypatch):
    """What the optimizer gets, step by step."""
    note = lambda self, *_: torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]])  # noqa: E731
    return watch(monkeypatch, torch.optim.Adam, "step", note)


@pytest.mark.slow
@pytest.mark.parametrize(("gipo", "domain"), DOMAIN_OF.items())
def test_first_gradient_is_ppo_s(gipo, domain, monkeypatch, tmp_path):
    """And each method runs on, with its divergence from the data in the log."""
    modules = {"gipo": (load(gipo), []), "clip": (load("ppo_baseline"), [domain])}
    modules |= {name: (load_variant(name), [domain]) for name in VARIANTS}
    first, last = {}, {}
    for name, (module, argv) in modules.items():
        argv += [*TINY[domain], "--num-minibatches", 2, "--update-epochs", 1, "--buffer-epochs", 2]
        argv += ["--kl-coef", 0.1]
        with monkeypatch.context() as patch:
            gradients = watch_first_gradient(patch)
            divergences = watch(patch, module, "diagnostics", lambda logratio, coef: -logratio.mean().item())
            end = run(module, patch, tmp_path / name, argv)
        assert end.iteration == 1 and len(gradients) == 4
        logged = scalars(tmp_path / name)
        assert [kl for _, kl in logged["losses/kl"]] == pytest.approx(divergences)
        assert (tmp_path / name / end.folder / "checkpoint.pt").exists()
        first[name], last[name] = gradients[0], gradients[-1]
    assert first["clip"].norm() > 0.01
    for name, gradient in first.items():
        assert (gradient - first["clip"]).norm() < 1e-6 * max(1.0, gradient.norm()), name
        assert name in ("clip", "dual-clip") or not torch.equal(last[name], last["clip"]), name


@pytest.mark.parametrize("name", ["sapo", "decoupled"])
def test_a_variant_resumes_as_itself_alone(name, monkeypatch, tmp_path, capsys):
    argv = ["continuous", *SMALL, "--total-timesteps", 128]
    end = run(load_variant(name), monkeypatch, tmp_path, argv)
    goes_on = ["continuous", "--resume", tmp_path / end.folder, "--total-timesteps", 192]
    for module in (load_variant("tis"), load("ppo_baseline")):
        assert str(end.folder) in refused(module, monkeypatch, tmp_path, goes_on, capsys)
    refused(load("gipo_continuous"), monkeypatch, tmp_path, goes_on[1:], capsys)
    assert run(load_variant(name), monkeypatch, tmp_path, goes_on).iteration == 2
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize("name", ["none", "decoupled"])
def test_a_variant_refuses_a_run_of_the_baseline(name, monkeypatch, tmp_path, capsys):
    end = run(load("ppo_baseline"), monkeypatch, tmp_path, ["continuous", *SMALL, "--total-timesteps", 128])
    goes_on = ["continuous", "--resume", tmp_path / end.folder, "--total-timesteps", 192]
    assert str(end.folder) in refused(load_variant(name), monkeypatch, tmp_path, goes_on, capsys)


@pytest.mark.parametrize("name", VARIANTS)
def test_help_names_the_flags_of_a_variant(name, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(load_variant(name), monkeypatch, tmp_path, ["continuous", "--help"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert f"ppo_baseline-{name}" in text and "--variant" not in text
    for flag, (default, _, _, meaning) in FLAGS.items():
        assert (f"--{flag.replace('_', '-')} FLOAT" in text) == (flag in VARIANTS[name]), flag
        assert flag not in VARIANTS[name] or f"{meaning} (default: {default})" in text, flag


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name, (_, *own) in VARIANTS.items() for flag in own])
def test_bad_values_are_refused(name, flag, monkeypatch, tmp_path, capsys):
    _, low, high, _ = FLAGS[flag]
    module, option = load_variant(name), f"--{flag.replace('_', '-')}"
    for value in (0.0, -1.0, low * 0.9, high * 2, float("inf"), float("nan")):
        argv = ["continuous", *SMALL, "--total-timesteps", 64, option, value]
        assert refused(module, monkeypatch, tmp_path, argv, capsys).startswith(f"error: {option} {value}: ")
    assert not list(tmp_path.iterdir())


def start(monkeypatch, *argv):
    """Runs benchmark/variants.py as from the command line."""
    monkeypatch.setattr(sys, "argv", ["variants.py", *argv])
    runpy.run_path(str(ROOT / "benchmark/variants.py"), run_name="__main__")


@pytest.mark.parametrize("argv", [[], ["sapo"], ["sapo", "--help"], ["gipo", "ppo_baseline.py", "continuous"]])
def test_the_variants_are_named_when_there_is_no_such_one(argv, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        start(monkeypatch, *argv)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert all(name in sentence for name in VARIANTS)


def test_a_variant_runs_from_the_command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, *"--tis-cap 2 --total-timesteps 64 --eval-episodes 0".split()]
    start(monkeypatch, "tis", "ppo_baseline.py", "continuous", *flags)
    (folder,) = (tmp_path / "runs").iterdir()
    args = torch.load(folder / "checkpoint.pt")["args"]
    assert args["variant_tis"] and args["tis_cap"] == 2 and args["exp_name"] == "ppo_baseline-tis"


def test_decoupled_coefficient_is_the_weight_times_the_clip_s():
    module = load_variant("decoupled")
    args = flags(module, 1, norm_adv=False, tis_cap=2.0)
    # log-probabilities under mu, the proximal policy and the learner
    mu = torch.tensor([0.0, 0.0, 0.0, 0.0])
    proximal = torch.tensor([0.5, 3.0, -1.0, 0.5]).log()
    new = torch.tensor([0.55, 3.3, -0.9, 0.75]).log()
    proximal[2], new[2] = -50.0, -50.1
    new.requires_grad_()

    class Agent:
        def __init__(self, logprobs):
            self.logprobs = logprobs

        def get_action_and_value(self, obs, actions):
            return actions, self.logprobs, torch.zeros(4), torch.zeros(4)

    module.actors, module.iteration = [Agent(mu + 9), Agent(mu + 9), Agent(proximal)], 5
    loss, _, logratio, coef = module.minibatch_loss(Agent(new), None, None, mu, torch.ones(4), torch.zeros(4), args)
    # inside the clip; weight at the cap of 2; far from mu; outside the clip
    expected = torch.tensor([0.5 * 1.1, 2 * 1.1, torch.tensor(-50.1).exp().item(), 0.0])
    torch.testing.assert_close(coef, expected)
    torch.testing.assert_close(logratio, (new - mu).detach())
    loss.backward()
    torch.testing.assert_close(new.grad, -expected / 4)


@pytest.mark.parametrize(("epochs", "lag"), [(1, 0), (3, 0), (2, 2)])
def test_the_proximal_policy_is_the_one_that_an_update_starts_from(epochs, lag, monkeypatch, tmp_path):
    script = load("ppo_baseline")
    to_proximal = watch(monkeypatch, script, "policy_loss", lambda logratio, *_: logratio.abs().max().item())
    monkeypatch.setattr(variants, "load", lambda name: script)
    module = load_variant("decoupled")
    distance = lambda agent, obs, actions, logprobs, *_: (  # noqa: E731
        (agent.get_action_and_value(obs, actions)[1] - logprobs).abs().max().item()
    )
    to_mu = watch(monkeypatch, module, "minibatch_loss", distance)
    argv = ["continuous", *SMALL, "--total-timesteps", 6 * 64, "--buffer-epochs", epochs, "--policy-lag", lag]
    end = run(module, monkeypatch, tmp_path, argv)
    assert (end.buffer.versions >= 0).sum() == epochs
    assert max(to_proximal[::4]) < 1e-5 and min(to_proximal[1::4]) > 1e-4
    assert epochs == 1 or min(to_mu[8::4]) > 1e-3
