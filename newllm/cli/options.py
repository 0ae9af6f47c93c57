"""A command's options from a plain dataclass: flags, YAML keys, ``--print_config`` and ``--help``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from newllm.cli.presets import preset_path
from newllm.files import one_line, read_yaml
from newllm.spelling import did_you_mean

T = TypeVar("T")
# The flags and keys that every command has besides its own.
_COMMON = ("--config", "--preset", "--print_config", "--help")


@dataclass
class Option:
    """One option: its dotted ``key``, dataclass ``field``, type, help and default (``MISSING``: none)."""

    key: str
    field: Field[Any]
    type: Any
    help: str
    default: Any

    @property
    def flag(self) -> str:
        """The flag of the command line, with dashes."""
        return f"--{self.key.replace('_', '-')}"


def parse(kind: type[T], words: list[str], *, name: str) -> T | None:
    """The dataclass ``kind`` that ``words`` ask for; None when they asked for help, which is now printed.

    A field without a default is an argument given by its place or, when it is ``kw_only``, a flag that must
    be given; all others are flags. Those that are False are switches, which mean true without a value.
    Fields that are dataclasses are groups: ``--group.field``. Help comes from the ``Args:`` section of the
    docstring.

    Raises ``ValueError`` for what is unknown (naming what is nearest), missing or of the wrong type.
    """
    from argparse import ArgumentError

    from jsonargparse import ActionConfigFile, ArgumentParser

    options = list(_options(kind))
    parser = ArgumentParser(
        prog=name, usage=_usage(name, options), description=summary(kind), exit_on_error=False
    )
    help = "YAML file of options, or the name of a preset (--preset NAME is the same); later flags win"
    parser.add_argument("--config", action=ActionConfigFile, help=help)
    for option in options:
        _add(parser, option)
    _check_flags(words, options, name)
    words = _with_values(_with_config_files(words, name), options)
    files = [file for word, file in pairwise(words) if word == "--config"]
    for file in files:
        _check_keys(Path(file), [option.key for option in options])
    try:
        options_found: T = _build(kind, parser.parse_args(words))
    except (ArgumentError, ValueError) as error:
        read = f" (with the configuration file {', '.join(files)})" if files else ""
        raise ValueError(f"{_sentence(error)}{read}") from error
    except SystemExit:
        return None
    return options_found


def _usage(name: str, options: list[Option]) -> str:
    """What must be given. The list below it has every option: there are too many for a line."""
    needed = [option for option in options if option.default is MISSING]
    places = [option.key.upper() for option in needed if not option.field.kw_only]
    flags = [f"{option.flag} {option.key.upper()}" for option in needed if option.field.kw_only]
    return " ".join([name, *places, *flags, "[OPTION ...]"])


def summary(kind: type[Any]) -> str:
    """What a docstring says before its sections."""
    return " ".join(
        re.split(r"\n\s*(?:Args|Raises):\n", inspect.getdoc(kind) or "")[0].replace("``", "`").split()
    )


def _options(kind: type[Any], prefix: str = "", group: Any = MISSING) -> Iterator[Option]:
    """All options, groups opened, each of which has the defaults that its own field made."""
    hints, texts = get_type_hints(kind), _described(kind)
    for field in fields(kind):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        default = _default(field) if group is MISSING else getattr(group, field.name)
        if is_dataclass(hint):
            yield from _options(hint, f"{key}.", default)  # type: ignore[arg-type]
        else:
            yield Option(key, field, hint, texts.get(field.name, ""), default)


def _default(field: Field[Any]) -> Any:
    """``MISSING`` without one."""
    made = field.default_factory
    return field.default if made is MISSING else made()


def _described(kind: type[Any]) -> dict[str, str]:
    """Field -> its text in ``Args:`` of ``kind``'s docstring or a base's; several may share a line."""
    names = "|".join(field.name for field in fields(kind))
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        doc = inspect.cleandoc(base.__doc__ or "")
        section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
        parts = re.split(rf"(?:^|\. )\s*({names}): ", section[1] if section else "", flags=re.MULTILINE)
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            found[name] = " ".join(text.split()).rstrip(".")
    return found


def _add(parser: Any, option: Option) -> None:
    help = option.help.replace("``", "`")
    if option.default is MISSING and not option.field.kw_only:
        parser.add_argument(option.key, type=option.type, metavar=option.key.upper(), help=help)
    elif option.default is MISSING:
        parser.add_argument(option.flag, type=option.type, required=True, help=help)
    elif option.default is False:
        parser.add_argument(option.flag, type=bool, default=False, metavar="[true|false]", help=help)
    else:
        parser.add_argument(option.flag, type=option.type, default=option.default, help=help)


def _check_flags(words: list[str], options: list[Option], name: str) -> None:
    flags = [option.flag for option in options]
    allowed = {*_COMMON, *flags, *(f"{flag}+" for flag in flags)}
    for word in words:
        flag = word.partition("=")[0]
        if word == "--":
            return
        if flag.startswith("--") and flag not in allowed and not any(map(str.isspace, flag)):
            raise ValueError(f"{flag} is no option of {name!r}{did_you_mean(flag, flags)}")


def _with_config_files(words: list[str], command: str) -> list[str]:
    """``words`` with the file behind each ``--config`` as a word of its own, presets by their path."""
    found: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "--preset"):
            found += ["--config", value] if equals else ["--config"]
        else:
            found.append(word)
    for place, (word, name) in enumerate(pairwise(found), 1):
        if word == "--config" and not Path(name).suffix and not Path(name).is_file():
            found[place] = str(preset_path(name, command))
    return found


def _with_values(words: list[str], options: list[Option]) -> list[str]:
    """``words`` with a value for each switch: a preset's true can be taken back by ``--switch false``."""
    switches = {option.flag for option in options if option.default is False}
    return [
        f"{word}=true" if word in switches and following.lower() not in ("true", "false") else word
        for word, following in zip_longest(words, words[1:], fillvalue="")
    ]


def _check_keys(path: Path, known: list[str]) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    content = read_yaml(path, "the configuration file")
    if not isinstance(content, Mapping):
        raise ValueError(f"the configuration file {path} must hold 'key: value' lines")
    for key in _dotted(content, known):
        if key not in known:
            near = did_you_mean(key, known)
            raise ValueError(f"the configuration file {path} has an unknown key {key[:80]!r}{near}")


def _dotted(content: Mapping[Any, Any], known: list[str], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from _dotted(value, known, f"{key}.")
        else:
            yield key


def _sentence(error: Exception) -> str:
    """jsonargparse's complaint on one line: the option, what is allowed, what came."""
    text = one_line(error).removeprefix("Parser key ")
    text = text.replace("typing.", "").replace("<class '", "").replace("'>", "")
    for pattern in _COMPLAINTS:
        if found := re.fullmatch(pattern, text):
            key, allowed, got = found.groups()
            kinds = re.sub(r"Literal\[([^\]]*)\]", r"\1", allowed).split(", ")
            return f"{key} must be {' or '.join(_KINDS.get(kind, kind) for kind in kinds)}, got {got}"
    return text


# The same once for a type, once for several of which one is to do.
_COMPLAINTS = (
    r'"(\S+)": Expected an? (.+)\. Got value: (.*)',
    r'"(\S+)": .* Subtypes: \[(.+)\] Errors: .* Given value: (.*)',
)
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "null",
    "list": "a list",
}


def _build(kind: Any, found: Any, prefix: str = "") -> Any:
    hints = get_type_hints(kind)
    values = {}
    for field in fields(kind):
        value, hint, key = getattr(found, field.name), hints[field.name], f"{prefix}{field.name}"
        # A file's null passes for any type.
        if value is None and type(None) not in get_args(hint):
            raise ValueError(f"{key} must have a value, got null")
        values[field.name] = _build(hint, value, f"{key}.") if is_dataclass(hint) else value
    return kind(**values)
