"""Options of commands: one dataclass behind flags, YAML, ``--print_config`` and ``--help``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from newllm.cli import HELP
from newllm.cli.options import _options, parse
from newllm.cli.presets import FOLDER
from newllm.cli.train import RecallOptions


@dataclass
class Inner:
    """A group.

    Args:
        rate: how fast. steps: how many.
    """

    rate: float = 0.5
    steps: int = 3


@dataclass
class Options:
    """Do something with `source`.

    More about it.

    Args:
        source: where from.
        out: where to, 100% of it.
        window_size: keys that a query sees.
        layers: which
            of them.
        kind: one of two.
        fast: not slow.
        careful: looks twice.
        inner: the group.
    """

    source: str
    out: str = field(kw_only=True)
    window_size: int = 8
    layers: list[int] | None = None
    kind: Literal["a", "b"] = "a"
    fast: bool = False
    careful: bool = True
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {self.window_size}")


@dataclass
class Fast:
    """Options with a faster group.

    Args:
        inner: the group.
    """

    inner: Inner = field(default_factory=lambda: Inner(rate=2.0))


def parsed(*words: str) -> Any:
    return parse(Options, list(words), name="newllm something")


def test_defaults_are_those_of_the_dataclass() -> None:
    assert parsed("x", "--out", "y") == Options("x", out="y")


def test_a_group_has_the_defaults_that_its_command_gives_it() -> None:
    assert parse(Fast, [], name="newllm fast") == Fast(Inner(rate=2.0, steps=3))
    assert parse(Fast, ["--inner.steps", "9"], name="newllm fast") == Fast(Inner(rate=2.0, steps=9))
    recall = parse(RecallOptions, [], name="newllm train recall")
    assert recall is not None and recall.stream.kind == "needles"


def test_flags_have_dashes_and_dots_and_their_own_types() -> None:
    words = "x --out y --window-size 16 --layers [1,2] --kind b --fast --careful false --inner.rate 5e-3"
    expected = Options("x", 16, [1, 2], "b", True, False, Inner(rate=5e-3), out="y")
    assert parsed(*words.split()) == expected
    assert parsed("--window-size=16", "--out=y", "x").window_size == 16


def test_switch_of_a_file_can_be_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("out: y\nfast: true\n")
    for words, fast in {"": True, "--fast": True, "--fast False": False, "--fast=false": False}.items():
        assert parsed("--config", str(file), *words.split(), "x").fast is fast
    assert parsed("--fast", "false", "--out", "y", "--fast", "x") == Options("x", fast=True, out="y")
    with pytest.raises(ValueError, match="fast must be true or false, got maybe"):
        parsed("--fast=maybe", "--out", "y", "x")


def test_file_gives_options_and_later_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("out: y\nwindow_size: 16\nfast: true\ninner:\n  rate: 5e-3\n")
    expected = Options("x", out="y", window_size=16, fast=True, inner=Inner(rate=5e-3))
    assert parsed("x", "--config", str(file)) == expected
    assert parsed(f"--config={file}", "x", "--inner.steps", "9").inner == Inner(5e-3, 9)
    assert parsed("x", "--config", str(file), "--window-size", "4").window_size == 4


def test_printed_configuration_is_a_file_of_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parsed("x", "--out", "y", "--inner.steps", "9", "--print_config") is None
    printed = capsys.readouterr().out
    content = yaml.safe_load(printed)
    assert content["inner"] == {"rate": 0.5, "steps": 9}
    (tmp_path / "printed.yaml").write_text(printed)
    assert parsed("x", "--config", str(tmp_path / "printed.yaml")) == Options(
        "x", out="y", inner=Inner(steps=9)
    )


def test_help_says_what_the_docstring_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--help") is None
    said = " ".join(capsys.readouterr().out.split())
    assert "Do something with `source`. More about it. positional" in said
    for text in (
        "SOURCE where from (",
        "--out OUT where to, 100% of it (required",
        "--window-size WINDOW_SIZE keys that a query sees (type: int, default: 8)",
        "which of them (",
        "--fast [true|false] not slow (type: bool, default: False)",
        "--inner.rate RATE how fast (type: float, default: 0.5)",
        "--inner.steps STEPS how many (type: int, default: 3)",
    ):
        assert text in said


def test_help_begins_with_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--help") is None
    assert capsys.readouterr().out.splitlines()[0] == "usage: newllm something SOURCE --out OUT [OPTION ...]"


@pytest.mark.parametrize("name", HELP)
def test_every_option_of_every_command_is_described(name: str) -> None:
    module = import_module(f"newllm.cli.{name}")
    kinds = [command.options for command in getattr(module, "COMMANDS", {}).values()] or [module.Options]
    assert [
        (kind.__name__, option.flag) for kind in kinds for option in _options(kind) if not option.help
    ] == []


UNKNOWN = "is no option of 'newllm something'"
PRESETS = f"preset must be one of {', '.join(sorted(path.stem for path in FOLDER.glob('*.yaml')))}, got"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("x --out y --windw-size 4", f"--windw-size {UNKNOWN}; did you mean '--window-size'?"),
        ("x --out y --inner.step 4", f"--inner.step {UNKNOWN}; did you mean '--inner.steps'?"),
        ("x --out y --window 4", f"--window {UNKNOWN}; did you mean '--window-size'?"),
        ("x --out y --qqqq", f"--qqqq {UNKNOWN}"),
        ("--out y", "the following arguments are required: source"),
        ("x", "the following arguments are required: out"),
        ("x z --out y", "unrecognized arguments: z"),
        ("x --out", "argument --out: expected one argument"),
        ("x --out y --window-size z", "window_size must be a whole number, got z"),
        ("x --out y --kind c", "kind must be 'a' or 'b', got c"),
        ("x --out y --layers 3", "layers must be list[int] or null, got 3"),
        ("x --out y --window-size 0", "window_size must be at least 1, got 0"),
        ("x --out y --config dmo", f"{PRESETS} 'dmo'; did you mean 'demo'?"),
        ("x --out y --config", "argument --config: expected one argument"),
    ],
    ids=str,
)
def test_wrong_words_are_told_in_one_sentence(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parsed(*words.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("windw_size: 4", "{} has an unknown key 'windw_size'; did you mean 'window_size'?"),
        ("inner:\n  stepps: 4", "{} has an unknown key 'inner.stepps'; did you mean 'inner.steps'?"),
        ("- 1", "{} must hold 'key: value' lines"),
        ("", "{} must hold 'key: value' lines"),
        ("a: [", "{} cannot be read: "),
    ],
    ids=str,
)
def test_wrong_files_are_told_in_one_sentence(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match="the configuration file") as error:
        parsed("x", "--out", "y", "--config", str(file))
    assert str(error.value).startswith(f"the configuration file {message.format(file)}")


def test_missing_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    with pytest.raises(FileNotFoundError, match=f"there is no configuration file {file}"):
        parsed("x", "--out", "y", "--config", str(file))


def test_presets_that_are_named_are_the_commands_own() -> None:
    with pytest.raises(
        ValueError, match=r"^preset must be one of quick, got 'qick'; did you mean 'quick'\?$"
    ):
        parse(Options, ["--preset", "qick"], name="newllm train cvfpt")


def test_values_of_the_wrong_type_in_a_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("inner: {rate: fast}")
    with pytest.raises(ValueError, match=r"^inner\.rate must be a number, got fast \(with .*some\.yaml\)$"):
        parsed("x", "--out", "y", "--config", str(file))
    file.write_text("inner: {rate: }")
    with pytest.raises(ValueError, match=r"^inner\.rate must have a value, got null \(with .*some\.yaml\)$"):
        parsed("x", "--out", "y", "--config", str(file))
