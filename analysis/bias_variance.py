"""Bias and variance of every surrogate on a 2 x 2 GridWorld that is solved exactly.

    python -m analysis.bias_variance     # docs/figures/bias_variance.csv and two figures, in seconds

States S0 top left, S1 top right, S2 bottom left, and the goal, which absorbs. Each step from another state costs 1, a
move off the grid stays, and the discount is 0.9. The quantity is the policy gradient with respect to the logit of
"right" in S0, estimated from one action a ~ mu(.|S0) with the exact advantage:

    g(a) = c(log pi(a) - log mu(a)) A(a) (1[a = right] - pi(right))

where c is the gradient coefficient of the surrogate, taken from `policy_loss` of the scripts by autograd. Plain
importance sampling is unbiased, so bias = E[g] - E[g of plain IS], and the mean of n samples errs by
MSE(n) = bias^2 + Var[g] / n. Nothing is sampled: with four actions every expectation is a sum.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro

from analysis.coefficients import coefficients, loss, make_folder
from benchmark import methods

GAMMA = 0.9
UP, DOWN, LEFT, RIGHT = range(4)
# next state by state and action; 3 is the goal
NEXT_STATE = np.array([[0, 2, 0, 1], [1, 3, 0, 1], [0, 2, 2, 3]])

# pi(a|s), rows S0, S1, S2, actions up, down, left, right
TARGETS = {
    "P1": np.array([[0.20, 0.30, 0.20, 0.30], [0.15, 0.45, 0.25, 0.15], [0.15, 0.15, 0.25, 0.45]]),
    "P2": np.array([[0.10, 0.40, 0.10, 0.40], [0.10, 0.60, 0.20, 0.10], [0.10, 0.10, 0.20, 0.60]]),
    "P3": np.array([[0.05, 0.45, 0.05, 0.45], [0.05, 0.75, 0.10, 0.10], [0.05, 0.10, 0.10, 0.75]]),
}


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


UNIFORM = np.full(4, 0.25)
GO_RIGHT, GO_DOWN = softmax(np.eye(4)[RIGHT]), softmax(np.eye(4)[DOWN])
N1, N2 = np.array([0.30, 0.20, 0.30, 0.20]), np.array([0.25, 0.30, 0.20, 0.25])
N3, N4, N5 = np.array([0.20, 0.35, 0.20, 0.25]), np.array([0.32, 0.18, 0.28, 0.22]), np.array([0.12, 0.38, 0.12, 0.38])
# mu(a|S0); None is mu = pi
BEHAVIOURS = {
    "A": UNIFORM,
    "B": 0.4 * UNIFORM + 0.3 * GO_RIGHT + 0.3 * GO_DOWN,
    "C": 0.2 * UNIFORM + 0.4 * GO_RIGHT + 0.4 * GO_DOWN,
    "D": None,
    "E": 0.45 * N1 + 0.35 * N4 + 0.2 * UNIFORM,
    "F": 0.45 * N2 + 0.35 * N5 + 0.2 * UNIFORM,
    "G": 0.4 * N3 + 0.3 * N4 + 0.3 * N5,
}
CASES = [(target, behaviour) for target in TARGETS for behaviour in BEHAVIOURS]
OFF_POLICY = [case for case in CASES if case[1] != "D"]

SIGMAS = [round(float(s), 3) for s in np.geomspace(0.1, 6.4, 25)]
# flags of each method, from much to little shrinking; SAPO's last ones are its authors'
SWEEPS = {
    "plain_is": [{}],
    "gipo": [{"sigma": s} for s in sorted({0.3, 0.5, 1.0, 2.0, *SIGMAS})],
    "clip": [{"clip_coef": e} for e in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)],
    "dual_clip": [{"clip_coef": e} for e in (0.1, 0.2, 0.3)],
    "sapo": [{"sapo_tau": t, "sapo_tau_neg": 1.05 * t} for t in (8.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.25)]
    + [{"sapo_tau": 1.0, "sapo_tau_neg": 2.0}],
    "tis": [{"tis_cap": c} for c in (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)],
    "spo": [{"spo_eps": e} for e in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 4.0)],
}
SAMPLES = (1, 8, 64, 512)


def advantages(policy) -> np.ndarray:
    """A(a) in S0 of a policy (3, 4), exact: solves Bellman's equation for V(S0), V(S1), V(S2)."""
    transitions = np.zeros((3, 4))
    np.add.at(transitions, (np.arange(3)[:, None], NEXT_STATE), policy)
    values = np.append(np.linalg.solve(np.eye(3) - GAMMA * transitions[:, :3], np.full(3, -1.0)), 0.0)
    return -1 + GAMMA * values[NEXT_STATE[0]] - values[0]


@dataclass(frozen=True)
class Estimate:
    """One estimator in one case: its expectation, one sample's variance, its bias, its direction's cosine."""

    expectation: float
    variance: float
    bias: float
    cosine: float  # of the expected gradient over all four logits of S0 with the true one; NaN if it vanishes

    def mse(self, n) -> float:
        """Mean squared error of the mean of n samples."""
        return self.bias**2 + self.variance / n


def estimate(target: str, behaviour: str, method: str, **flags) -> Estimate:
    """Exact moments of the estimator by a sum over the four actions."""
    pi = TARGETS[target][0]
    mu = pi if BEHAVIOURS[behaviour] is None else BEHAVIOURS[behaviour]
    advantage = advantages(TARGETS[target])
    # shrunk slightly, so that rounding does not put a ratio of exactly 1 +- epsilon outside of the clip
    logratio = np.log(pi / mu) * (1 - 1e-12)
    coef = coefficients(loss(method, **flags), logratio, advantage)
    score = np.eye(4) - pi  # row a: gradient of log pi(a) with respect to the four logits
    gradient, truth = (mu * coef * advantage) @ score, (pi * advantage) @ score
    sample = coef * advantage * score[:, RIGHT]
    expectation = mu @ sample
    norms = np.linalg.norm(gradient) * np.linalg.norm(truth)
    return Estimate(
        expectation=expectation,
        variance=mu @ (sample - expectation) ** 2,
        bias=expectation - truth[RIGHT],
        cosine=gradient @ truth / norms if norms > 0 else np.nan,
    )


def estimates() -> pd.DataFrame:
    """A line for each case, method and flags. The bias has no sign. The cosine is empty where no gradient is left."""
    lines = []
    for (target, behaviour), (method, sweep) in itertools.product(CASES, SWEEPS.items()):
        for flags in sweep:
            found = estimate(target, behaviour, method, **flags)
            words = " ".join(f"{flag}={value:g}" for flag, value in flags.items())
            line = {"target": target, "behaviour": behaviour, "method": method, "flags": words}
            line |= {"expectation": found.expectation, "variance": found.variance, "bias": abs(found.bias)}
            lines.append(line | {f"mse_{n}": found.mse(n) for n in SAMPLES} | {"cosine": found.cosine})
    # 12 places: rounding noise of float64 stays out of sight; + 0.0 makes -0 a 0
    table = pd.DataFrame(lines)
    numbers = table.select_dtypes("number").columns
    table[numbers] = table[numbers].round(12) + 0.0
    return table


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, sorted by the first."""
    frontier: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not frontier or y < frontier[-1][1]:
            frontier.append((x, y))
    return frontier


def draw_plane() -> plt.Figure:
    """Bias against variance, relative to plain IS, with each method's frontier as its bandwidth sweeps."""
    fig, axes = plt.subplots(2, 3, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
    for ax, (target, behaviour) in zip(axes.T.flat, [(t, b) for t in TARGETS for b in "CG"], strict=True):
        plain = estimate(target, behaviour, "plain_is")
        for method, sweep in SWEEPS.items():
            if method == "dual_clip":  # no ratio above 3 here, where it would differ from PPO-clip
                continue
            found = [estimate(target, behaviour, method, **flags) for flags in sweep]
            points = [(100 * abs(e.bias / plain.expectation), 100 * e.variance / plain.variance) for e in found]
            label, color, line = methods.style(method)
            ax.plot(*zip(*points, strict=True), "o", color=color, markersize=3, alpha=0.4)
            marker = "*" if method == "plain_is" else "."
            ax.plot(*zip(*pareto(points), strict=True), marker=marker, linestyle=line, color=color, label=label)
        ax.set_title(f"target {target}, behaviour {behaviour}", fontsize=10)
        ax.set_xlim(-5, 150)
        ax.set_ylim(-5, 150)
    fig.supxlabel("bias, % of the true gradient (above 100 the expected sign may be wrong)", fontsize=10)
    fig.supylabel("variance of one sample, % of plain IS's", fontsize=10)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=9)
    return fig


def draw_sigma() -> plt.Figure:
    """GIPO's best sigma against the number of samples, and the direction of its expected gradient against sigma."""
    sigmas, samples = np.geomspace(0.1, 20, 150), np.geomspace(1, 4096, 49)
    fig, (best, cosine) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    styles = dict(zip(TARGETS, [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":")], strict=True))
    for target, behaviour in OFF_POLICY:
        found = [estimate(target, behaviour, "gipo", sigma=sigma) for sigma in sigmas]
        color, line = styles[target]
        label = f"target {target}" if behaviour == "A" else None
        mse = np.array([[e.mse(n) for n in samples] for e in found])
        best.plot(samples, sigmas[mse.argmin(0)], line, color=color, label=label)
        cosine.plot(sigmas, [e.cosine for e in found], line, color=color, label=label)
    best.set(xscale="log", yscale="log", xlabel="samples n in the mean", ylabel="σ with the least MSE(n)")
    best.axhline(sigmas[-1], color="black", linewidth=0.8)
    best.text(1, sigmas[-1] * 0.95, "end of the sweep: plain IS", va="top", fontsize=9)
    cosine.set(xscale="log", xlabel="σ", ylabel="cosine of the expected and the true gradient")
    cosine.axvline(0.5, color="black", linewidth=0.8)
    cosine.text(0.52, 0.05, "default σ", transform=cosine.get_xaxis_transform(), fontsize=9)
    cosine.legend(fontsize=9)
    return fig


def main(out: Path = Path("docs/figures")):
    """Solve the GridWorld and draw it.

    Args:
        out: folder for bias_variance.csv, bias_variance.png and best_sigma.png; created if need be
    """
    make_folder(out)
    estimates().to_csv(out / "bias_variance.csv", index=False, float_format="%.12f")
    draw_plane().savefig(out / "bias_variance.png", dpi=150)
    draw_sigma().savefig(out / "best_sigma.png", dpi=150)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
