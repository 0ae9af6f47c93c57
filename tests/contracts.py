"""The contract of a fused operator: what torch.library checks of its schema, fake and gradient."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from newllm.testing import Inputs, OpCase, mapped


class Looking(TorchDispatchMode):
    """A mode that changes nothing: while one looks on, the registered operators are called."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def check_contracts(
    module: ModuleType, op: str, case: OpCase, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hold ``op`` of ``module`` and its backward, as ``case`` calls them, to their contracts."""
    calls: dict[str, tuple[Any, ...]] = {}
    inner = {name: getattr(module, name) for name in (op, f"{op}_backward")}

    def noted(name: str, *args: Any) -> Any:
        calls[name] = args
        return inner[name](*args)

    for name in inner:
        monkeypatch.setattr(module, name, partial(noted, name))
    with Looking():
        case.results(partial(case.call, function=partial(case.public, backend="fused")), inputs)
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(inner[op], calls[op], test_utils=checks)
    backward = f"{op}_backward"
    torch.library.opcheck(inner[backward], mapped(Tensor.detach, calls[backward]), test_utils=checks[:2])
