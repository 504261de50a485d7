"""Loads the scripts as modules, so that parts of them can be watched or replaced before their body runs."""

import ast
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
_fresh = itertools.count()


def load(name: str) -> ModuleType:
    """A fresh module with the definitions of a script; its body has not run."""
    alias = f"{name}_{next(_fresh)}"
    spec = importlib.util.spec_from_file_location(alias, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module  # dataclasses and tyro look up the module of a class here
    spec.loader.exec_module(module)
    return module


def run_body(module: ModuleType):
    """Runs the code below `__main__` with the current sys.argv and working directory."""
    body = ast.parse(Path(module.__file__).read_text())
    body.body = [node for node in body.body if isinstance(node, ast.If)]
    module.__name__ = "__main__"
    try:
        exec(compile(body, module.__file__, "exec"), vars(module))
    finally:
        module.__name__ = module.__spec__.name
