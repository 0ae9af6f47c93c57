"""What a wheel and an sdist hold; ``newllm.kernels`` and Hugging Face's ``kernels`` live together."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    """Run ``command`` in ``cwd`` with ``path`` as PYTHONPATH; its standard output."""
    # What a package holds does not depend on CUDA, whose kernels take minutes to compile.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "NEWLLM_CUDA": "0"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def source_files() -> list[str]:
    """Files of the checkout that git knows or would take."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return sorted({name for name in listed if (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of this checkout, and the wheel built from that sdist."""
    tree = tmp_path_factory.mktemp("tree")
    for name in source_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the wheel."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target)
    run(*pip, wheel, cwd=target)
    return target


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a distribution named ``kernels``, as Hugging Face's would be installed."""
    site = tmp_path_factory.mktemp("stand_in")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("stand_in = True\n")
    metadata = site / "kernels-0.99.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99.0\n")
    return site


def test_wheel_holds_the_package_and_no_strays(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"newllm"}
    assert not [name for name in names if name.endswith((".pyc", ".cu", ".cuh", ".cpp"))]
    sources = [
        n for n in source_files() if n.startswith("newllm/") and n.endswith((".py", ".yaml", "py.typed"))
    ]
    kernels = [f"newllm/{name}" for name in source_files() if name.startswith("kernels/")]
    assert {*sources, *kernels} <= set(names)
    assert "newllm/kernels/__init__.py" not in names


def test_wheel_states_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    text = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    assert "License-Expression: Apache-2.0" in archive.read(text["METADATA"]).decode()
    assert "newllm = newllm.cli:main" in archive.read(text["entry_points.txt"]).decode()
    assert archive.read(text["LICENSE"]) == (ROOT / "LICENSE").read_bytes()


def test_sdist_holds_native_sources_and_kernels(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [name for name in source_files() if name.startswith(("csrc/", "kernels/", "newllm/"))]
    assert {*wanted, "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.parametrize(
    "situation", ["checkout_from_root", "checkout_from_elsewhere", "installed_from_elsewhere"]
)
def test_both_kernels_are_found(situation: str, installed: Path, stand_in: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata, kernels, newllm, newllm.kernels as ours;"
        "assert kernels.stand_in and importlib.metadata.version('kernels') == '0.99.0';"
        "print(newllm.__file__, *ours.__path__)"
    )
    home, kernels = (installed, "newllm/kernels") if situation.startswith("installed") else (ROOT, "kernels")
    cwd = ROOT if situation.endswith("root") else tmp_path
    output = run(sys.executable, "-c", code, cwd=cwd, path=(home, stand_in))
    assert output.split() == [str(home / "newllm" / "__init__.py"), str(home / kernels)]


def test_alone_the_folder_is_no_package() -> None:
    """From the root ``kernels`` is an empty namespace at most, which transformers takes for absent."""
    code = "from importlib.util import find_spec; print(getattr(find_spec('kernels'), 'origin', None))"
    assert run(sys.executable, "-S", "-c", code, cwd=ROOT) == "None"
