"""The YAML presets that come with newllm: ``--config demo``."""

from __future__ import annotations

from pathlib import Path

from newllm.spelling import did_you_mean

FOLDER = Path(__file__).resolve().parent.parent / "configs"


def preset_path(name: str, command: str = "") -> Path:
    """The file of preset ``name``: that of the ``command``'s own, such as ``senri-quick``, comes first.

    Raises ``ValueError`` for an unknown one.
    """
    files = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    prefix = f"{command.rpartition(' ')[2]}-"
    if f"{prefix}{name}" in files:
        return FOLDER / f"{prefix}{name}.yaml"
    if name not in files:
        # Of several commands' presets the reader wants those of this one.
        known = [file.removeprefix(prefix) for file in files if file.startswith(prefix)] or files
        hint = did_you_mean(name, known)
        raise ValueError(f"preset must be one of {', '.join(known)}, got {name!r}{hint}")
    return FOLDER / f"{name}.yaml"
