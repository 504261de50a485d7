"""What the tests of the scripts share: the scripts as modules, runs of them, and their logs read back."""

import sys
from pathlib import Path
from types import ModuleType

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gipo_atari
import gipo_continuous
import gipo_minigrid_vision
import ppo_baseline

ROOT = Path(__file__).parents[1]
GIPO = {"gipo_atari": gipo_atari, "gipo_continuous": gipo_continuous, "gipo_minigrid_vision": gipo_minigrid_vision}
SCRIPTS = GIPO | {"ppo_baseline": ppo_baseline}
DOMAIN_OF = {"gipo_atari": "atari", "gipo_continuous": "continuous", "gipo_minigrid_vision": "minigrid"}
# every way to start a script: its name and the arguments that select its domain
ENTRIES = [(name, []) for name in GIPO] + [("ppo_baseline", [domain]) for domain in DOMAIN_OF.values()]
# what every run logs; "charts/success_rate" comes where the environment reports a success
TAGS = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/learning_rate",
    "charts/SPS",
    "losses/value_loss",
    "losses/policy_loss",
    "losses/entropy",
    "losses/kl",
    "losses/kl_step",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
    "losses/grad_norm",
    "offpolicy/age_mean",
    "offpolicy/age_max",
    "offpolicy/abs_logratio_p95",
    "offpolicy/ess",
    "offpolicy/dead_fraction",
    "offpolicy/coef_mean",
}


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def watch(monkeypatch, owner, name: str, note) -> list:
    """A list that takes note(*args) before each call of owner.name."""
    noted, function = [], getattr(owner, name)

    def watched(*args, **kwargs):
        noted.append(note(*args, **kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    return noted


def run(module: ModuleType, monkeypatch, folder: Path, argv: list) -> int | None:
    """Runs the command line of a script in `folder`; returns its exit code, which is None if all went well.

    No evaluation follows unless argv asks for one.
    """
    argv = [*map(str, argv)]
    if not {"--eval-episodes", "--evaluate"} & set(argv):
        argv += ["--eval-episodes", "0"]
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *argv])
    monkeypatch.chdir(folder)
    return module.main()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by tag, read back from the one TensorBoard run under `folder`."""
    (run_folder,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
