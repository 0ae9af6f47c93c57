"""What a session of a model holds: which tensors, of which shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# What a session holds before its first token.
ALWAYS = ("pending", "recent")
_SLOTTED = ("0.keys", "0.values", "0.slots")


def misfit(found: Mapping[str, Tensor], made: Mapping[str, Tensor], rows: int) -> str | None:
    """In what the tensors ``found`` of ``rows`` rows differ from those that a model has made of one row.

    Both by their names in a session; None if in nothing. A session that has read nothing fits.
    """
    if found.keys() <= set(ALWAYS):
        made = {name: made[name] for name in ALWAYS}
    if lacking := sorted(made.keys() - found.keys()):
        return f"it lacks {lacking[0]}"
    if strange := sorted(found.keys() - made.keys()):
        return f"it holds {ascii(strange[0])[:80]}"
    # The slots of a Context-KV model grow, those of all rows together.
    slots = [tensor.shape[1] for name, tensor in found.items() if name == "0.slots" and tensor.ndim == 2]
    for name, like in made.items():
        shape = [rows, *like.shape[1:]]
        if slots and name in _SLOTTED:
            shape[1] = slots[0]
        one = found[name]
        if list(one.shape) != shape or one.dtype != like.dtype:
            return f"{name} must be {like.dtype} {shape}, got {one.dtype} {list(one.shape)}"
    return None
