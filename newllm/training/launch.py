"""The same command in several processes of this machine, by torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def launched_command(words: list[str], config: Path, processes: int) -> list[str]:
    """The command that runs ``newllm`` with ``words`` and the options in ``config`` in ``processes``."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun, "-m", "newllm.cli", *words, "--config", str(config)]


def launch(words: list[str], options: Mapping[str, Any], out: Path, processes: int) -> None:
    """Become torchrun, which runs ``newllm`` with ``words`` and ``options`` in ``processes`` processes.

    The options are handed over in ``out``'s ``launch.yaml``. Does not return.
    """
    import yaml

    out.mkdir(parents=True, exist_ok=True)
    file = out / "launch.yaml"
    file.write_text(yaml.safe_dump(dict(options), sort_keys=False), encoding="utf-8")
    sys.stdout.flush()
    command = launched_command(words, file, processes)
    os.execv(command[0], command)
