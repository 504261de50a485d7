"""What keeps four files honest that share their text: equal where they must be, different only in the method."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from typing import get_args

import pytest
from harness import DOMAIN_OF, GIPO, ROOT, SCRIPTS, source
from packaging.requirements import Requirement
from packaging.version import Version

import gipo_atari
import gipo_continuous
import gipo_minigrid_vision
import ppo_baseline

# title of a domain's section, and the package that only this domain needs
DOMAINS = {
    "atari": ("Atari", "ale-py"),
    "continuous": ("Continuous control", "metaworld"),
    "minigrid": ("MiniGrid vision", "minigrid"),
}
# what may differ between a script and the baseline
DOCSTRING = r'\A""".*?"""\n'
LOSS = r"^def policy_loss\(.*?(?=^def )"
DEFAULT = r"^    (?:sigma|clip_coef|kl_coef): float = [\d.]+\n"
FLAG = DEFAULT + r'    """[^\n]*"""\n'
UNIT = r'(?<=^    ratio: Literal\["action", "dimension"\] = )"\w+"'  # tuned too
# distribution by import name, where the two differ
DISTRIBUTIONS = {"ale_py": "ale-py"}
# metaworld forgot to declare packaging; gymnasium imports metaworld through the environment's id
UNIMPORTED = {"mujoco", "packaging", "metaworld"}


def without(text: str, *patterns: str) -> str:
    return re.sub("|".join(patterns), "", text, flags=re.MULTILINE | re.DOTALL)


def baseline_for(domain: str) -> str:
    """The baseline without the other domains: their sections, their packages, and their names in `Domain`."""
    text = source("ppo_baseline")
    for other in DOMAINS.keys() - {domain}:
        title, package = DOMAINS[other]
        for part in (rf"^# -+ {title} -+\n.*?(?=^# -)", rf'^#     "{package}[^\n]*\n'):
            assert len(re.findall(part, text, re.MULTILINE | re.DOTALL)) == 1, part
            text = without(text, part)
    return text.replace("Domain = Atari | Continuous | Minigrid", f"Domain = {domain.title()}")


def imports(name: str) -> set[str]:
    """Top-level packages that a script imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(source(name))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("name", GIPO)
def test_a_script_is_the_baseline_but_for_the_method(name):
    """To the letter: all but the docstring, policy_loss, and the method's flags with their defaults."""
    own, baseline = (
        without(text, DOCSTRING, LOSS, FLAG, DEFAULT, UNIT).splitlines()
        for text in (source(name), baseline_for(DOMAIN_OF[name]))
    )
    assert own == baseline


@pytest.mark.parametrize("part", [LOSS, FLAG])
def test_the_gipo_scripts_have_one_method(part):
    found = {"".join(re.findall(part, source(name), re.MULTILINE | re.DOTALL)) for name in GIPO}
    assert len(found) == 1 and "sigma" in found.pop()


@pytest.mark.parametrize("name", GIPO)
def test_the_diff_to_the_baseline_is_the_method(name, tmp_path):
    """At most 45 lines, and the loss comes first after the docstring."""
    (tmp_path / "baseline.py").write_text(baseline_for(DOMAIN_OF[name]))
    command = ["diff", tmp_path / "baseline.py", ROOT / f"{name}.py"]
    diff = subprocess.run(command, capture_output=True, text=True).stdout
    assert len(re.findall("^[<>]", diff, re.MULTILINE)) <= 45, diff
    body = ast.parse(source(name)).body
    (loss,) = [node for node in body if getattr(node, "name", "") == "policy_loss"]
    hunks = [int(line) for line in re.findall(r"^[\d,]+[acd](\d+)", diff, re.MULTILINE)]
    assert loss.lineno <= next(line for line in hunks if line > body[0].end_lineno) <= loss.end_lineno


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (gipo_atari.Atari, {"sigma": 0.5, "kl_coef": 0.1}),
        (gipo_continuous.Continuous, {"sigma": 1.0, "kl_coef": 0.3, "ratio": "action"}),
        (gipo_minigrid_vision.Minigrid, {"sigma": 0.5, "kl_coef": 0.1}),
        (ppo_baseline.Atari, {"clip_coef": 0.1, "kl_coef": 0.0}),
        (ppo_baseline.Continuous, {"clip_coef": 0.4, "kl_coef": 0.1, "ratio": "dimension"}),
        (ppo_baseline.Minigrid, {"clip_coef": 0.2, "kl_coef": 0.0}),
    ],
)
def test_defaults_of_the_dials(cls, expected):
    expected |= {"buffer_epochs": 1, "policy_lag": 0, "freeze_buffer_at": None, "advantage_source": "vtrace"}
    assert vars(cls()).items() >= (expected | {"kl_to": "current"}).items()


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_help_allows_to_be_0_may_be_0(name):
    module = SCRIPTS[name]
    flag = r'^    (\w+): (?:int|float)\b.* = .*\n    """([^"]*)"""'
    texts = dict(re.findall(flag, source(name), re.MULTILINE))
    zeros = [flag for flag, text in texts.items() if re.search(r"[(\s]0 (to|or|is|plays)\b", text)]
    assert {"ent_coef", "kl_coef", "policy_lag", "eval_episodes"} <= set(zeros)
    assert ("sticky_actions" in zeros) == hasattr(module, "Atari")
    for domain in get_args(module.Domain) or [module.Domain]:
        for flag in set(zeros) & vars(domain()).keys():
            module.check_flags(domain(**{flag: 0}))


def test_no_script_imports_ours():
    ours = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.iterdir()]}
    assert {"benchmark", "harness", "gipo_atari"} < ours
    for name in SCRIPTS:
        assert not imports(name) & ours


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_metadata_agrees_with_the_requirements_and_the_imports(name):
    scripts, _ = (ROOT / "requirements.txt").read_text().split("# the tests and the analysis\n")
    pins = {r.name: r for r in map(Requirement, re.findall("^[^#\n]+", scripts, re.MULTILINE))}
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source(name), re.MULTILINE)[1]
    metadata = tomllib.loads(re.sub("^# ", "", block, flags=re.MULTILINE))
    assert metadata["requires-python"] == ">=3.11"
    requirements = {r.name: r for r in map(Requirement, metadata["dependencies"])}
    for key, requirement in requirements.items():
        (pin,) = pins[key].specifier
        assert pin.operator == "==" and Version(pin.version) in requirement.specifier
    if name == "ppo_baseline":
        assert requirements.keys() == pins.keys()
    imported = imports(name) - set(sys.stdlib_module_names) | {"tensorboard"}  # through torch.utils
    assert {DISTRIBUTIONS.get(module, module) for module in imported} == requirements.keys() - UNIMPORTED


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_copied_alone_into_an_empty_folder(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    small = "--num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 1 --total-timesteps 32 --eval-episodes 0"
    domain = ["continuous"] if name == "ppo_baseline" else []
    command = [sys.executable, f"{name}.py", *domain, *small.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 1
