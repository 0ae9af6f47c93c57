"""``import newllm`` is cheap, and every public name is there when touched."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import newllm

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_cheap_and_brings_neither_torch_nor_transformers() -> None:
    timed = (
        "import sys, time; start = time.process_time(); import newllm; spent = time.process_time() - start;"
        "print(spent, [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    runs = [run(timed).split(" ", 1) for _ in range(5)]
    assert [loaded for _, loaded in runs] == ["[]"] * 5
    assert min(float(spent) for spent, _ in runs) < 0.05


@pytest.mark.parametrize("name", sorted(newllm._PUBLIC))
def test_public_name_is_its_module_s(name: str) -> None:
    value = getattr(newllm, name)
    module = sys.modules[newllm._PUBLIC[name]]
    assert value is (module if name == "ops" else vars(module)[name])
    assert name in dir(newllm)


def test_convert_is_the_function_whatever_was_imported_first() -> None:
    code = "import newllm.models.convert, newllm; print(callable(newllm.convert), newllm.convert.__name__)"
    assert run(code) == "True convert"


def test_type_checkers_see_the_same_table() -> None:
    tree = ast.parse(Path(newllm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    static = {
        alias.asname: f"newllm.{alias.name}" if node.module == "newllm" else node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert static == newllm._PUBLIC


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'newllm' has no attribute 'SenriForEverything'"):
        newllm.SenriForEverything  # noqa: B018


def test_version_is_that_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert newllm.__version__ == project["version"]
