"""The YAML presets that come with newllm: ``--config demo``."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "configs"


def preset_path(name: str, command: str = "") -> Path:
    """The file of preset ``name``: that of the ``command``'s own, such as ``senri-quick``, comes first.

    Raises ``ValueError`` for an unknown one, with the nearest.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    own = f"{command.rpartition(' ')[2]}-{name}"
    if own in known:
        return FOLDER / f"{own}.yaml"
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"preset must be one of {', '.join(known)}, got {name!r}; did you mean {near!r}?")
    return FOLDER / f"{name}.yaml"
