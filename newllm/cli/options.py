"""A command's options from one dataclass: flags, YAML keys, ``--print_config`` and ``--help``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")
_OWN = ("config", "print_config", "help")


def argument(help: str) -> Any:
    """A field given by its place: ``newllm convert SOURCE``."""
    return dataclasses.field(metadata={"help": help, "positional": True})


def required(help: str) -> Any:
    """A field given by a flag, without a default."""
    return dataclasses.field(metadata={"help": help})


def option(default: Any, help: str) -> Any:
    """A field given by a flag: ``max_new_tokens`` by ``--max-new-tokens``; a False one is a bare switch."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def group(kind: type[Any], help: str) -> Any:
    """A field that is itself a dataclass of options: its flags are ``--field.name``."""
    return dataclasses.field(default_factory=kind, metadata={"help": help})


def parse(kind: type[T], words: list[str], *, name: str, description: str) -> T | None:
    """The options ``words`` ask for; None when they asked for help or for the configuration, now printed.

    Raises ``ValueError`` for what is unknown (naming what is nearest), missing or of the wrong type.
    """
    from argparse import ArgumentError

    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=name, description=_joined(description), exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options; later flags win")
    for key, field, hint in _leaves(kind):
        _add(parser, key, field, hint)
    known = [key for key, _, _ in _leaves(kind)]
    _check_flags(words, known, name)
    for file in _config_files(words):
        _check_keys(file, known)
    try:
        found = parser.parse_args(words)
    except ArgumentError as error:
        raise ValueError(_sentence(error)) from error
    except SystemExit:
        sys.stdout.flush()
        return None
    options: T = _build(kind, found)
    return options


def _leaves(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Dotted names, fields and types of all options, groups opened."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _leaves(hint, f"{key}.")
        else:
            yield key, field, hint


def _add(parser: Any, key: str, field: dataclasses.Field[Any], hint: Any) -> None:
    if field.metadata.get("positional"):
        parser.add_argument(key, type=hint, metavar=key.upper(), help=field.metadata["help"])
        return
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    shape: dict[str, Any] = {"type": hint, "default": default}
    if default is False:
        shape = {"action": "store_true"}
    elif default is dataclasses.MISSING:
        shape = {"type": hint, "required": True}
    parser.add_argument(f"--{key.replace('_', '-')}", help=field.metadata["help"], **shape)


def _check_flags(words: list[str], known: list[str], name: str) -> None:
    flags = [f"--{key.replace('_', '-')}" for key in known]
    allowed = {*flags, *(f"{flag}+" for flag in flags), *(f"--{key}" for key in _OWN)}
    for word in words:
        flag = word.partition("=")[0]
        if word == "--":
            return
        if flag.startswith("--") and flag not in allowed and not any(map(str.isspace, flag)):
            raise ValueError(f"{name} has no option {flag}{_nearest(flag, flags)}")


def _config_files(words: list[str]) -> Iterator[Path]:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == "--config" and after:
            yield Path(after)
        elif word.startswith("--config="):
            yield Path(word.partition("=")[2])


def _check_keys(path: Path, known: list[str]) -> None:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration file {path} is no YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"the configuration file {path} must hold 'key: value' lines")
    for key in _dotted(content, known):
        if key not in known:
            raise ValueError(
                f"the configuration file {path} has an unknown key {key!r}{_nearest(key, known)}"
            )


def _dotted(content: Mapping[Any, Any], known: list[str], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from _dotted(value, known, f"{key}.")
        else:
            yield key


def _nearest(name: str, allowed: list[str]) -> str:
    near = get_close_matches(name, allowed, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _sentence(error: Exception) -> str:
    """jsonargparse's complaint in one line, in the words of the command line."""
    text = _joined(str(error)).removeprefix("Parser key ")
    return text.replace("typing.", "").replace("<class '", "").replace("'>", "")


def _joined(text: str) -> str:
    return " ".join(text.split())


def _build(kind: type[Any], found: Any) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        value, hint = getattr(found, field.name), hints[field.name]
        values[field.name] = _build(hint, value) if dataclasses.is_dataclass(hint) else value
    return kind(**values)
