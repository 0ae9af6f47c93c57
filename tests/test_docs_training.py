"""docs/training.md: every place it names exists, every command it shows is one."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from newllm import cli
from newllm.cli import Command, chat, data, train
from newllm.cli.options import parse
from newllm.data.vocabularies import KINDS
from newllm.hub import hub_id

ROOT = Path(__file__).resolve().parent.parent
ROWS = re.findall(
    r"^\| (?!feature)(\S.*?) \| `(\S+)` \| `(.+)` \|$", (ROOT / "docs" / "training.md").read_text(), re.M
)
# What is refused on purpose, and says so when it runs.
REFUSED = {"--train.stepz": "no option"}
GROUPS = {"train": train.COMMANDS, "data": data.COMMANDS}


def test_table_is_whole() -> None:
    assert len(ROWS) >= 48
    assert [where for _, where, _ in ROWS if not (ROOT / where).is_file()] == []


@pytest.mark.parametrize("line", sorted({command for *_, command in ROWS}))
def test_shown_commands_are_commands(line: str) -> None:
    name, *words = shlex.split(line)
    if name in ("python", "bash"):
        assert name == "python" or (ROOT / words[0]).is_file()
        return
    assert name == "newllm" and words[0] in cli.HELP
    if words[0] in GROUPS:
        found, rest = GROUPS[words[0]][words[1]], words[2:]
    else:
        found, rest = Command(chat.Options, chat.run), words[1:]
    refused = REFUSED.keys() & set(rest)
    if refused:
        with pytest.raises(ValueError, match=REFUSED[refused.pop()]):
            parse(found.options, rest, name=line)
        return
    options = parse(
        found.options, [word for word in rest if word != "--print_config"], name=" ".join(words[:2])
    )
    assert options is not None and replace(options) == options
    named = getattr(options, "tokenizer", None) or "bytes"
    assert named.partition(":")[0] in ("bytes", *KINDS) or hub_id(named)
