"""Every policy_loss against its formula, through autograd (T numbers name identities of GIPO), and what is logged."""

import math

import pytest
import torch
from harness import GIPO, flags, load, load_variant
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.variants import LOSSES

SURROGATES = ["clip", *LOSSES]
MODULES = {"gipo": load("gipo_continuous"), "clip": load("ppo_baseline")}
MODULES |= {name: load_variant(name) for name in (*LOSSES, "decoupled")}
gipo = MODULES["gipo"]


def arguments(method, **values):
    """The flags for continuous control."""
    return flags(MODULES[method], int(method != "gipo"), **values)


def coefficients(method, logratio, advantages, **values):
    """Gradient coefficient of each sample by autograd, and the one that policy_loss reports."""
    logratio = torch.as_tensor(logratio, dtype=torch.float64).clone().requires_grad_()
    advantages = torch.as_tensor(advantages, dtype=torch.float64).expand_as(logratio)
    loss, coef = MODULES[method].policy_loss(logratio, advantages, arguments(method, **values))
    loss.backward()
    assert not coef.requires_grad
    return -logratio.grad * len(logratio) / advantages, coef


def u(x, sigma):
    return torch.exp(x - x**2 / (2 * sigma**2))


X = torch.linspace(-5, 5, 2001, dtype=torch.float64)


def test_the_three_gipo_scripts_share_one_loss():
    for name in GIPO:
        loss, coef = load(name).policy_loss(X, torch.sin(7 * X), arguments("gipo"))
        expected, expected_coef = gipo.policy_loss(X, torch.sin(7 * X), arguments("gipo"))
        assert torch.equal(loss, expected) and torch.equal(coef, expected_coef)


@pytest.mark.parametrize("advantage", [1.7, -0.3])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_gipo_coefficient_is_the_formula(sigma, advantage):
    gradient, coef = coefficients("gipo", X, advantage, sigma=sigma)
    torch.testing.assert_close(coef, u(X, sigma))
    torch.testing.assert_close(gradient, coef)


@pytest.mark.parametrize(
    ("sigma", "bound"), [(0.1, 1.005013), (0.2, 1.020201), (0.5, 1.133148), (1, 1.648721), (2, 7.389056)]
)
def test_t1_the_largest_coefficient(sigma, bound):
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    gradient, _ = coefficients("gipo", x, 1.0, sigma=sigma)
    assert gradient.max().item() == pytest.approx(bound, abs=1e-6)
    assert x[gradient.argmax()].item() == pytest.approx(sigma**2, abs=1e-3)


@given(sigma=st.floats(0.1, 3), t=st.floats(-5, 5))
def test_t2_symmetric_about_sigma_squared(sigma, t):
    x = [sigma**2 + t, sigma**2 - t, 0.0, 2 * sigma**2]
    gradient, _ = coefficients("gipo", x, 1.0, sigma=sigma)
    assert gradient[0].item() == pytest.approx(gradient[1].item(), rel=1e-9, abs=1e-300)
    assert gradient[2:].tolist() == pytest.approx([1, 1])


def test_t2_amplifies_between_zero_and_two_sigma_squared_only():
    gradient, _ = coefficients("gipo", X, 1.0, sigma=1.0)
    between = (X > 1e-9) & (X < 2 - 1e-9)
    assert (gradient[between] > 1).all() and (gradient[(X < -1e-9) | (X > 2 + 1e-9)] < 1).all()


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0])
def test_t5_no_gradient_flows_through_the_weight(sigma):
    gradient, _ = coefficients("gipo", [sigma**2], 1.0, sigma=sigma)
    assert gradient.item() == pytest.approx(math.exp(sigma**2 / 2))  # it would be 0 if it did


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_t6_all_gradients_coincide_on_policy(advantage):
    found = [coefficients("gipo", [0.0], advantage)]
    found += [coefficients(s, [0.0], advantage) for s in SURROGATES]
    assert [g.item() for g, _ in found] == pytest.approx([1.0] * 7)
    assert [c.item() for _, c in found] == pytest.approx([1.0] * 7)


@given(sigma=st.floats(0.1, 3), x=st.floats(0, 5))
def test_t7_the_weight_is_symmetric_in_log_space(sigma, x):
    _, coef = coefficients("gipo", [x, -x], 1.0, sigma=sigma)
    weight = coef * torch.exp(torch.tensor([-x, x], dtype=torch.float64))
    assert weight[0].item() == pytest.approx(weight[1].item(), rel=1e-9, abs=1e-300)


@given(x=st.floats(-5, 5), advantage=st.sampled_from([1.0, -1.0]))
def test_t9_limits(x, advantage):
    wide, _ = coefficients("gipo", [x], advantage, sigma=1e6)
    plain, _ = coefficients("none", [x], advantage)
    assert wide.item() == pytest.approx(plain.item())
    narrow, _ = coefficients("gipo", [x], advantage, sigma=1e-3)
    assert abs(x) < 0.1 or narrow.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sigma_neg", [0.2, 1.0])
def test_t10_the_sign_of_the_advantage_picks_the_width(sigma_neg):
    widths = {"sigma": 0.5, "sigma_neg": sigma_neg}
    positive, _ = coefficients("gipo", X, 2.0, **widths)
    negative, _ = coefficients("gipo", X, -2.0, **widths)
    torch.testing.assert_close(positive, u(X, 0.5))
    torch.testing.assert_close(negative, u(X, sigma_neg))
    assert negative.max().item() == pytest.approx(math.exp(sigma_neg**2 / 2), abs=1e-5)
    _, at_zero = gipo.policy_loss(X, torch.zeros_like(X), arguments("gipo", **widths))
    torch.testing.assert_close(at_zero, u(X, sigma_neg))


def test_sigma_neg_is_sigma_unless_given():
    advantages = torch.sin(7 * X)
    found = [
        gipo.policy_loss(X, advantages, arguments("gipo", sigma=0.7, sigma_neg=width)) for width in (None, 0.7, 0.2)
    ]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])


def test_gipo_value():
    """The mean of -w r A, where a loss of another value with the same gradient would be logged wrong."""
    advantages = torch.sin(7 * X)
    loss, _ = gipo.policy_loss(X, advantages, arguments("gipo"))
    torch.testing.assert_close(loss, -(torch.exp(-(X**2) / (2 * 0.5**2)) * X.exp() * advantages).mean())


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
    gradient, coef = coefficients(surrogate, X, advantage)
    expected = torch.tensor([expected_coefficient(surrogate, x, advantage > 0) for x in X.tolist()], dtype=X.dtype)
    torch.testing.assert_close(coef, expected)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("surrogate", "change"),
    [
        ("clip", {"clip_coef": 0.5}),
        ("dual-clip", {"clip_coef": 0.5}),
        ("dual-clip", {"dual_clip": 1.5}),
        ("sapo", {"sapo_tau": 2.0}),
        ("sapo", {"sapo_tau_neg": 2.0}),
        ("tis", {"tis_cap": 3.0}),
        ("spo", {"spo_eps": 0.4}),
    ],
)
def test_baseline_constants_are_read(surrogate, change):
    advantages = torch.where(torch.arange(len(X)) % 2 == 0, 1.0, -1.0)
    _, default = MODULES[surrogate].policy_loss(X, advantages, arguments(surrogate))
    _, changed = MODULES[surrogate].policy_loss(X, advantages, arguments(surrogate, **change))
    differs = [bool((default[half::2] != changed[half::2]).any()) for half in (0, 1)]  # A > 0, A < 0
    one_sided = {"sapo_tau": [True, False], "sapo_tau_neg": [False, True], "dual_clip": [False, True]}
    assert differs == one_sided.get(*change, [True, True])


def test_clip_value_is_ppo_s():
    logratio, advantages = torch.tensor([0.5, 0.5, -0.5, -0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, _ = MODULES["clip"].policy_loss(logratio, advantages, arguments("clip"))
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
@settings(max_examples=50)
def test_finite_at_extreme_ratios(method, dtype, x, advantage, sigma):
    logratio = torch.tensor([*x, 100.0, -100.0, 0.0], dtype=dtype, requires_grad=True)
    advantages = torch.full_like(logratio, advantage)
    args = arguments(method, **({"sigma": sigma} if method == "gipo" else {}))
    loss, coef = MODULES[method].policy_loss(logratio, advantages, args)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(coef).all() and torch.isfinite(logratio.grad).all()
    for numbers in ((logratio.detach(), coef), (logratio.detach().float(), coef.float())):
        diagnostics = MODULES[method].diagnostics(*numbers)
        assert all(torch.isfinite(value) for value in diagnostics.values()), diagnostics


class Agent:
    """Gives the log-probabilities that a test asks for; neither its entropy nor its value has a gradient."""

    def __init__(self, logprobs):
        self.logprobs = logprobs

    def get_action_and_value(self, obs, actions):
        return actions, self.logprobs, torch.zeros_like(self.logprobs), torch.zeros_like(self.logprobs)


def gradient_of_the_loss(method, logratio, advantages, proximal=0.0, **values):
    """Gradient in the log-probabilities, the loss and what minibatch_loss returns for the log.

    `proximal` is by how much the log-probabilities of decoupled PPO's proximal policy differ from mu's.
    """
    module, mu = MODULES[method], torch.linspace(-2, 1, len(logratio), dtype=logratio.dtype)
    agent = Agent((mu + logratio).requires_grad_())
    module.actors, module.iteration = [Agent(mu + proximal)], 0
    args = arguments(method, norm_adv=False, **values)
    loss, *logged = module.minibatch_loss(agent, mu, mu, mu, advantages, torch.zeros_like(mu), args)
    return torch.autograd.grad(loss, agent.logprobs)[0], loss, logged


@pytest.mark.parametrize("method", MODULES)
def test_kl_term_pulls_every_sample_alike(method):
    logratio, advantages = X[::20], torch.sin(7 * X[::20])
    without, loss, (scalars, _, coef) = gradient_of_the_loss(method, logratio, advantages, 0.3, kl_coef=0.0)
    pulled, with_kl, (scalars_kl, _, coef_kl) = gradient_of_the_loss(method, logratio, advantages, 0.3, kl_coef=0.2)
    torch.testing.assert_close(pulled - without, torch.full_like(X[::20], -0.2 / len(logratio)), rtol=1e-9, atol=0)
    assert (with_kl - loss).item() == pytest.approx(-0.2 * logratio.mean().item(), abs=1e-12)
    assert torch.equal(coef, coef_kl) and torch.equal(scalars["losses/policy_loss"], scalars_kl["losses/policy_loss"])
    default = arguments(method).kl_coef
    assert default == (0.1 if method == "gipo" else 0.0)


@pytest.mark.parametrize("method", MODULES)
def test_logged_kl_is_the_mean_of_the_log_ratio(method):
    """Of pi to the policy that collected the data, for decoupled PPO too."""
    _, _, (_, logratio, coef) = gradient_of_the_loss(method, X + 0.5, torch.sin(7 * X), 0.3)
    torch.testing.assert_close(logratio, X + 0.5)
    kl = MODULES[method].diagnostics(logratio, coef)["losses/kl"]
    assert kl.item() == pytest.approx(-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proximal", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("method", MODULES)
def test_the_whole_loss_is_finite_at_extreme_ratios(method, proximal, dtype):
    logratio = torch.tensor([100.0, -100.0, 100.0, -100.0], dtype=dtype)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=dtype)
    gradient, loss, (scalars, logratio, coef) = gradient_of_the_loss(
        method, logratio, advantages, proximal, kl_coef=0.3
    )
    logged = scalars | MODULES[method].diagnostics(logratio, coef)
    assert all(numbers.isfinite().all() for numbers in (loss, gradient, coef, *logged.values()))
    if method == "gipo":  # its weight has let all of them go, and the KL term still pulls
        torch.testing.assert_close(gradient, torch.full_like(gradient, -0.3 / 4))


def test_diagnostics():
    logratio = torch.tensor([0.0, math.log(1.1), math.log(1.3), math.log(0.7)])
    found = gipo.diagnostics(logratio, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    ratio = logratio.exp()
    assert found["losses/approx_kl"].item() == pytest.approx((ratio - 1 - logratio).mean().item())
    assert found["losses/kl"].item() == pytest.approx(-logratio.mean().item())
    assert found["losses/clipfrac"].item() == pytest.approx(0.5)
    assert found["offpolicy/ess"].item() == pytest.approx(0.75)
    assert found["offpolicy/dead_fraction"].item() == pytest.approx(0.25)
    assert found["offpolicy/coef_mean"].item() == pytest.approx(0.75)
    hundred = torch.linspace(-0.01, -1, 100)[torch.randperm(100)]
    assert gipo.diagnostics(hundred, hundred)["offpolicy/abs_logratio_p95"].item() == pytest.approx(0.95)
    assert gipo.diagnostics(logratio, torch.zeros(4))["offpolicy/ess"].item() == 0
