"""The losses against their formulas and finite differences (T numbers name identities of GIPO), and what is logged."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from harness import GIPO, SCRIPTS
from hypothesis import given, settings
from hypothesis import strategies as st

import gipo_continuous

X = torch.linspace(-5, 5, 2001, dtype=torch.float64)
BOTH = ["gipo_continuous", "ppo_baseline"]


def objective(name, x, frozen, advantages, args):
    """Of each sample and column, by hand; GIPO's weight is that of the log-ratio `frozen`."""
    if name in GIPO:
        return torch.exp(-(frozen**2) / (2 * args.sigma**2)) * torch.exp(x) * advantages
    ratio, eps = torch.exp(x), args.clip_coef
    return torch.min(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)


def coefficient(name, x, positive, width):
    """The published coefficient c of a sample's gradient c A grad log pi, in plain floats."""
    if name in GIPO:
        return math.exp(x - x**2 / (2 * width**2))
    return math.exp(x) * (math.exp(x) <= 1 + width if positive else math.exp(x) >= 1 - width)


def by_autograd(x, advantage=1.0, name="gipo_continuous", **values):
    """The coefficient of each log-ratio in policy_loss."""
    x = torch.as_tensor(x, dtype=torch.float64).view(-1, 1).clone().requires_grad_()
    loss = SCRIPTS[name].policy_loss(x, torch.full_like(x, advantage), SCRIPTS[name].Args(**values))
    (gradient,) = torch.autograd.grad(loss, x)
    return (-gradient * len(x) / advantage).squeeze(1)


def slopes(function, x, h=1e-6):
    """Gradient of a function by central differences, one entry of x (float64) at a time."""
    found = torch.zeros_like(x)
    for i in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[i] = h
        found[i] = (function(x + step) - function(x - step)) / (2 * h)
    return found


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("name", SCRIPTS)
def test_loss_is_a_sum_over_columns_and_a_mean_over_samples(name, columns):
    """Its gradient in each column is that of one dimension, by central differences of the objective by hand."""
    module, args = SCRIPTS[name], SCRIPTS[name].Args()
    x = X[torch.randperm(2001, generator=torch.Generator().manual_seed(0))].view(-1, columns).requires_grad_()
    advantages = torch.sin(7 * torch.arange(len(x), dtype=x.dtype)).unsqueeze(1)
    loss = module.policy_loss(x, advantages, args)
    (gradient,) = torch.autograd.grad(loss, x)
    x = x.detach()
    torch.testing.assert_close(loss, -objective(name, x, x, advantages, args).sum() / len(x))
    up, down = (objective(name, x + h, x, advantages, args) for h in (1e-6, -1e-6))
    torch.testing.assert_close(gradient, -(up - down) / 2e-6 / len(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("advantage", [1.7, -0.3])
@pytest.mark.parametrize("width", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", SCRIPTS)
def test_coefficients_are_the_closed_formulas(name, width, advantage):
    """By autograd, and as diagnostics takes them, one sample at a time."""
    flag = {"sigma": width} if name in GIPO else {"clip_coef": width}
    expected = torch.tensor([coefficient(name, x, advantage > 0, width) for x in X.tolist()], dtype=X.dtype)
    torch.testing.assert_close(by_autograd(X, advantage, name, **flag), expected)
    for x, c in list(zip(X, expected))[::50]:
        alone, sign = x.view(1, 1).clone(), torch.full((1, 1), advantage, dtype=X.dtype)
        found = SCRIPTS[name].diagnostics(alone, sign, SCRIPTS[name].Args(**flag))
        assert found["offpolicy/coef_mean"].item() == pytest.approx(c.item(), rel=1e-6, abs=1e-12)


def test_one_column_is_the_joint_formula():
    """In float32, as the second edition had it for whole actions."""
    x, advantages = X.float(), torch.sin(7 * X).float()
    args = gipo_continuous.Args()
    loss = gipo_continuous.policy_loss(x.unsqueeze(1), advantages.unsqueeze(1), args)
    joint = -(torch.exp(x - 0.5 * (x / args.sigma) ** 2) * advantages).mean()
    assert loss.item() == pytest.approx(joint.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("sigma", "bound"), [(0.1, 1.005013), (0.2, 1.020201), (0.5, 1.133148), (1, 1.648721), (2, 7.389056)]
)
def test_t1_t2_t3_the_largest_coefficient(sigma, bound):
    """At sigma squared, where it would be 0 if a gradient flowed through the weight; it is 1 at twice that."""
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    found = by_autograd(x, sigma=sigma)
    assert found.max().item() == pytest.approx(bound, abs=1e-6)
    assert x[found.argmax()].item() == pytest.approx(sigma**2, abs=1e-3)
    assert by_autograd([2 * sigma**2], sigma=sigma).item() == pytest.approx(1)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", SCRIPTS)
def test_t4_all_gradients_coincide_on_policy(name, advantage):
    assert by_autograd([0.0], advantage, name).item() == pytest.approx(1)


def test_limits():
    """A wide weight is plain importance sampling; a narrow one leaves no gradient off-policy."""
    torch.testing.assert_close(by_autograd(X, sigma=1e6), X.exp())
    assert by_autograd(X[X.abs() > 0.1], sigma=1e-3).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BOTH)
@given(x=st.lists(st.floats(-100, 100), max_size=8), advantage=st.floats(-10, 10), sigma=st.floats(0.05, 5))
@settings(max_examples=50)
def test_finite_at_extreme_ratios(name, dtype, x, advantage, sigma):
    module = SCRIPTS[name]
    args = module.Args(**({"sigma": sigma} if name in GIPO else {}))
    x = torch.tensor([*x, 100.0, -100.0, 0.0], dtype=dtype)
    logratio = torch.stack([x, x.flip(0), x], 1).requires_grad_()  # joint ones up to 300 too
    advantages = torch.full((len(x), 1), advantage, dtype=dtype)
    loss = module.policy_loss(logratio, advantages, args)
    loss.backward()
    assert loss.isfinite() and logratio.grad.isfinite().all()
    for kind in (dtype, torch.float32):
        logged = module.diagnostics(logratio.detach().to(kind), advantages.to(kind), args)
        assert all(value.isfinite() for value in logged.values()), logged


class Table(nn.Module):
    """An agent whose outputs are its parameters: log-probabilities (B, D), entropies and values (B,)."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = nn.ParameterList(output.clone() for output in outputs)

    def get_action_and_value(self, obs, actions):
        return actions, *self.outputs


class Noting(torch.optim.SGD):
    """Keeps the gradients of its last step."""

    def step(self):
        self.gradients = [parameter.grad.clone() for parameter in self.param_groups[0]["params"]]


def updated(name, outputs, mu, start, advantages, returns, **values):
    """Gradients of one update() and what it returns."""
    agent, args = Table(*outputs), SCRIPTS[name].Args(**{"norm_adv": False, "max_grad_norm": 1e9} | values)
    optimizer = Noting(agent.parameters())
    found = SCRIPTS[name].update(agent, optimizer, None, None, mu, start, advantages, returns, args)
    return optimizer.gradients, *found


def samples(columns, count=6):
    """Outputs of an agent, mu, start, advantages and returns, all at random."""
    rng = torch.Generator().manual_seed(columns)
    shapes = [(count, columns)] + [(count,)] * 2 + [(count, columns)] * 2 + [(count,)] * 2
    logprob, entropy, value, *rest = [torch.randn(*s, generator=rng, dtype=torch.float64) / 2 for s in shapes]
    return (logprob, entropy, value), *rest


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("kl_to", ["behaviour", "current"])
@pytest.mark.parametrize("name", BOTH)
def test_gradients_of_the_whole_loss(name, kl_to, columns):
    outputs, mu, start, advantages, returns = samples(columns)
    weights = {"kl_coef": 0.3, "vf_coef": 0.7, "ent_coef": 0.2}
    args = SCRIPTS[name].Args()

    def kl(logprob):
        if kl_to == "behaviour":
            return (mu - logprob).sum(1).mean()
        return (0.5 * (logprob - start) ** 2).sum(1).mean()

    def policy(logprob):
        return -objective(name, logprob - mu, outputs[0] - mu, advantages.unsqueeze(1), args).sum(1).mean()

    expected = [
        slopes(lambda logprob: policy(logprob) + 0.3 * kl(logprob), outputs[0]),
        torch.full_like(outputs[1], -0.2 / 6),
        slopes(lambda value: 0.7 * 0.5 * ((value - returns) ** 2).mean(), outputs[2]),
    ]
    found, scalars, logratio, passed = updated(name, outputs, mu, start, advantages, returns, kl_to=kl_to, **weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    # the KL term alone
    found, *_ = updated(name, outputs, mu, start, 0 * advantages, returns, kl_to=kl_to, kl_coef=1.0)
    torch.testing.assert_close(found[0], slopes(kl, outputs[0]), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((logratio, passed), (outputs[0] - mu, advantages.unsqueeze(1)))
    logged = {
        "policy_loss": policy(outputs[0]),
        "value_loss": 0.5 * ((outputs[2] - returns) ** 2).mean(),
        "entropy": outputs[1].mean(),
        "kl": (mu - outputs[0]).sum(1).mean(),
        "kl_step": ((outputs[0] - start) ** 2).sum(1).mean() / 2,
        "grad_norm": torch.cat([gradient.flatten() for gradient in expected]).norm(),
    }
    assert {f"losses/{tag}": pytest.approx(value.item(), rel=1e-6) for tag, value in logged.items()} == scalars


def test_a_long_gradient_is_cut_and_its_whole_norm_logged():
    outputs, mu, start, advantages, returns = samples(2)
    whole, scalars, *_ = updated("gipo_continuous", outputs, mu, start, advantages, returns)
    cut, cut_scalars, *_ = updated("gipo_continuous", outputs, mu, start, advantages, returns, max_grad_norm=0.01)
    assert scalars["losses/grad_norm"] == cut_scalars["losses/grad_norm"] > 0.1
    factor = 0.01 / scalars["losses/grad_norm"]
    torch.testing.assert_close(cut, [gradient * factor for gradient in whole], rtol=1e-4, atol=1e-9)


def test_advantages_are_normalized_in_each_minibatch():
    outputs, mu, start, advantages, returns = samples(2)
    expected = (advantages - advantages.mean()) / advantages.std()
    _, scalars, _, found = updated("gipo_continuous", outputs, mu, start, advantages, returns, norm_adv=True)
    torch.testing.assert_close(found, expected.unsqueeze(1))
    by_hand = gipo_continuous.policy_loss(outputs[0] - mu, expected.unsqueeze(1), gipo_continuous.Args())
    torch.testing.assert_close(scalars["losses/policy_loss"], by_hand)


def test_both_kl_terms_are_the_kl_to_second_order():
    """Where mu is the policy of the start: samples in exact proportion, and steps of half the size."""
    p = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64) / 8
    actions = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2])
    direction = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64)
    differences, zeros = [], torch.zeros(8, dtype=torch.float64)
    for size in (0.02, 0.01):
        q = torch.log_softmax(p.log() + size * direction, 0)
        mu, logprob = p.log()[actions].unsqueeze(1), q[actions].unsqueeze(1)
        _, scalars, *_ = updated("gipo_continuous", (logprob, zeros, zeros), mu, mu, zeros, zeros)
        exact = (p * (p.log() - q)).sum().item()
        assert scalars["losses/kl"].item() == pytest.approx(exact, rel=1e-9)
        assert scalars["losses/kl_step"].item() == pytest.approx(exact, rel=size)
        differences.append(scalars["losses/kl_step"].item() - exact)
    assert differences[0] / differences[1] == pytest.approx(8, rel=0.05)  # of third order


@pytest.mark.parametrize("kl_to", ["behaviour", "current"])
@pytest.mark.parametrize("name", BOTH)
def test_the_whole_loss_is_finite_at_extreme_ratios(name, kl_to):
    """GIPO's weight has let all samples go there, and the KL term still pulls."""
    logprob = torch.tensor([[100.0], [-100.0], [100.0], [-100.0]])
    advantages, zeros = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.zeros(4)
    mu, start = torch.zeros(4, 1), logprob - 2
    args = {"kl_coef": 0.3, "kl_to": kl_to}
    gradients, scalars, *rest = updated(name, (logprob, zeros, zeros), mu, start, advantages, zeros, **args)
    logged = scalars | SCRIPTS[name].diagnostics(*rest, SCRIPTS[name].Args())
    assert all(numbers.isfinite().all() for numbers in (*gradients, *logged.values()))
    if name in GIPO:
        pull = -0.3 / 4 if kl_to == "behaviour" else 2 * 0.3 / 4
        torch.testing.assert_close(gradients[0], torch.full((4, 1), pull))


@pytest.mark.parametrize("kl_to", ["behaviour", "current"])
def test_on_policy_the_unit_of_the_ratio_makes_no_difference(kl_to):
    """At a ratio of 1 the gradients are equal; the joint log-probability is the sum over dimensions."""
    found = {}
    for ratio in ("action", "dimension"):
        args = gipo_continuous.Continuous(env_id="probes:Clock-v0", ratio=ratio, kl_to=kl_to, kl_coef=0.3)
        torch.manual_seed(1)
        agent = args.Agent(args.make_envs(args, 2, seed=0), args)
        obs, advantages, returns = torch.randn(64, 2), torch.randn(64), torch.randn(64)
        with torch.no_grad():
            actions, logprobs, *_ = agent.get_action_and_value(obs)
        optimizer = Noting(agent.parameters())
        batch = (obs, actions, logprobs, logprobs, advantages, returns)
        gipo_continuous.update(agent, optimizer, *batch, args)
        found[ratio] = logprobs, optimizer.gradients
    (joint, gradients), (columns, others) = found["action"], found["dimension"]
    assert joint.shape == (64, 1) and columns.shape == (64, 2)
    torch.testing.assert_close(joint, columns.sum(1, keepdim=True))
    torch.testing.assert_close(gradients, others)
    assert all(gradient.any() for gradient in gradients)


def test_diagnostics():
    """Of the joint ratio: approx_kl. Of every column: the others."""
    logratio = torch.tensor([[0.0, math.log(1.1)], [math.log(1.3), 0.0], [math.log(0.7), -3.0], [9.0, -9.0]])
    advantages = torch.tensor([[1.0], [-1.0], [0.0], [1.0]])
    found = gipo_continuous.diagnostics(logratio.clone(), advantages, gipo_continuous.Args(sigma=0.5))
    joint, c = logratio.sum(1), torch.exp(logratio - 2 * logratio**2)
    expected = {
        "losses/approx_kl": (joint.exp() - 1 - joint).mean(),
        "losses/clipfrac": 5 / 8,
        "offpolicy/ess": c.sum() ** 2 / (8 * (c**2).sum()),
        "offpolicy/dead_fraction": 3 / 8,
        "offpolicy/coef_mean": c.mean(),
        "offpolicy/abs_logratio_p95": 9.0,
    }
    assert found == {tag: pytest.approx(float(value), rel=1e-5) for tag, value in expected.items()}
    hundred = torch.linspace(-0.01, -1, 100)[torch.randperm(100)].view(50, 2)
    found = gipo_continuous.diagnostics(hundred, torch.ones(50, 1), gipo_continuous.Args())
    assert found["offpolicy/abs_logratio_p95"].item() == pytest.approx(0.95)
    dead = gipo_continuous.diagnostics(torch.full((4, 1), -50.0), torch.ones(4, 1), gipo_continuous.Args())
    assert dead["offpolicy/ess"].item() == 0
