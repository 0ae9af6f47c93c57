"""The ranges that pyproject.toml declares: what is installed lies in them, and CI runs both of their ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from newllm import backend

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = {Requirement(text).name: Requirement(text) for text in PROJECT["dependencies"]}
WIDE = ("torch", "triton", "transformers")


def needed(requirement: Requirement) -> bool:
    """Whether this machine is one that needs it."""
    return requirement.marker is None or requirement.marker.evaluate()


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_installed_is_supported(name: str) -> None:
    """Red as soon as an environment leaves a range: widen the range and test both ends, or pin."""
    requirement = REQUIRED[name]
    if not needed(requirement):
        pytest.skip(f"{name} is not needed here")
    assert requirement.specifier.contains(version(name), prereleases=True), f"{requirement}: {version(name)}"


def test_ranges_have_ends_where_interfaces_move() -> None:
    ends = {name: {each.operator for each in REQUIRED[name].specifier} for name in WIDE}
    assert ends == {"torch": {">=", "<"}, "triton": {">="}, "transformers": {">=", "<"}}
    assert sys.version_info[:2] >= tuple(map(int, re.findall(r"\d+", PROJECT["requires-python"])))


def test_versions_are_what_the_environment_says() -> None:
    """``newllm doctor`` and the records of runs name the versions that these tests are about."""
    info = backend.build_info()
    assert {name: Version(info[name]) for name in WIDE if needed(REQUIRED[name])} == {
        name: Version(version(name)) for name in WIDE if needed(REQUIRED[name])
    }


@pytest.mark.parametrize(
    ("found", "outside"),
    [
        ({}, []),
        ({"transformers": "5.16.2"}, ["transformers 5.16.2 (supported: >=5.17,<5.24)"]),
        ({"transformers": "6.0", "torch": "2.14.0+cpu"}, None),
        ({"torch": "2.13.0+cu130"}, []),
    ],
)
def test_a_range_is_not_left_in_silence(
    found: dict[str, str], outside: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pip refuses may still come about, by ``pip install --no-deps`` or a path: the doctor says so."""
    monkeypatch.setattr(backend, "requires", lambda name: PROJECT["dependencies"])
    monkeypatch.setattr(backend, "version", lambda name: found.get(name, version(name)))
    said = backend.unsupported()
    assert said == outside if outside is not None else len(said) == 2


def test_ci_runs_the_oldest_transformers_too() -> None:
    """The oldest is taken from pyproject.toml itself, the newest is what pip installs."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    command = re.search(r"oldest=\$\(python -c '(.*?)'\)", script, re.DOTALL)
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-c", command[1]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (lowest,) = (each.version for each in REQUIRED["transformers"].specifier if each.operator == ">=")
    assert done.stdout.strip() == f"transformers=={lowest}.*"
    tested = re.search(r'PYTHONPATH="\$scratch/oldest" python -m pytest .* tests/test_\{(.*)\}\.py', script)
    assert tested is not None
    names = tested[1].split(",")
    assert {"senri", "convert", "session"} <= set(names)
    assert [name for name in names if not (ROOT / f"tests/test_{name}.py").is_file()] == []


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--sdist", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = dist.glob("*.tar.gz")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("programs", "native"),
    [("/usr/bin:/bin", "present"), ("", "absent")],
    ids=["with a compiler", "with Python alone"],
)
def test_sdist_installs_in_a_bare_environment(
    programs: str, native: str, sdist: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """An environment that holds nothing and inherits no variables, with a C++ compiler and with Python alone.

    What needs no PyTorch works there; lent what is installed here, it trains, generates and says what it has.
    """
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "bare")], check=True)
    bin = tmp_path / "bare" / "bin"
    kept = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE", "SSL_CERT_FILE", "HTTPS_PROXY")
    bare = {name: os.environ[name] for name in kept if name in os.environ}
    bare |= {
        "PATH": f"{bin}:{programs}",
        "HOME": str(tmp_path),
        "NEWLLM_CUDA": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=bare, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    start = time.perf_counter()
    run("pip", "install", "--quiet", "--no-deps", str(sdist))
    record_property("install_seconds", round(time.perf_counter() - start, 1))
    record_property("sdist_bytes", sdist.stat().st_size)
    assert run("newllm", "--version") == PROJECT["version"]
    assert "train a model on any text" in run("newllm", "--help")
    code = "import newllm, newllm.kernels, importlib.util as u; print(u.find_spec('newllm._C') is not None)"
    assert run("python", "-c", code) == str(native == "present")

    (site,) = (tmp_path / "bare" / "lib").glob("*/site-packages")
    (site / "lent.pth").write_text("\n".join(each for each in sys.path if each.endswith("-packages")))
    said = run("python", "-c", "import newllm.backend as b; print(b.__file__, b.build_info()['native'])")
    assert said.startswith(f"{site / 'newllm' / 'backend.py'} {native}")
    run("newllm", "train", "senri", "--preset", "quick", "--train.steps", "2")
    assert run("newllm", "generate", "runs/train/last", "--prompt", "Python is")
    record_property("extension", native)
