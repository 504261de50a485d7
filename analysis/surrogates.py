"""The picture of the surrogates: what a sample's gradient is multiplied by, and how many samples lose theirs.

    python -m analysis.surrogates     # docs/figures/surrogates.png

Left and middle: the coefficient c of c A grad log pi against the log-ratio x, for both signs of A. Right: the share of
samples that teach next to nothing, |c| < 0.001 as in `offpolicy/dead_fraction`, against the drift s. There x is drawn
from N(-s^2 / 2, s^2), so the mean ratio is 1. Both signs of A are equally likely and independent of x.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy.stats import norm

from analysis.coefficients import coefficients, loss, make_folder
from benchmark import methods

# at the defaults of benchmark/variants.py, and GIPO with the width of gipo_continuous.py
LINES = [(method, {}) for method in ("plain_is", "clip", "dual_clip", "sapo", "tis", "spo", "gipo")]
LINES += [("gipo", {"sigma": 1.0})]


def drifted(s: float, points: int = 20_001) -> tuple[np.ndarray, np.ndarray]:
    """Log-ratios and their probabilities under N(-s^2 / 2, s^2), in equal cells over 10 deviations to each side."""
    edges = np.linspace(-10, 10, points + 1)
    z = (edges[1:] + edges[:-1]) / 2
    return -(s**2) / 2 + s * z, np.diff(norm.cdf(edges))


def dead_share(method: str, s: float, threshold: float = 1e-3, points: int = 20_001, **flags) -> float:
    """Share of samples with |c| below the threshold at drift s, both signs of the advantage alike."""
    logratio, mass = drifted(s, points)
    own = loss(method, **flags)
    return float(np.mean([mass @ (np.abs(coefficients(own, logratio, sign)) < threshold) for sign in (1, -1)]))


def draw() -> plt.Figure:
    """Both coefficients and the dead share, by method."""
    fig, (positive, negative, dead) = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
    logratio = np.linspace(-2, 2, 801)
    drifts = np.linspace(0.01, 2, 100)
    for method, flags in LINES:
        label, color, line = methods.style(method)
        style = {"linestyle": line, "color": color, "linewidth": 0.8 if flags else 1.5}
        label = ", ".join([label, *(f"{flag} {value:g}" for flag, value in flags.items())])
        for ax, sign in ((positive, 1), (negative, -1)):
            ax.plot(logratio, coefficients(loss(method, **flags), logratio, sign), label=label, **style)
        dead.plot(drifts, [100 * dead_share(method, s, **flags) for s in drifts], **style)
    for ax, sign in ((positive, ">"), (negative, "<")):
        ax.set(ylim=(-0.6, 2.6), xlabel="log-ratio x")
        ax.set_title(f"A {sign} 0", fontsize=10)
        ax.axhline(0, color="gray", linewidth=0.6)
    positive.set_ylabel("gradient coefficient c")
    dead.set(xlabel="drift s of the log-ratio", ylabel="samples with |c| < 0.001, %")
    dead.set_title("teach next to nothing", fontsize=10)
    fig.legend(*positive.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8, handlelength=2.5)
    return fig


def main(out: Path = Path("docs/figures")):
    """Draw the surrogates.

    Args:
        out: folder for surrogates.png; created if need be
    """
    draw().savefig(make_folder(out) / "surrogates.png", dpi=150)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
