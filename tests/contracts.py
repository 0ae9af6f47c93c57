"""The contract of a fused operator: what torch.library checks of its schema, fake and gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from newllm.testing import Inputs, OpCase, mapped


class Looking(TorchDispatchMode):
    """A mode that changes nothing; while one looks on, registered operators are called, and it notes how."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "newllm":
            self.calls[name] = args
        return func(*args, **(kwargs or {}))


def check_contracts(op: str, case: OpCase, inputs: Inputs) -> None:
    """Hold the operator ``op`` and its backward, as ``case`` calls them, to their contracts."""
    with Looking() as looking:
        case.results(partial(case.call, function=partial(case.public, backend="fused")), inputs)
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    for name, tests in ((op, checks), (f"{op}_backward", checks[:2])):
        # Below autograd no input has a gradient any more.
        given = mapped(Tensor.detach, looking.calls[name])
        if name == op:
            given = mapped(lambda x: x.requires_grad_(x.is_floating_point()), given)
        torch.library.opcheck(getattr(torch.ops.newllm, name).default, given, test_utils=tests)
