"""The one-line scripts: they parse, run dry, take the options of the command, and stop only themselves."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from newllm.cli.options import _options, parse
from newllm.cli.train import SenriOptions
from newllm.data.sources import SOURCES
from newllm.data.tokenizer import byte_tokenizer
from newllm.models.files import save_model
from tests.tiny_models import tiny_base

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHARED = EXAMPLES / "colab_train.sh"
SCRIPTS = sorted(EXAMPLES.glob("colab_train*.sh"))


def bash(*words: str | Path, cwd: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *map(str, words)], cwd=cwd, input=stdin, capture_output=True, text=True, check=False
    )


def would_run(printed: str) -> list[list[str]]:
    return [shlex.split(line)[2:] for line in printed.splitlines() if line.startswith("would run:")]


def test_row_67_every_dataset_has_its_script() -> None:
    assert [path.name for path in SCRIPTS] == sorted(
        ["colab_train.sh", *(f"colab_train_{name}.sh" for name in SOURCES)]
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_row_67_scripts_parse_and_run_dry(script: Path, tmp_path: Path) -> None:
    assert bash("-n", script, cwd=tmp_path).returncode == 0
    name = script.stem.partition("colab_train_")[2]
    words = ["--dry-run", "--train.steps", "7"]
    done = bash(script, *words, cwd=tmp_path) if name else bash(script, "dolly", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    install, start = would_run(done.stdout)
    assert install == ["python3", "-m", "pip", "install", "--quiet", str(EXAMPLES.parent)]
    assert start[:5] == ["nohup", "python3", "-m", "newllm", "train"]
    options = parse(SenriOptions, start[6:], name="newllm train senri")
    assert options is not None
    assert (options.data, options.train.steps, options.out) == (name or "dolly", 7, f"runs/{name or 'dolly'}")
    assert list(tmp_path.iterdir()) == []


def test_row_67_flags_equal_those_of_the_command(tmp_path: Path) -> None:
    """All that the command knows passes through; the script's own flags are none of the command's."""
    flags = [option.flag for option in _options(SenriOptions)]
    done = bash(SHARED, "dolly", "--dry-run", *flags, cwd=tmp_path)
    assert would_run(done.stdout)[-1][-len(flags) :] == flags
    usage = SHARED.read_text().split("set -euo")[0]
    own = set(re.findall(r"\[(--[\w-]+)", usage))
    cases = {*re.findall(r"--[\w-]+", SHARED.read_text().split("case $1 in")[1].split("*)")[0])}
    assert own == cases and not own & {*flags, "--config", "--preset"}


def test_piped_script_fetches_the_code(tmp_path: Path) -> None:
    """As from curl: no file of its own, so the repository is cloned, or renewed where it is."""
    text = SHARED.read_text()
    fresh = bash("-s", "--", "dolly", "--dry-run", "--ref", "x", cwd=tmp_path, stdin=text)
    assert would_run(fresh.stdout)[0][:2] == ["git", "clone"]
    (tmp_path / "newllm" / ".git").mkdir(parents=True)
    again = would_run(bash("-s", "--", "dolly", "--dry-run", "--ref", "x", cwd=tmp_path, stdin=text).stdout)
    assert again[0] == ["git", "-C", "newllm", "fetch", "--quiet", "--depth", "1", "origin", "x"]
    assert again[1] == ["git", "-C", "newllm", "reset", "--quiet", "--hard", "FETCH_HEAD"]
    assert again[2] == ["python3", "-m", "pip", "install", "--quiet", "newllm"]


def test_scripts_refuse(tmp_path: Path) -> None:
    nothing = bash(SHARED, cwd=tmp_path)
    assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1)
    assert "the first word must be a dataset" in nothing.stderr
    assert bash(SHARED, "dolly", "--log", cwd=tmp_path).stderr == "colab_train.sh: --log needs a value\n"


def test_script_starts_logs_and_stops_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pip and the training taken over by a stand-in for Python, which waits for its signal.

    That says its first word sooner than a training: the script waits three seconds for it, not ten.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 3\n")
    (tmp_path / "bin" / "sleep").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    python = tmp_path / "python"
    python.write_text(
        f"""#!{sys.executable}
import signal, sys, time
if "--print_config" in sys.argv and "--train.stepz" in sys.argv:
    sys.exit("newllm: --train.stepz is no option")
if "pip" in sys.argv or "--print_config" in sys.argv:
    sys.exit()
print("training", flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
time.sleep(120)
"""
    )
    python.chmod(0o755)
    other = subprocess.Popen([python])
    done = bash(EXAMPLES / "colab_train_dolly.sh", "--python", python, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training" in done.stdout and "monitor: tail -f train-dolly.log" in done.stdout
    pid = int(re.findall(r"stop: +kill (\d+) ", done.stdout)[0])
    assert (tmp_path / "train-dolly.pid").read_text() == f"{pid}\n"
    assert re.findall(r"kill\S* .*", SHARED.read_text()) == [
        'kill $pid        (saves a checkpoint; the same line again goes on from it)"'
    ]
    os.kill(pid, signal.SIGTERM)
    for _ in range(100):
        if (tmp_path / "train-dolly.log").read_text() == "training\nsaved\n":
            break
        time.sleep(0.05)
    assert (tmp_path / "train-dolly.log").read_text() == "training\nsaved\n"
    assert other.poll() is None
    other.kill()
    other.wait()
    wrong = bash(SHARED, "dolly", "--python", python, "--train.stepz", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (1, "newllm: --train.stepz is no option\n")


def test_all_addresses_are_the_repository_of_the_package() -> None:
    """It moves by one ``sed``: over this folder and ``pyproject.toml``."""
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]
    raw = repository.replace("//github.com/", "//raw.githubusercontent.com/") + "/main/examples/"
    for file in EXAMPLES.iterdir():
        found = re.findall(r"https://[^\s\"\\]+", file.read_text(encoding="utf-8"))
        assert [one for one in found if one != repository and not one.startswith(raw)] == []
        assert found, file


def test_notebook_runs_existing_scripts_and_is_not_indented() -> None:
    notebook = json.loads((EXAMPLES / "colab_train.ipynb").read_text())
    cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    used = {name for cell in cells for name in re.findall(r"examples/(\S+\.sh)", cell)}
    assert used and used <= {path.name for path in SCRIPTS}
    assert [line for cell in cells for line in cell.splitlines() if line.startswith(" ")] == []
    named = " ".join(cell["source"] for cell in notebook["cells"])
    assert [name for name in SOURCES if name not in named] == []


# In place of what a notebook's machine has: the address of the repository, its clone, an installation.
STAND_INS = {
    "curl": 'url=${{@: -1}}; exec cat "{root}/examples/${{url##*/}}"',
    "git": 'test "$1" = clone && ln -s "{root}" "${{@: -1}}"',
    "newllm": 'exec {python} -m newllm "$@"',
    "python3": 'if [[ $2 == pip ]]; then exit; fi; exec {python} "$@" {options}',
}


def test_notebook_runs_from_cell_to_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, on rows and a base model of this machine: the last cells find what the first one made."""
    save_model(tiny_base("llama", vocab_size=264), byte_tokenizer(), tmp_path / "base")
    small = {
        "base": tmp_path / "base", "source.mirror": EXAMPLES.parent / "tests" / "hub_fixtures",
        "convert.window": 16, "convert.segment": 8, "convert.memory-layers": "[1]", "stream.length": 32,
        "train.steps": 3, "train.warmup-steps": 1, "train.fp16": "false", "train.checkpointing": "false",
        "train.eval-steps": 1,
    }  # fmt: skip
    words = {"root": EXAMPLES.parent, "python": sys.executable}
    words["options"] = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in small.items())
    (tmp_path / "bin").mkdir()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script.format(**words)}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    seen: list[object] = []
    looks = SimpleNamespace(
        Image=lambda name: Path(name).read_bytes(), Markdown=lambda filename: Path(filename).read_text(),
        display=seen.append,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=looks))
    monkeypatch.setitem(sys.modules, "IPython.display", looks)
    told = []
    for cell in json.loads((EXAMPLES / "colab_train.ipynb").read_text())["cells"]:
        source = cell["source"].removeprefix("%%bash\n")
        if cell["cell_type"] == "code" and source.startswith(("!", "curl")):
            done = bash("-c", source.removeprefix("!"), cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            told.append(done.stdout)
        elif cell["cell_type"] == "code":
            exec(source, {})
    started, watched, answer = told
    assert "monitor: tail -f train-wikitext-2.log" in started
    assert "the model is in runs/wikitext-2/best (best)" in watched
    summary, picture = seen
    assert "Salesforce/wikitext" in str(summary) and bytes(picture[:4]) == b"\x89PNG"  # type: ignore[index]
    assert answer.strip()
