"""The ``newllm`` command.

One module per command, ``newllm/cli/<command>.py``; only the one that is asked for is imported. It has

* ``Options``, a plain dataclass: the one schema behind flags, ``--config file.yaml``, ``--print_config`` and
  ``--help``. A field without a default is an argument given by its place (or a flag that must be given, if it
  is ``kw_only``), a dataclass as a field is a group (``--train.lr``), and the docstring describes the command
  and, under ``Args:``, its fields;
* ``run(options: Options) -> int | None``, whose result is the exit code (None: 0);

or, for a command with sub-commands (``newllm data list``), ``COMMANDS``: name -> ``Command(Options, run)``.

Modules import torch, transformers and the like inside ``run``, so that ``--help`` stays quick. A failure
that a user can mend is a ValueError, OSError or RuntimeError with one clear sentence; ``main`` prints it
and returns 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple

from newllm.spelling import did_you_mean

HELP = {
    "demo": "train a small model in five minutes and see it recall what left its window long ago",
    "train": "train a model on any text, with nothing lost",
    "eval": "recall by length and depth, perplexity by position, what memories give",
    "diagnose": "what contexts do: attractors, rank, identity, convergence; what a memory holds",
    "scaling": "two-phase models over data, architectures and diversity losses",
    "convert": "give a Llama-family checkpoint a window and a memory",
    "generate": "continue a text",
    "chat": "talk with a model",
    "serve": "answer many at once over HTTP, as OpenAI's clients ask",
    "data": "texts and models that can be fetched",
    "bench": "times of the operators beside what could be used instead",
    "doctor": "versions, devices, and which implementation each operator takes",
}


class Command(NamedTuple):
    """A command: the dataclass of its options, and what it does with them.

    A sub-command with a ``flag`` needs no name: the flag calls it (``newllm eval MODEL --suite ...``).
    """

    options: type[Any]
    run: Callable[[Any], int | None]
    flag: str | None = None


def main(argv: list[str] | None = None) -> int:
    """Run ``newllm`` with ``argv`` (None: the process's); the exit code.

    0 is success, 2 a failure told in one sentence on stderr, 130 an interruption. ``--debug`` as the first
    word lets failures through, with their tracebacks.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["--debug"]:
        return _dispatch(words[1:])
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        print("newllm: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"newllm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview("newllm", HELP))
        print("newllm --version        the version\nnewllm --debug ...      with tracebacks")
        return 0 if words else 2
    if words[0] == "--version":
        from newllm import __version__

        print(__version__)
        return 0
    name = _known("command", words[0], HELP)
    module = import_module(f"{__name__}.{name}")
    if hasattr(module, "COMMANDS"):
        return _dispatch_below(f"newllm {name}", module.COMMANDS, words[1:])
    return _run(f"newllm {name}", Command(module.Options, module.run), words[1:])


def _dispatch_below(name: str, commands: dict[str, Command], words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        from newllm.cli.options import summary

        print(_overview(name, {key: summary(command.options) for key, command in commands.items()}))
        return 0 if words else 2
    given = {word.partition("=")[0] for word in words}
    called = next((command for command in commands.values() if command.flag in given), None)
    if called is not None and words[0] not in commands:
        return _run(name, called, words)
    key = _known(f"command of {name!r}", words[0], commands)
    return _run(f"{name} {key}", commands[key], words[1:])


def _run(name: str, command: Command, words: list[str]) -> int:
    from newllm.cli.options import parse

    options = parse(command.options, words, name=name)
    return 0 if options is None else command.run(options) or 0


def _overview(name: str, commands: dict[str, str]) -> str:
    width = max(map(len, commands)) + 2
    lines = [f"  {key:{width}}{text}" for key, text in commands.items()]
    return "\n".join([f"usage: {name} COMMAND ...", "", *lines, "", f"{name} COMMAND --help   its options"])


def _known(what: str, name: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    if name not in allowed:
        hint = did_you_mean(name, allowed)
        raise ValueError(f"{name!r} is no {what}: it must be one of {', '.join(allowed)}{hint}")
    return name
