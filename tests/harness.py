"""Loads the scripts for the tests: their definitions as a module, their body run in it, their logs read back."""

import signal
import sys
from pathlib import Path
from types import ModuleType

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark.scripts import ROOT, run_body
from benchmark.scripts import load as load
from benchmark.variants import load_variant as load_variant

MAIN = 'if __name__ == "__main__":\n'
DOMAIN_OF = {"gipo_atari": "atari", "gipo_continuous": "continuous", "gipo_minigrid_vision": "minigrid"}
GIPO = list(DOMAIN_OF)
SCRIPTS = [*GIPO, "ppo_baseline"]
# every way to start a script: name and the arguments that select its domain
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


def flags(module: ModuleType, domain: int = 0, **values):
    """The flags of a loaded script, of its first domain or another one, with these values."""
    return list(module.DOMAINS)[domain](**values)


def watch(monkeypatch, owner, name: str, note) -> list:
    """A list that takes note(*args) before each call of owner.name."""
    noted, function = [], getattr(owner, name)

    def watched(*args, **kwargs):
        noted.append(note(*args, **kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    return noted


def run(module: ModuleType, monkeypatch, folder: Path, argv: list[str]) -> ModuleType:
    """Runs the body of a loaded script in `folder` as if started with `argv`; its variables end up in the module.

    No evaluation follows unless argv asks for one.
    """
    argv = [*map(str, argv)]
    if not {"--eval-episodes", "--evaluate"} & set(argv):
        argv += ["--eval-episodes", "0"]
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *argv])
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        run_body(module)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    return module


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by tag, read back from the one TensorBoard run under `folder`."""
    (run_folder,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
