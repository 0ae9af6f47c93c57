"""The checkout as tests of its shape see it: files, parsed sources, imports, the README's file tree."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


def git(*arguments: str) -> list[str]:
    """Lines that a git command prints about this checkout."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@cache
def files() -> tuple[str, ...]:
    """Files that git knows or would take, as paths from the root."""
    listed = git("ls-files", "--cached", "--others", "--exclude-standard")
    return tuple(sorted({name for name in listed if (ROOT / name).is_file()}))


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[str]:
    """Those of :func:`files` under ``folders`` that have one of ``suffixes``."""
    return [name for name in files() if name.startswith(folders) and name.endswith(suffixes)]


@cache
def parse(name: str) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


class Import(NamedTuple):
    """One imported name: ``module`` it comes from, ``name`` taken from it (None for a whole module)."""

    module: str
    name: str | None
    line: int
    in_function: bool


def imports(name: str) -> Iterator[Import]:
    """All imports of a file, those in function bodies included; relative ones are made absolute."""
    package = name.removesuffix(".py").split("/")[:-1]
    for node, in_function in _walk(parse(name), False):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(module, alias.name, node.lineno, in_function) for alias in node.names)


def _walk(node: ast.AST, in_function: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, in_function
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, inside)


def readme_tree() -> dict[str, str]:
    """Path -> description in the README's file tree: the fenced block that has a line for ``newllm/``.

    A line is an indented name (a folder ends in a slash) and its description; names nest by indentation.
    """
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    trees = [block for block in blocks if any(line.split()[:1] == ["newllm/"] for line in block.splitlines())]
    assert len(trees) == 1, "README.md needs one fenced block with the file tree, newllm/ among its lines"
    entries: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in trees[0].splitlines()[1:]:
        if not line.strip():
            continue
        name, _, description = line.strip().partition(" ")
        depth = len(line) - len(line.lstrip())
        parents = [(d, parent) for d, parent in parents if d < depth]
        path = "".join(parent for _, parent in parents) + name
        assert path not in entries, f"README.md lists {path} twice"
        entries[path] = description.strip()
        if name.endswith("/"):
            parents.append((depth, name))
    return entries
