"""The mathematics of GIPO as experiments on the shipped `policy_loss`; numbers as in docs/theory.md."""

import math
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from harness import ROOT
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize_scalar

from analysis import bias_variance, surrogates
from analysis.bias_variance import BEHAVIOURS, OFF_POLICY, SAMPLES, TARGETS, advantages, estimate
from analysis.coefficients import coefficients, loss
from gipo_continuous import Continuous, diagnostics

SIGMAS = st.floats(0.1, 3)


@st.composite
def distributions(draw, n=2):
    """n distributions over the same few actions, every probability positive, some of them tiny."""
    logits = draw(hnp.arrays(float, (n, draw(st.integers(2, 6))), elements=st.floats(-15, 15)))
    logits -= logits.max(1, keepdims=True)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def gipo(logratio, sigma, advantages=1.0):
    return coefficients(loss("gipo", sigma=sigma), logratio, advantages)


# ---------------------------------------------- bound, second moment, bias ------------------------------------------


@given(distributions(), SIGMAS, st.sampled_from([1.0, -1.0]))
def test_t5_the_mean_coefficient_is_the_mean_weight(dists, sigma, advantage):
    pi, mu = dists
    logratio = np.log(pi / mu)
    mean = mu @ gipo(logratio, sigma, advantage)
    assert mean == pytest.approx(pi @ np.exp(-0.5 * (logratio / sigma) ** 2), abs=1e-12)
    assert 0 <= mean <= 1 + 1e-12


@given(distributions(), SIGMAS)
def test_t6_the_second_moment_is_bounded_at_any_staleness(dists, sigma):
    pi, mu = dists
    coef = gipo(np.log(pi / mu), sigma)
    assert mu @ coef**2 <= math.exp(sigma**2 / 4) * (1 + 1e-12)


@pytest.mark.parametrize(("sigma", "bound"), [(0.5, 1.064494), (1, 1.284025), (2, 2.718282)])
def test_t6_is_tight_and_plain_importance_sampling_has_no_such_bound(sigma, bound):
    """All of pi on one action whose ratio is exp(sigma^2 / 2) reaches the bound."""
    mu = np.array([math.exp(-(sigma**2) / 2), 1 - math.exp(-(sigma**2) / 2)])
    logratio = np.log(np.array([1, 1e-300]) / mu)
    assert mu @ gipo(logratio, sigma) ** 2 == pytest.approx(bound, abs=1e-6)
    rare = np.array([1e-6, 1 - 1e-6])
    logratio = np.log(np.array([1 - 1e-6, 1e-6]) / rare)
    assert rare @ gipo(logratio, sigma) ** 2 < bound
    assert rare @ coefficients(loss("plain_is"), logratio, 1.0) ** 2 > 1e5


@given(distributions(), SIGMAS, st.floats(-5, 5), st.floats(-5, 5))
def test_t9_the_bias_is_at_most_quadratic_in_the_log_ratio(dists, sigma, first, other):
    pi, mu = dists
    logratio = np.log(pi / mu)
    gradient = np.full(len(pi), other)
    gradient[0] = first  # G = A grad log pi of an action, any number
    bias = mu @ (gipo(logratio, sigma) * gradient) - pi @ gradient
    weight = np.exp(-0.5 * (logratio / sigma) ** 2)
    assert bias == pytest.approx(-pi @ ((1 - weight) * gradient), abs=1e-9)
    assert abs(bias) <= np.abs(gradient).max() * (pi @ logratio**2) / (2 * sigma**2) + 1e-9


@given(hnp.arrays(float, st.integers(1, 50), elements=st.floats(-20, 20)), SIGMAS)
def test_t10_the_effective_sample_size_of_every_batch(logratio, sigma):
    """As the scripts log it."""
    coef = gipo(logratio, sigma)
    if coef.max() < 1e-30:  # squares would leave floating point
        return
    x = torch.tensor(logratio).unsqueeze(1)
    ess = diagnostics(x, torch.ones_like(x), Continuous(sigma=sigma))["offpolicy/ess"].item()
    assert ess == pytest.approx(coef.sum() ** 2 / (len(coef) * (coef**2).sum()))
    assert ess >= coef.mean() * math.exp(-(sigma**2) / 2) * (1 - 1e-9)


# ------------------------------------------------- a lognormal drift -------------------------------------------------


def moments(sigma, s):
    """E u and E u^2 under x ~ N(-s^2 / 2, s^2)."""
    logratio, mass = surrogates.drifted(s)
    coef = gipo(logratio, sigma)
    return mass @ coef, mass @ coef**2


def ess(sigma, s):
    mean, square = moments(sigma, s)
    return mean**2 / square


@pytest.mark.parametrize(
    ("s", "sigma", "mean", "square", "size"),
    [
        (0.3, 1, 0.956937, 0.991831, 0.923270),
        (1, 0.5, 0.404656, 0.333333, 0.491238),
        (1, 1, 0.664265, 0.741332, 0.595210),
        (1.5, 1, 0.456558, 0.509973, 0.408738),
    ],
)
def test_t11_moments_under_lognormal_drift(s, sigma, mean, square, size):
    assert moments(sigma, s) == pytest.approx((mean, square), abs=1e-6)
    assert ess(sigma, s) == pytest.approx(size, abs=1e-6)
    v = s**2 / sigma**2
    assert mean == pytest.approx(math.exp(-(s**4) / (8 * (sigma**2 + s**2))) / math.sqrt(1 + v), abs=1e-6)
    closed = math.exp((s**2 - s**4 / (4 * sigma**2)) / (1 + 2 * v)) / math.sqrt(1 + 2 * v)
    assert square == pytest.approx(closed, abs=1e-6)


@pytest.mark.parametrize("s", [0.3, 1.0, 1.5])
def test_t11_plain_importance_sampling(s):
    logratio, mass = surrogates.drifted(s)
    coef = coefficients(loss("plain_is"), logratio, 1.0)
    assert (mass @ coef) ** 2 / (mass @ coef**2) == pytest.approx(math.exp(-(s**2)), abs=1e-6)


@pytest.mark.parametrize(("s", "best"), [(0.01, 0.7072), (0.3, 0.7663), (1, 0.9550), (2, 1.0976)])
def test_t12_the_sigma_with_the_largest_effective_sample_size(s, best):
    found = minimize_scalar(lambda sigma: -ess(sigma, s), bounds=(0.3, 3), method="bounded", options={"xatol": 1e-5})
    assert found.x == pytest.approx(best, abs=5e-4)


@pytest.mark.parametrize("s", [0.1, 0.3])
def test_t12_a_narrow_weight_wastes_more_than_plain_importance_sampling(s):
    plain = math.exp(-(s**2))
    assert ess(0.4, s) < plain < ess(1.0, s)


@pytest.mark.parametrize(("s", "share"), [(0.1, 0.022547), (0.3, 0.250311), (0.5, 0.345794), (1, 0.428286)])
def test_t13_samples_without_gradient(s, share):
    # the clip's edge falls into a cell of the grid, so cells must be narrow
    found = {m: surrogates.dead_share(m, s, threshold=1e-300, points=1_000_001) for m in ("clip", "gipo")}
    assert found == pytest.approx({"clip": share, "gipo": 0}, abs=5e-6)


# --------------------------------------------------- concentration ---------------------------------------------------

# ratios of mean 1 by random generator; Lomax with shape 1.5 has no variance
LAWS = {
    "lognormal 0.3": lambda rng, shape: rng.normal(-(0.3**2) / 2, 0.3, shape),
    "lognormal 1": lambda rng, shape: rng.normal(-0.5, 1, shape),
    "lognormal 2": lambda rng, shape: rng.normal(-2, 2, shape),
    "lomax 1.5": lambda rng, shape: np.log(rng.pareto(1.5, shape) / 2),
}
BATCH, BATCHES = 64, 10_000
DEVIATIONS = np.linspace(0.05, 1, 20)


def hoeffding(t, sigma):
    return 2 * np.exp(-BATCH * t**2 * math.exp(-(sigma**2)) / 2)


def bernstein(t, sigma):
    variance, largest = math.exp(sigma**2 / 4), math.exp(sigma**2 / 2)
    return 2 * np.exp(-BATCH * t**2 / (2 * variance + 4 / 3 * t * largest))


def tails(surrogate, law):
    """How often the mean of c A over a batch, A = +-1, is further than each deviation from its expectation, 0."""
    rng = np.random.default_rng(7)
    logratio = LAWS[law](rng, BATCH * BATCHES)
    sign = rng.choice([-1.0, 1.0], BATCH * BATCHES)
    means = (coefficients(surrogate, logratio, sign) * sign).reshape(BATCHES, BATCH).mean(1)
    return (np.abs(means)[:, None] >= DEVIATIONS).mean(0)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("law", LAWS)
def test_t7_t8_the_mean_of_a_batch_concentrates(law, sigma):
    found = tails(loss("gipo", sigma=sigma), law)
    assert (found <= bernstein(DEVIATIONS, sigma)).all()
    assert (found <= hoeffding(DEVIATIONS, sigma)).all()
    assert found[0] > 0.1  # there is a tail to bound


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("law", ["lognormal 2", "lomax 1.5"])
def test_t8_plain_importance_sampling_breaks_the_bound_that_gipo_keeps(law, sigma):
    assert (tails(loss("plain_is"), law) > bernstein(DEVIATIONS, sigma)).any()


def test_t8_is_sharper_than_t7():
    informative = bernstein(DEVIATIONS, 1.0) < 1
    assert informative.sum() > 10
    assert (bernstein(DEVIATIONS, 1.0) < hoeffding(DEVIATIONS, 1.0))[informative].all()


# ------------------------------------------- one step, and many, on one batch ----------------------------------------


def kl(p_logits, q_logits):
    p, q = torch.log_softmax(p_logits, 0), torch.log_softmax(q_logits, 0)
    return (p.exp() * (p - q)).sum().item()


def descend(surrogate, logits, actions, behaviour_logprobs, advantage, rate, steps):
    """Plain SGD on one batch of a tabular softmax policy with one state."""
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=rate)
    for _ in range(steps):
        logratio = torch.log_softmax(logits, 0)[actions] - behaviour_logprobs
        optimizer.zero_grad()
        surrogate(logratio.unsqueeze(1), advantage.unsqueeze(1)).backward()
        optimizer.step()
    return logits.detach()


@given(
    logits=hnp.arrays(float, 5, elements=st.floats(-4, 4)),
    behaviour=hnp.arrays(float, 5, elements=st.floats(-8, 8)),
    actions=hnp.arrays(int, 16, elements=st.integers(0, 4)),
    advantage=hnp.arrays(float, 16, elements=st.floats(-3, 3)),
    rate=st.floats(0.01, 1),
    sigma=st.floats(0.1, 1.5),
)
def test_t14_one_step_moves_a_bounded_distance(logits, behaviour, actions, advantage, rate, sigma):
    before = torch.tensor(logits)
    mu = torch.log_softmax(torch.tensor(behaviour), 0)[actions]
    after = descend(loss("gipo", sigma=sigma), before, torch.tensor(actions), mu, torch.tensor(advantage), rate, 1)
    bound = 0.5 * rate**2 * math.exp(sigma**2) * np.abs(advantage).mean() ** 2
    assert max(kl(before, after), kl(after, before)) <= bound + 1e-12


def test_t14_plain_importance_sampling_moves_further():
    before, actions = torch.zeros(5, dtype=torch.float64), torch.tensor([0])
    behaviour = torch.log(torch.tensor([1e-3], dtype=torch.float64))
    after = descend(loss("plain_is"), before, actions, behaviour, torch.ones(1, dtype=torch.float64), 0.1, 1)
    assert kl(before, after) > 0.5 * 0.1**2 * math.exp(1.0)


def test_t15_no_trust_region():
    """On one batch, step after step, GIPO drifts further from the policy that collected it than clip and SPO do."""
    rng = np.random.default_rng(0)
    start = torch.zeros(4, dtype=torch.float64)
    actions = torch.tensor(rng.integers(0, 4, 256))
    behaviour = torch.log_softmax(start, 0)[actions]
    advantage = torch.tensor(rng.normal(size=256)) + torch.tensor([1.0, 0.3, -0.3, -1.0])[actions]
    drift = {
        method: kl(start, descend(loss(method), start, actions, behaviour, advantage, 0.5, 200))
        for method in ("gipo", "clip", "spo")
    }
    assert drift["gipo"] > 3 * drift["clip"] and drift["gipo"] > 3 * drift["spo"]


# ----------------------------------------------------- GridWorld -----------------------------------------------------


@pytest.mark.parametrize(
    ("target", "up_left", "down", "right"),
    [
        ("P1", -0.641529, 0.497926, 0.357446),
        ("P2", -0.722625, 0.233105, 0.128208),
        ("P3", -0.767972, 0.108119, 0.062542),
    ],
)
def test_gridworld_advantages(target, up_left, down, right):
    policy = bias_variance.TARGETS[target]
    assert advantages(policy).tolist() == pytest.approx([up_left, down, up_left, right], abs=1e-6)
    assert policy[0] @ advantages(policy) == pytest.approx(0, abs=1e-12)


COLUMNS = [("plain_is", {}), *(("gipo", {"sigma": sigma}) for sigma in (0.3, 0.5, 1.0, 2.0))]
COLUMNS += [("clip", {"clip_coef": 0.2}), ("sapo", {"sapo_tau": 1.0, "sapo_tau_neg": 2.0})]
COLUMNS += [("sapo", {"sapo_tau": 1.0, "sapo_tau_neg": 1.05}), ("tis", {"tis_cap": 1.0})]
TABLE = {  # expectation / variance
    ("P2", "A"): ".051283/.013405 -.001368/.000802 .006587/.004054 .032147/.009351 .045701/.012179 0/0 "
    ".035163/.009979 .046460/.011171 .053731/.007450",
    ("P2", "C"): ".051283/.013708 .001330/.003759 .019661/.007129 .040745/.011238 .048439/.013011 0/0 "
    ".040178/.011326 .047989/.012713 .052750/.010548",
    ("P3", "A"): ".028144/.004472 -.000941/.000061 -.003020/.000713 .004067/.002198 .018856/.003532 0/0 "
    ".013831/.002661 .023625/.003243 .030995/.002316",
}


@pytest.mark.parametrize("case", TABLE)
def test_gridworld_expectations_and_variances(case):
    for (method, flags), cell in zip(COLUMNS, TABLE[case].split(), strict=True):
        found = estimate(*case, method, **flags)
        expected = [float(number) for number in cell.split("/")]
        assert [found.expectation, found.variance] == pytest.approx(expected, abs=1e-6), (method, flags)


def test_gridworld_a_tie_is_inside_the_clip():
    """Under P1 x A the ratios are 0.8 and 1.2, the edges themselves: nothing is clipped."""
    clip, plain = estimate("P1", "A", "clip", clip_coef=0.2), estimate("P1", "A", "plain_is")
    assert clip.expectation == pytest.approx(plain.expectation)
    assert estimate("P1", "A", "clip", clip_coef=0.19).expectation != pytest.approx(plain.expectation)


def test_gridworld_on_policy_all_methods_agree():
    for target in bias_variance.TARGETS:
        found = [estimate(target, "D", method, **flags) for method, flags in COLUMNS]
        assert [e.bias for e in found] == pytest.approx([0] * len(found), abs=1e-12)
        assert [e.variance for e in found] == pytest.approx([found[0].variance] * len(found))


GIPOS, ALL = COLUMNS[:5], [*COLUMNS, ("spo", {}), ("dual_clip", {})]


def wins(pool, n):
    """In how many of the off-policy cases each method of a pool has the least MSE(n)."""
    return Counter(
        min(pool, key=lambda column: estimate(*case, column[0], **column[1]).mse(n))[0] for case in OFF_POLICY
    )


def test_gridworld_no_single_ranking():
    assert len(OFF_POLICY) == 18
    for case in OFF_POLICY:  # one sample: the narrowest of the GIPO weights is best
        errors = [estimate(*case, method, **flags).mse(1) for method, flags in GIPOS]
        assert np.argmin(errors) == 1
    assert wins(ALL, 1).most_common(1)[0][0] == "clip"  # its gradient is 0 then
    assert wins(GIPOS, 512)["plain_is"] == 12
    assert wins(ALL, 512).most_common(1)[0][0] == "tis"
    mean_sigma = [
        np.mean([np.argmin([estimate(*case, m, **f).mse(n) for m, f in GIPOS[1:]]) for case in OFF_POLICY])
        for n in SAMPLES
    ]
    assert mean_sigma == sorted(mean_sigma) and mean_sigma[0] < mean_sigma[-1]  # the best sigma grows with n


def test_gridworld_tis_dominates_gipo_in_some_cases():
    pairs = [(estimate(*case, "tis"), estimate(*case, "gipo", sigma=1.0)) for case in OFF_POLICY]
    assert sum(abs(t.bias) < abs(g.bias) and t.variance < g.variance for t, g in pairs) == 7
    assert not any(abs(t.bias) > abs(g.bias) and t.variance > g.variance for t, g in pairs)


def test_gridworld_direction():
    p3 = [case for case in OFF_POLICY if case[0] == "P3"]
    default = [estimate(*case, "gipo", sigma=0.5) for case in p3]
    assert all(e.expectation < 0 for e in default)  # the wrong sign
    assert (min(e.cosine for e in default), max(e.cosine for e in default)) == pytest.approx((0.61, 0.79), abs=0.005)
    assert min(estimate(*case, "gipo", sigma=1.0).cosine for case in OFF_POLICY) == pytest.approx(0.966, abs=5e-4)


def test_the_policies_on_the_page_are_those_of_the_study():
    page = (ROOT / "docs" / "theory.md").read_text()
    rows = re.findall(r"^\| ((?:target|behaviour) \w+).*? \| (\d.*) \|$", page, re.MULTILINE)
    shown = {name: np.array(numbers.split("|"), float) for name, numbers in rows}
    expected = {f"target {name}": pi[0] for name, pi in TARGETS.items()}
    expected |= {f"behaviour {name}": mu for name, mu in BEHAVIOURS.items() if mu is not None}
    assert shown.keys() == expected.keys()
    assert all(np.abs(shown[name] - expected[name]).max() < 0.0006 for name in expected)  # three digits


def test_the_published_table_is_what_the_losses_give():
    published = pd.read_csv(ROOT / "docs" / "figures" / "bias_variance.csv").fillna({"flags": ""})
    pd.testing.assert_frame_equal(bias_variance.estimates(), published, atol=1e-9, rtol=0, check_dtype=False)


@pytest.mark.slow
def test_the_analyses_write_their_files(tmp_path):
    surrogates.main(tmp_path)
    bias_variance.main(tmp_path)
    names = {"surrogates.png", "bias_variance.csv", "bias_variance.png", "best_sigma.png"}
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_size > 10_000} == names
