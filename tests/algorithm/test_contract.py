"""What keeps four files honest that share their text: equal where they must be, different only in the method."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from functools import cache

import pytest
from harness import DOMAIN_OF, ENTRIES, GIPO, MAIN, ROOT, SCRIPTS, load, source
from packaging.requirements import Requirement
from packaging.version import Version

# definitions that may differ between a GIPO script and the baseline
METHOD = {"Args", "policy_loss", "RANGES", "DOMAINS"}
# lines of code and tokens: what a reader is spared
LIMITS = {
    "gipo_atari": (440, 5300),
    "gipo_continuous": (440, 5300),
    "gipo_minigrid_vision": (470, 5700),
    "ppo_baseline": (680, 8000),
    "gipo_trl": (330, 3600),
}
# what one domain adds to the baseline outside of its own section: lines with one of these words
FOREIGN = {
    "atari": {"import ale_py", '"ale-py', "torch.distributions.categorical", "(make_atari_envs, "},
    "continuous": {'"metaworld', "torch.distributions.normal", "(make_continuous_envs, "},
    "minigrid": {
        "import minigrid",
        '"minigrid',
        "torch.distributions.categorical",
        "functools import cache",
        "(make_minigrid_envs, ",
    },
}
TITLES = {"atari": "Atari", "continuous": "Continuous control", "minigrid": "MiniGrid vision"}
ORDER = ["Loss", "Flags", "Replay buffer, advantages", "Checkpoints, evaluation", "Command line"]
# distribution by import name, where the two differ
DISTRIBUTIONS = {"ale_py": "ale-py"}
# metaworld forgot to declare packaging; gymnasium imports metaworld through the environment's id
UNIMPORTED = {"mujoco", "packaging", "metaworld"}
BANNER = re.compile(r"^# -+ (.+?) -+$", re.MULTILINE)


@cache
def definitions(name: str) -> dict[str, str]:
    """Text of every top-level definition and constant by name, comments inside included."""
    text = source(name)
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(text, node)
    return found


def sections(name: str) -> dict[str, str]:
    """Text between the banner lines (`# --- Title ---`) of a script, by title; the part below main left out."""
    parts = BANNER.split(source(name).split(MAIN)[0])
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def imports(name: str) -> list[str]:
    """Modules that a script imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(source(name))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom)]


def script_metadata(name: str) -> dict:
    """The PEP 723 block of a script."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source(name), re.MULTILINE)[1]
    return tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))


def size(name: str) -> tuple[int, int]:
    """Lines of code and tokens: without blanks, comments and docstrings, those of fields included."""
    text, skipped, lines, tokens = source(name), set(), set(), 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT and token.string.strip() and token.start[0] not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
            tokens += 1
    return len(lines), tokens


def baseline_for(domain: str) -> str:
    """The baseline without the other domains: their sections, and single lines that name them."""
    text, left_out = source("ppo_baseline"), set()
    for other in TITLES.keys() - {domain}:
        text, count = re.subn(rf"^# -+ {TITLES[other]} -+\n.*?(?=^# -)", "", text, flags=re.MULTILINE | re.DOTALL)
        assert count == 1, other
        left_out |= FOREIGN[other] - FOREIGN[domain]
    lines = text.splitlines(keepends=True)
    assert all(sum(word in line for line in lines) == 1 for word in left_out)
    return "".join(line for line in lines if not any(word in line for word in left_out))


def test_bodies_are_identical():
    bodies = [source(name).split(MAIN) for name in SCRIPTS]
    assert all(len(parts) == 2 for parts in bodies)
    assert len({body for _, body in bodies}) == 1
    assert len(bodies[0][1].splitlines()) + 1 <= 140


@pytest.mark.parametrize("name", GIPO)
def test_definitions_that_the_baseline_shares_are_identical(name):
    own, baseline = definitions(name), definitions("ppo_baseline")
    assert set(own) <= set(baseline)
    assert {key for key in own if own[key] != baseline[key]} == METHOD


@pytest.mark.parametrize("key", ["policy_loss", "diagnostics"])
def test_the_distributed_script_has_the_same_loss(key):
    assert definitions("gipo_rllib")[key] == definitions("gipo_continuous")[key]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_order_of_a_script(name):
    titles = list(sections(name))
    domains = [TITLES[DOMAIN_OF[name]]] if name in GIPO else list(TITLES.values())
    assert titles == [*ORDER[:-1], *domains, ORDER[-1]]
    lines = source(name).splitlines()
    assert next(i for i, line in enumerate(lines, start=1) if line.startswith("def policy_loss")) < 60
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", GIPO)
def test_the_diff_to_the_baseline_is_the_method(name, tmp_path):
    """At most 60 lines: docstring, loss, flags, the domain's defaults, and where its own flags stand."""
    (tmp_path / "ppo.py").write_text(baseline_for(DOMAIN_OF[name]))
    command = ["diff", tmp_path / "ppo.py", ROOT / f"{name}.py"]
    diff = subprocess.run(command, capture_output=True, text=True).stdout
    assert 20 < len(re.findall("^[<>]", diff, re.MULTILINE)) <= 60, diff


@pytest.mark.parametrize("name", GIPO)
def test_defaults_equal_the_baseline_s(name):
    (own,) = (vars(cls()) for cls in load(name).DOMAINS)
    baseline = vars(list(load("ppo_baseline").DOMAINS)[list(TITLES).index(DOMAIN_OF[name])]())
    differ = {key for key in own.keys() & baseline.keys() if own[key] != baseline[key]}
    assert differ == {"exp_name", "kl_coef"} and baseline["kl_coef"] == 0
    assert own.keys() ^ baseline.keys() == {"sigma", "sigma_neg", "clip_coef"}


@pytest.mark.parametrize("name", LIMITS)
def test_length(name):
    lines, tokens = size(name)
    assert lines <= LIMITS[name][0] and tokens <= LIMITS[name][1], (lines, tokens)


def test_no_script_imports_ours():
    ours = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
    for name in SCRIPTS:
        assert not {module.split(".")[0] for module in imports(name)} & ours


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_metadata_agrees_with_the_requirements_and_the_imports(name):
    scripts, _ = (ROOT / "requirements.txt").read_text().split("# the tests and the analysis\n")
    pins = {r.name: r for r in map(Requirement, scripts.split("\n")[1:-2])}
    metadata = script_metadata(name)
    assert metadata["requires-python"] == ">=3.11"
    requirements = {r.name: r for r in map(Requirement, metadata["dependencies"])}
    for key, requirement in requirements.items():
        (pin,) = pins[key].specifier
        assert pin.operator == "=="
        assert Version(pin.version) in requirement.specifier
    if name == "ppo_baseline":
        assert requirements.keys() == pins.keys()
    imported = {module.split(".")[0] for module in imports(name)} - set(sys.stdlib_module_names)
    needed = {DISTRIBUTIONS.get(module, module) for module in imported} | {"tensorboard"}  # through torch.utils
    assert needed == requirements.keys() - UNIMPORTED


@pytest.mark.slow
@pytest.mark.parametrize(("name", "domain"), ENTRIES)
def test_runs_copied_alone_into_an_empty_folder(name, domain, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    small = "--num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 1 --total-timesteps 32".split()
    small += ["--eval-episodes", "0"]
    command = [sys.executable, f"{name}.py", *domain, *small]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 1
