"""What the tests of evaluation share: a text, a small byte model, and the losses of one whole pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.data.tokenizer import BYTES, SPECIAL_TOKENS
from newllm.models.senri import SenriForCausalLM
from tests.tiny_models import tiny_senri

PROSE = "It is a truth universally acknowledged, that 1 single man must be in want of a wife. " * 20
BYTE_SIZES = {"vocab_size": BYTES + len(SPECIAL_TOKENS)}


def byte_senri(**options: Any) -> SenriForCausalLM:
    """A random Senri for the byte tokenizer."""
    return tiny_senri(**BYTE_SIZES, **options)


def losses_of(model: SenriForCausalLM, ids: Tensor) -> Tensor:
    """The losses ``[T - 1]`` of one whole pass."""
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[1:], reduction="none")
