"""The rules that keep the rooms apart and the files small (CONTRIBUTING.md), as tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache

import pytest
import yaml
from source_tree import ROOT, SOURCE_SUFFIXES, Import, files, git, imports, parse, readme_tree, sources

import newllm

# Each room may import from the layers above it in this list, and from itself.
LAYERS = (
    {"files", "spelling", "types"},
    {"hub"},
    {"backend", "reference"},
    {"ops"},
    {"modules"},
    {"models", "data", "runs", "testing"},
    {"distributed"},
    {"training", "evaluation", "measuring", "serving"},
    {"cli"},
    {"__main__"},
)
LAYER = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
COMPILED = {"kernels", "_C"}
MAX_LINES = 450
ROWS_DUE = (*range(1, 86),)


def room_of(name: str) -> str:
    """The room that a file of newllm/ or kernels/ belongs to; "" is the package's own __init__.py."""
    parts = name.removesuffix(".py").removeprefix("newllm/").split("/")
    return "" if parts[0] == "__init__" else parts[0]


def room_imported(used: Import) -> str | None:
    """The room that an import reaches, "" for the package root, None for what is not ours."""
    parts = used.module.split(".")
    if parts[0] != "newllm":
        return None
    if len(parts) > 1:
        return parts[1]
    if used.name in newllm._PUBLIC:
        return newllm._PUBLIC[used.name].split(".")[1]
    return used.name if used.name in {*LAYER, *COMPILED} else ""


def allowed(room: str, target: str, used: Import) -> bool:
    if target == room or (target == "" and used.name == "__version__"):
        return True
    if target in COMPILED:
        return room == "ops" and used.in_function
    return room in LAYER and target in LAYER and LAYER[target] < LAYER[room]


def test_imports_go_downward_only() -> None:
    wrong = [
        f"{name}:{used.line} reaches {target or 'the package root'}"
        for name in sources("newllm/", "kernels/")
        if name != "newllm/__init__.py"
        for used in imports(name)
        if (target := room_imported(used)) is not None and not allowed(room_of(name), target, used)
    ]
    assert wrong == []


def test_package_root_imports_only_the_standard_library() -> None:
    tree = parse("newllm/__init__.py")
    checked = {id(node) for block in tree.body if isinstance(block, ast.If) for node in ast.walk(block)}
    modules = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in checked
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert {str(name).split(".")[0] for name in modules} <= sys.stdlib_module_names


def test_every_room_has_a_layer() -> None:
    assert {room_of(name) for name in sources("newllm/")} <= {"", "kernels", *LAYER}


def test_no_file_is_long() -> None:
    lengths = {
        name: len((ROOT / name).read_bytes().splitlines()) for name in sources("", suffixes=SOURCE_SUFFIXES)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_kernels_is_flat_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [name for name in files() if name.startswith("kernels/") and name.count("/") > 1] == []


def test_only_backend_asks_about_devices_and_installs() -> None:
    asked = {"is_available", "is_cuda", "find_spec", "environ"}
    wrong = [
        f"{name}:{node.lineno}"
        for name in sources("newllm/", "kernels/")
        if name != "newllm/backend.py"
        for node in questions(parse(name))
        if asked & {getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "name", None)}
    ]
    assert wrong == []


def questions(tree: ast.Module) -> list[ast.AST]:
    """All nodes but the ``**os.environ`` that hands the environment on to a child process."""
    handed_on = {
        id(value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if key is None
    }
    return [node for node in ast.walk(tree) if id(node) not in handed_on]


def test_no_environment_variable_of_our_own() -> None:
    read = [
        ast.unparse(node.args[0])
        for name in sources("newllm/", "kernels/")
        for node in ast.walk(parse(name))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"os.getenv", "getenv"}
    ]
    assert set(read) <= {"'XDG_CACHE_HOME'"}


def test_operators_import_without_triton_and_extension() -> None:
    blocked = "import sys; sys.modules.update({'triton': None, 'newllm._C': None})"
    code = f"{blocked}; import newllm.ops; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("imported\n", 0), done.stderr


def test_public_names_have_docstrings() -> None:
    missing = []
    for name in sources("newllm/", "kernels/"):
        tree = parse(name)
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        missing += [
            f"{name} {getattr(n, 'name', '')}".rstrip() for n in (tree, *public) if not ast.get_docstring(n)
        ]
    assert missing == []


def test_presets_load() -> None:
    presets = sources("newllm/configs/", suffixes=(".yaml",))
    assert "newllm/configs/senri-documents.yaml" in presets
    for name in presets:
        content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
        assert isinstance(content, dict) and content, f"{name} is not a mapping"


def test_missing_packages_are_not_hidden() -> None:
    """An ImportError may be caught only to raise a clearer one."""
    hidden = [
        f"{name}:{node.lineno}"
        for name in sources("newllm/", "kernels/")
        for node in ast.walk(parse(name))
        if isinstance(node, ast.ExceptHandler)
        and node.type is not None
        and re.search(r"\b(ImportError|ModuleNotFoundError)\b", ast.unparse(node.type))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]
    assert hidden == []


def is_literal_number(node: ast.AST | None) -> bool:
    """Whether an expression is made of numbers alone and is not zero."""
    if node is None or not all(
        isinstance(part, ast.Constant | ast.UnaryOp | ast.BinOp | ast.operator | ast.unaryop)
        for part in ast.walk(node)
    ):
        return False
    return any(isinstance(part, ast.Constant) and part.value for part in ast.walk(node))


def test_no_tolerance_is_tuned_by_hand() -> None:
    """Bounds are derived from float64 and eps (newllm/testing); zero, that is equality, may be written."""
    names = {"atol", "rtol", "abs", "rel"}
    literal = [
        f"{name}:{node.lineno}"
        for name in [*sources("tests/", "benchmarks/"), *sources("newllm/testing")]
        for node in ast.walk(parse(name))
        if (isinstance(node, ast.keyword) and node.arg in names and is_literal_number(node.value))
        or (
            isinstance(node, ast.Assign)
            and {ast.unparse(target) for target in node.targets} & names
            and is_literal_number(node.value)
        )
    ]
    assert literal == []


def test_readme_describes_every_file_in_one_line() -> None:
    entries = readme_tree()
    code = sources("newllm/", "kernels/", "csrc/", "benchmarks/", suffixes=SOURCE_SUFFIXES)
    packages = {f"{name.rpartition('/')[0]}/" for name in code if name.endswith("/__init__.py")}
    top = {name for name in files() if "/" not in name and not name.startswith(".") and name != "README.md"}
    folders = {"tests/", "newllm/configs/"}
    wanted = (
        {name for name in code if not name.endswith("/__init__.py")} | packages | top | folders | {".ci/run"}
    )
    assert sorted(wanted - entries.keys()) == []
    known = {*files(), *(f"{part}/" for name in files() for part in ancestors(name))}
    assert sorted(entries.keys() - known) == []
    assert [path for path, description in entries.items() if not description] == []


def ancestors(name: str) -> list[str]:
    """The folders above a file, as paths from the root."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


@cache
def function_names() -> tuple[str, ...]:
    """Of all functions in tests."""
    nodes = (node for name in sources("tests/") for node in ast.walk(parse(name)))
    return tuple(node.name for node in nodes if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", ROWS_DUE)
def test_checklist_row_has_a_test(row: int) -> None:
    tests = [name for name in function_names() if name.startswith(f"test_row_{row:02d}_")]
    assert tests, f"no test function is named test_row_{row:02d}_..."


def test_row_85_ci_runs_the_checks_that_contributing_names() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    tests = "pytest -q -n auto --dist worksteal"
    commands = ["python -m ruff check .", "python -m ruff format --check .", "python -m mypy", tests]
    assert [line for line in script if line in commands] == commands
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [command for command in commands if command not in text] == []
    assert tests in (ROOT / "README.md").read_text(encoding="utf-8")


def test_row_85_commit_subjects_are_short() -> None:
    subjects = git("log", "-20", "--no-merges", "--format=%s")
    assert [subject for subject in subjects if len(subject) > 50] == []


def test_row_85_file_names_carry_no_version_or_date() -> None:
    suffix = re.compile(r"[_-](v\d+|\d{4,}|\d{4}-\d\d-\d\d|old|new|final|copy|backup)\.\w+$")
    assert [name for name in files() if suffix.search(name)] == []


def test_row_85_no_code_is_kept_as_a_comment_and_nothing_is_left_to_do() -> None:
    dead = re.compile(
        r"^\s*(#|//)\s*(import \w|from \S+ import|def \w+\(|class \w+[(:]|return\b|print\(|#include)"
    )
    open_end = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X])\b")
    found = [
        f"{name}:{number}"
        for name in sources("", suffixes=SOURCE_SUFFIXES)
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if dead.match(line) or open_end.search(line)
    ]
    assert found == []
