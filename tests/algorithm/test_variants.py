"""The methods that GIPO is compared with: their coefficients against the published formulas, and runs of each."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import ROOT, run, scalars

import gipo_continuous
import ppo_baseline
from benchmark import methods, variants
from benchmark.variants import LOSSES, Variant

GRID = np.array([-100, -20.5, *np.linspace(-5, 5, 201), 19.5])
TINY = "--env-id Hopper-v5 --num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 2 --buffer-epochs 2".split()


def sech2(x):
    return 1 / np.cosh(np.clip(x, -300, 300)) ** 2


def unclipped(r, sign, eps=0.2):
    return r * (r <= 1 + eps if sign > 0 else r >= 1 - eps)


# flags, and the coefficient c(x, r, sign of A) of a sample's gradient c A grad log pi
FORMULAS = {
    "gipo": ({"sigma": 0.7}, lambda x, r, sign: np.exp(x - x**2 / (2 * 0.7**2))),
    "asymmetric": (
        {"sigma": 0.7, "sigma_neg": 0.3},
        lambda x, r, sign: np.exp(x - x**2 / (2 * (0.7 if sign > 0 else 0.3) ** 2)),
    ),
    "one_sided": ({"sigma": 0.7}, lambda x, r, sign: np.exp(x - np.maximum(x, 0) ** 2 / (2 * 0.7**2))),
    "clip": ({}, lambda x, r, sign: unclipped(r, sign)),
    "dual_clip": ({"dual_clip": 3.0}, lambda x, r, sign: unclipped(r, sign) * ((r <= 3) | (sign > 0))),
    "sapo": (
        {"sapo_tau": 1.4, "sapo_tau_neg": 1.7},
        lambda x, r, sign: r * sech2((1.4 if sign > 0 else 1.7) * (r - 1) / 2),
    ),
    "spo": ({"spo_eps": 0.3}, lambda x, r, sign: r * (1 - sign * (r - 1) / 0.3)),
    "tis": ({"tis_cap": 2.0}, lambda x, r, sign: np.minimum(r, 2)),
    "plain_is": ({}, lambda x, r, sign: r),
}


@pytest.fixture
def fresh(monkeypatch):
    """ppo_baseline.py and the drifts are as before when a test ends."""
    for name in ("policy_loss", "update", "diagnostics", "Domain"):
        monkeypatch.setattr(ppo_baseline, name, getattr(ppo_baseline, name))
    monkeypatch.setattr(variants, "DRIFTS", [])


def gradient(method, logratio, advantages, **flags):
    """c of each entry of logratio (B, D), by autograd; advantages are (B, 1)."""
    logratio = torch.tensor(logratio).requires_grad_()
    loss = LOSSES[method](logratio, advantages, Variant(**flags))
    (found,) = torch.autograd.grad(loss, logratio)
    return (-found * len(logratio) / advantages).numpy(), loss


def test_every_method_has_its_formula_here():
    assert LOSSES.keys() == FORMULAS.keys() | {"decoupled"}


@pytest.mark.parametrize("advantage", [1.7, -0.3])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("method", FORMULAS)
def test_coefficients_are_the_published_formulas(method, columns, advantage):
    flags, formula = FORMULAS[method]
    x = GRID[: len(GRID) // columns * columns].reshape(-1, columns)
    found, _ = gradient(method, x, torch.full((len(x), 1), advantage, dtype=torch.float64), **flags)
    np.testing.assert_allclose(found, formula(x, np.exp(x), np.sign(advantage)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", LOSSES)
def test_extreme_ratios_are_finite_and_on_policy_all_agree(method, dtype, monkeypatch):
    x = np.array([[0.0, 0.0], [100.0, -100.0], [-300.0, 300.0]], dtype)
    monkeypatch.setattr(variants, "DRIFTS", [torch.tensor(x / 2)])
    for sign in (1.0, -1.0):
        found, loss = gradient(method, x, torch.full((3, 1), sign, dtype=torch.tensor(x).dtype))
        assert loss.isfinite() and np.isfinite(found).all()
        assert found[0].tolist() == pytest.approx([1, 1])  # T4


def test_sapo_s_gate_is_a_gaussian_near_1():
    """Of width sqrt(2) / tau: both coefficients agree to second order."""
    x = np.linspace(-0.02, 0.02, 5).reshape(-1, 1)
    for tau, sigma in ((1, 1.41421), (1.05, 1.34687), (2, 0.70711)):
        ones = torch.ones(5, 1, dtype=torch.float64)
        sapo, _ = gradient("sapo", x, ones, sapo_tau=tau)
        gipo, _ = gradient("gipo", x, ones, sigma=sigma)
        np.testing.assert_allclose(sapo, gipo, atol=2e-5)
        assert np.abs(sapo / np.exp(x) - 1).max() > 4e-5


def test_a_narrow_width_bounds_negative_advantages():
    x = np.linspace(-3, 3, 6001).reshape(-1, 1)
    found, _ = gradient("asymmetric", x, -torch.ones(6001, 1, dtype=torch.float64), sigma=2.0, sigma_neg=0.5)
    assert found.max().item() == pytest.approx(1.133148, abs=1e-6)


@pytest.mark.parametrize("columns", [1, 3])
def test_decoupled_is_the_clip_around_pi_start_times_a_capped_weight(columns, monkeypatch):
    rng = np.random.default_rng(1)
    x, drift = rng.normal(0, 1, (200, columns)), rng.normal(0, 1, (200, columns))
    r, weight = np.exp(x - drift), np.minimum(np.exp(drift), 1.5)
    sign = np.sign(rng.normal(size=(200, 1)))
    monkeypatch.setattr(variants, "DRIFTS", [torch.zeros(3, columns), torch.tensor(drift)])
    found, _ = gradient("decoupled", x, torch.tensor(2 * sign), tis_cap=1.5)
    expected = np.where(sign > 0, weight * unclipped(r, 1), weight * unclipped(r, -1))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # the diagnostics see all minibatches of an iteration at once
    monkeypatch.setattr(variants, "DRIFTS", list(torch.tensor(drift).split(50)))
    np.testing.assert_allclose(gradient("decoupled", x, torch.tensor(2 * sign), tis_cap=1.5)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("ratio", ["action", "dimension"])
@pytest.mark.parametrize("method", LOSSES)
def test_every_method_trains(method, ratio, fresh, monkeypatch, tmp_path):
    argv = [*TINY, "--ratio", ratio, "--method", method, "--total-timesteps", 64]
    assert run(variants, monkeypatch, tmp_path, argv) is None
    coef = [value for _, value in scalars(tmp_path)["offpolicy/coef_mean"]]
    assert coef == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize("method", ["sapo", "decoupled"])
def test_a_method_resumes_as_itself(method, fresh, monkeypatch, tmp_path, capsys):
    """And no other script continues it."""
    argv = [*TINY, "--method", method, "--total-timesteps", 64]
    assert run(variants, monkeypatch, tmp_path, argv) is None
    (folder,) = (tmp_path / "runs").iterdir()
    assert run(variants, monkeypatch, tmp_path, ["--resume", folder, "--total-timesteps", 96]) is None
    saved = torch.load(folder / "checkpoint.pt")
    assert saved["iteration"] == 3 and saved["args"]["method"] == method
    assert [step for step, _ in scalars(tmp_path)["losses/kl"]] == [32, 64, 96]
    monkeypatch.setattr(ppo_baseline, "Domain", ppo_baseline.Continuous)
    assert run(ppo_baseline, monkeypatch, tmp_path, ["--resume", folder, "--total-timesteps", 128]) == 2
    assert "is a run of" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--sapo-tau", "--tis-cap", "--sigma-neg"])
def test_a_flag_of_a_method_is_checked(flag, fresh, monkeypatch, tmp_path, capsys):
    assert run(variants, monkeypatch, tmp_path, [*TINY, flag, 0]) == 2
    assert f"{flag} 0.0: give a number above 0." in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_decoupled_weighs_by_the_policy_that_an_iteration_starts_from(fresh, monkeypatch, tmp_path):
    """Its clip sees a ratio of 1 in the first of four minibatches, and its weight sees the age of the data."""
    seen = []
    clip = variants.OWN_LOSS

    def watched(logratio, advantages, args):
        if len(logratio) == 16:  # not the diagnostics
            seen.append((logratio.abs().max().item(), variants.DRIFTS[-1].abs().max().item()))
        return clip(logratio, advantages, args)

    monkeypatch.setattr(variants, "OWN_LOSS", watched)
    argv = [*TINY, "--method", "decoupled", "--total-timesteps", 96, "--learning-rate", 0.01]
    assert run(variants, monkeypatch, tmp_path, argv) is None
    to_start, drift = np.array(seen).reshape(3, 4, 2).transpose(2, 0, 1)
    assert (to_start[:, 0] < 1e-5).all() and (to_start[:, 1:] > 1e-4).all()
    assert drift[0].max() < 1e-5 and drift[1:].max(1).min() > 1e-3
    assert not variants.DRIFTS


def test_gipo_and_clip_are_the_scripts(fresh, monkeypatch, tmp_path):
    """A seeded run of each ends with the same weights."""
    argv = [*TINY, "--total-timesteps", 64, "--kl-coef", 0.1, "--ratio", "dimension"]
    flags = {"gipo": [*argv, "--sigma", 0.7], "clip": [*argv, "--clip-coef", 0.3]}
    starts = {"gipo": (gipo_continuous, flags["gipo"]), "clip": (ppo_baseline, ["continuous", *flags["clip"]])}
    starts |= {f"{method} again": (variants, [*words, "--method", method]) for method, words in flags.items()}
    found = {}
    for name, (script, words) in starts.items():
        assert run(script, monkeypatch, tmp_path / name, words) is None
        (path,) = (tmp_path / name).glob("runs/*/checkpoint.pt")
        found[name] = torch.load(path)["agent"]
    for method in ("gipo", "clip"):
        torch.testing.assert_close(found[method], found[f"{method} again"], rtol=0, atol=0)
    assert not torch.equal(found["gipo"]["actor_logstd"], found["clip"]["actor_logstd"])


def from_the_shell(script, *arguments, folder=ROOT):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_line():
    text = from_the_shell("benchmark/variants.py", "--help").stdout
    flat = re.sub(r"[\s│]+", " ", text)
    assert all(method in flat for method in LOSSES)
    assert "--sapo-tau FLOAT sapo: temperature of the gate" in flat and "(default: 1.0)" in flat
    wrong = from_the_shell("benchmark/variants.py", "--learning-rate", "-1")
    assert wrong.returncode == 2 and wrong.stderr.strip() == "error: --learning-rate -1.0: give a number above 0."
    assert from_the_shell("benchmark/variants.py", "--method", "none").returncode == 2


@pytest.mark.slow
def test_a_new_method_is_one_function_its_name_and_a_flag(tmp_path):
    """And nothing else has to change for its runs, and for its lines in figures."""
    text = (ROOT / "benchmark" / "variants.py").read_text()
    loss = "def mine(logratio, advantages, args):\n    return -(args.half * logratio * advantages).sum(1).mean()\n\n\n"
    text = text.replace("METHODS = (gipo,", loss + "METHODS = (mine, gipo,")
    line = '    method: Literal[*LOSSES] = "gipo"'
    text = text.replace(line, f"    half: float = 0.5\n{line}")
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "variants.py").write_text(text)
    one = methods.run("mine", "Hopper-v5", 1, half=0.25, num_steps=16, num_minibatches=2, total_timesteps=128)
    assert one.command.startswith("python benchmark/variants.py --method mine --env-id Hopper-v5 --seed 1 --half 0.25")
    assert one.line == methods.name("mine") == "mine" and len(methods.style("mine")) == 3
    result = from_the_shell(*one.script.split(), *one.arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert scalars(tmp_path)["offpolicy/coef_mean"][0][1] == pytest.approx(0.25)
