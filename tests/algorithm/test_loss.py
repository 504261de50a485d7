"""policy_loss of every script against the formulas, through autograd (T numbers name identities of GIPO)."""

import math

import pytest
import torch
from harness import GIPO, load
from hypothesis import given
from hypothesis import strategies as st

MODULES = {name: load(name) for name in [*GIPO, "ppo_baseline"]}
gipo = MODULES["gipo_continuous"]
baseline = MODULES["ppo_baseline"]
SURROGATES = ["clip", "dual-clip", "none", "sapo", "tis", "spo"]


def gipo_args(**kwargs):
    return gipo.ContinuousArgs(**kwargs)


def baseline_args(surrogate, **kwargs):
    return baseline.ContinuousArgs(surrogate=surrogate, **kwargs)


def coefficients(module, logratio, advantages, args):
    """Gradient coefficient of each sample by autograd, and the one that policy_loss reports."""
    logratio = torch.as_tensor(logratio, dtype=torch.float64).clone().requires_grad_()
    advantages = torch.as_tensor(advantages, dtype=torch.float64).expand_as(logratio)
    loss, coef = module.policy_loss(logratio, advantages, args)
    loss.backward()
    assert not coef.requires_grad
    return -logratio.grad * len(logratio) / advantages, coef


def u(x, sigma):
    return torch.exp(x - x**2 / (2 * sigma**2))


X = torch.linspace(-5, 5, 2001, dtype=torch.float64)


def test_the_three_gipo_scripts_share_one_loss():
    for name in GIPO:
        loss, coef = MODULES[name].policy_loss(X, torch.sin(7 * X), gipo_args())
        expected, expected_coef = gipo.policy_loss(X, torch.sin(7 * X), gipo_args())
        assert torch.equal(loss, expected) and torch.equal(coef, expected_coef)


@pytest.mark.parametrize("advantage", [1.7, -0.3])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_gipo_coefficient_is_the_formula(sigma, advantage):
    gradient, coef = coefficients(gipo, X, advantage, gipo_args(sigma=sigma))
    torch.testing.assert_close(coef, u(X, sigma))
    torch.testing.assert_close(gradient, coef)


@pytest.mark.parametrize(
    ("sigma", "bound"), [(0.1, 1.005013), (0.2, 1.020201), (0.5, 1.133148), (1, 1.648721), (2, 7.389056)]
)
def test_t1_the_largest_coefficient(sigma, bound):
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    gradient, _ = coefficients(gipo, x, 1.0, gipo_args(sigma=sigma))
    assert gradient.max().item() == pytest.approx(bound, abs=1e-6)
    assert x[gradient.argmax()].item() == pytest.approx(sigma**2, abs=1e-3)


@given(sigma=st.floats(0.1, 3), t=st.floats(-5, 5))
def test_t2_symmetric_about_sigma_squared(sigma, t):
    x = [sigma**2 + t, sigma**2 - t, 0.0, 2 * sigma**2]
    gradient, _ = coefficients(gipo, x, 1.0, gipo_args(sigma=sigma))
    assert gradient[0].item() == pytest.approx(gradient[1].item(), rel=1e-9, abs=1e-300)
    assert gradient[2:].tolist() == pytest.approx([1, 1])


def test_t2_amplifies_between_zero_and_two_sigma_squared_only():
    gradient, _ = coefficients(gipo, X, 1.0, gipo_args(sigma=1.0))
    between = (X > 1e-9) & (X < 2 - 1e-9)
    assert (gradient[between] > 1).all() and (gradient[(X < -1e-9) | (X > 2 + 1e-9)] < 1).all()


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0])
def test_t5_no_gradient_flows_through_the_weight(sigma):
    gradient, _ = coefficients(gipo, [sigma**2], 1.0, gipo_args(sigma=sigma))
    assert gradient.item() == pytest.approx(math.exp(sigma**2 / 2))  # it would be 0 if it did


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_t6_all_gradients_coincide_on_policy(advantage):
    found = [coefficients(gipo, [0.0], advantage, gipo_args())]
    found += [coefficients(baseline, [0.0], advantage, baseline_args(s)) for s in SURROGATES]
    assert [g.item() for g, _ in found] == pytest.approx([1.0] * 7)
    assert [c.item() for _, c in found] == pytest.approx([1.0] * 7)


@given(sigma=st.floats(0.1, 3), x=st.floats(0, 5))
def test_t7_the_weight_is_symmetric_in_log_space(sigma, x):
    _, coef = coefficients(gipo, [x, -x], 1.0, gipo_args(sigma=sigma))
    weight = coef * torch.exp(torch.tensor([-x, x], dtype=torch.float64))
    assert weight[0].item() == pytest.approx(weight[1].item(), rel=1e-9, abs=1e-300)


@given(x=st.floats(-5, 5), advantage=st.sampled_from([1.0, -1.0]))
def test_t9_limits(x, advantage):
    wide, _ = coefficients(gipo, [x], advantage, gipo_args(sigma=1e6))
    plain, _ = coefficients(baseline, [x], advantage, baseline_args("none"))
    assert wide.item() == pytest.approx(plain.item())
    narrow, _ = coefficients(gipo, [x], advantage, gipo_args(sigma=1e-3))
    assert abs(x) < 0.1 or narrow.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sigma_neg", [0.2, 1.0])
def test_t10_the_sign_of_the_advantage_picks_the_width(sigma_neg):
    args = gipo_args(sigma=0.5, sigma_neg=sigma_neg)
    positive, _ = coefficients(gipo, X, 2.0, args)
    negative, _ = coefficients(gipo, X, -2.0, args)
    torch.testing.assert_close(positive, u(X, 0.5))
    torch.testing.assert_close(negative, u(X, sigma_neg))
    assert negative.max().item() == pytest.approx(math.exp(sigma_neg**2 / 2), abs=1e-5)
    _, at_zero = gipo.policy_loss(X, torch.zeros_like(X), args)
    torch.testing.assert_close(at_zero, u(X, sigma_neg))


def test_sigma_neg_is_sigma_unless_given():
    assert gipo_args(sigma=0.7).sigma_neg == 0.7
    assert gipo_args(sigma=0.7, sigma_neg=0.2).sigma_neg == 0.2


def expected_coefficient(surrogate, x, positive):
    """The published gradient coefficients at their published constants, in plain floats."""
    r = math.exp(x)
    if surrogate == "clip":
        return r * (r <= 1.2 if positive else r >= 0.8)
    if surrogate == "dual-clip":
        return r * (r <= 1.2 if positive else 0.8 <= r <= 3)
    if surrogate == "none":
        return r
    if surrogate == "sapo":
        return r / math.cosh((1.0 if positive else 1.05) * (r - 1) / 2) ** 2
    if surrogate == "tis":
        return min(r, 1.0)
    return r * (1 - (r - 1) / 0.2) if positive else r * (1 + (r - 1) / 0.2)


@pytest.mark.parametrize("advantage", [0.8, -1.3])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_baseline_coefficients_are_the_formulas(surrogate, advantage):
    gradient, coef = coefficients(baseline, X, advantage, baseline_args(surrogate))
    expected = torch.tensor([expected_coefficient(surrogate, x, advantage > 0) for x in X.tolist()], dtype=X.dtype)
    torch.testing.assert_close(coef, expected)
    torch.testing.assert_close(gradient, expected)


def test_baseline_constants_are_read():
    changes = {
        "clip": {"clip_coef": 0.5},
        "dual-clip": {"dual_clip": 1.5},
        "sapo": {"sapo_tau": 2.0},
        "tis": {"tis_cap": 3.0},
        "spo": {"spo_eps": 0.4},
    }
    advantages = torch.where(torch.arange(len(X)) % 2 == 0, 1.0, -1.0)
    for surrogate, change in changes.items():
        _, default = baseline.policy_loss(X, advantages, baseline_args(surrogate))
        _, changed = baseline.policy_loss(X, advantages, baseline_args(surrogate, **change))
        assert not torch.equal(default, changed), surrogate
    _, default = baseline.policy_loss(X, advantages, baseline_args("sapo"))
    _, changed = baseline.policy_loss(X, advantages, baseline_args("sapo", sapo_tau_neg=2.0))
    assert torch.equal(default[::2], changed[::2]) and not torch.equal(default[1::2], changed[1::2])


def test_clip_value_is_ppo_s():
    logratio, advantages = torch.tensor([0.5, 0.5, -0.5, -0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, _ = baseline.policy_loss(logratio, advantages, baseline_args("clip"))
    ratio = logratio.exp()
    expected = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["gipo", *SURROGATES])
@given(
    x=st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    advantage=st.floats(-10, 10),
    sigma=st.floats(0.05, 5),
)
def test_finite_at_extreme_ratios(method, dtype, x, advantage, sigma):
    logratio = torch.tensor([*x, 100.0, -100.0, 0.0], dtype=dtype, requires_grad=True)
    advantages = torch.full_like(logratio, advantage)
    if method == "gipo":
        loss, coef = gipo.policy_loss(logratio, advantages, gipo_args(sigma=sigma))
    else:
        loss, coef = baseline.policy_loss(logratio, advantages, baseline_args(method))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(coef).all() and torch.isfinite(logratio.grad).all()
    diagnostics = baseline.diagnostics(logratio.detach().float(), coef.float())
    assert all(torch.isfinite(value) for value in diagnostics.values()), diagnostics


def test_diagnostics():
    logratio = torch.tensor([0.0, math.log(1.1), math.log(1.3), math.log(0.7)])
    found = baseline.diagnostics(logratio, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    ratio = logratio.exp()
    assert found["losses/approx_kl"].item() == pytest.approx((ratio - 1 - logratio).mean().item())
    assert found["losses/clipfrac"].item() == pytest.approx(0.5)
    assert found["offpolicy/ess"].item() == pytest.approx(0.75)
    assert found["offpolicy/dead_fraction"].item() == pytest.approx(0.25)
    assert found["offpolicy/coef_mean"].item() == pytest.approx(0.75)
    expected = torch.quantile(logratio.abs(), 0.95).item()
    assert found["offpolicy/abs_logratio_p95"].item() == pytest.approx(expected)
    assert baseline.diagnostics(logratio, torch.zeros(4))["offpolicy/ess"].item() == 0
