"""How a method is run, and how it looks: its name and color are the same in every figure and table.

Figures of results dash the lines of one method, those of the theory its coefficient. A method of variants.py that is
not listed here has its own name, a grey line, and no dashes.
"""

from benchmark.runner import Run

# Okabe and Ito's palette, which colour-blind readers can tell apart; no two methods share a color
STYLES = {
    "gipo": ("GIPO", "#0072B2", "-"),
    "clip": ("PPO-clip", "#D55E00", "--"),
    "sapo": ("SAPO", "#009E73", "-."),
    "tis": ("TIS", "#CC79A7", (0, (6, 2))),
    "decoupled": ("decoupled PPO", "#8C564B", (0, (5, 1))),
    "plain_is": ("plain IS", "#000000", (0, (1, 1))),
    "spo": ("SPO", "#56B4E9", (0, (3, 1, 1, 1, 1, 1))),
    "dual_clip": ("dual-clip", "#E69F00", ":"),
    "asymmetric": ("asymmetric GIPO", "#332288", "-"),
    "one_sided": ("one-sided GIPO", "#88CCEE", "-"),
    "sb3-ppo": ("PPO of Stable-Baselines3", "#999933", "-"),
    "sb3-sac": ("SAC of Stable-Baselines3", "#882255", "-"),
    "vespo": ("VESPO", "#F0E442", "-"),
    "cispo": ("CISPO", "#DDCC77", "-"),
    "none": ("no correction", "#AA4499", ":"),
    "random": ("random actions", "#BBBBBB", "-"),
}


def style(method: str) -> tuple:
    """Name, color and dashes of a method."""
    return STYLES.get(method, (method, "#777777", "-"))


def name(method: str) -> str:
    return style(method)[0]


# by the first four letters of an environment's id: the baseline's subcommand and GIPO's script
DOMAINS = {"ALE/": ("atari", "gipo_atari.py"), "Mini": ("minigrid", "gipo_minigrid_vision.py")}
CONTINUOUS = ("continuous", "gipo_continuous.py")


def run(method: str, env_id: str, seed: int, line: str = "", **flags) -> Run:
    """A run of a method; equal flags give equal commands. Without `eval_episodes` no evaluation follows."""
    domain, gipo = DOMAINS.get(env_id[:4], CONTINUOUS)
    last = {"eval_episodes": flags.pop("eval_episodes", 0)}
    flags = {"env_id": env_id, "seed": seed, **dict(sorted(flags.items())), **last}
    scripts = {"gipo": gipo, "clip": f"ppo_baseline.py {domain}"}
    script = scripts.get(method, f"benchmark/variants.py --method {method}")
    return Run(method, script, {flag: x for flag, x in flags.items() if x is not None}, line or name(method))
