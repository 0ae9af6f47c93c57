"""Prompts read by one process and by several: the streams that follow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newllm.distributed.line import Line
from newllm.distributed.prefill import prefill, score
from newllm.evaluation.control import zero_memories
from newllm.evaluation.forced import last_logits
from newllm.models.session import Session
from tests.sequence_ranks import meeting
from tests.tiny_models import random_tokens, tiny_senri

# Name -> options of the model, tokens that were read and said before, tokens of the prompt.
STREAMS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "linear": ({}, 0, 0, 101),
    "delta": ({"rule": "delta"}, 0, 0, 80),
    "window alone": ({"memory_layers": []}, 0, 0, 61),
    "continued": ({"segment": 3, "detach": "segment"}, 5, 3, 90),
    "too short": ({}, 1, 0, 20),
}

# So many that the largest error is no luck.
ROWS = 8


def stream_of(name: str, dtype: torch.dtype, line: Line | None) -> dict[str, Tensor]:
    """The stream after a prompt of STREAMS that one process reads, or all ranks of ``line``."""
    options, read, said, tokens = STREAMS[name]
    torch.manual_seed(3)
    session = Session(tiny_senri(**options).to(dtype), batch_size=ROWS, chunk=16)
    drawn = random_tokens(ROWS, read + tokens)
    if read:
        session.feed(drawn[:, :read])
    if said:
        session.generate(max_new_tokens=said)
    if line is None:
        session.feed(drawn[:, read:])
    else:
        prefill(session, drawn[:, read:], mesh=line)
    return _told(session)


def bits_of(line: Line | None) -> dict[str, Tensor]:
    """The same of a model whose projections compute each token alone, whatever comes with it."""
    torch.manual_seed(3)
    model = tiny_senri(segment=8)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, TokenLinear(module))
    session, ids = Session(model, chunk=32), random_tokens(1, 200)
    if line is None:
        session.feed(ids)
    else:
        prefill(session, ids, mesh=line)
    return _told(session)


def losses_of(dtype: torch.dtype, line: Line | None, *, broken: bool = False) -> Tensor:
    """The losses of a text behind another, read by one process or by all ranks of ``line``.

    All of them are NaN of a ``broken`` model.
    """
    torch.manual_seed(3)
    session, ids = Session(tiny_senri().to(dtype), chunk=16), random_tokens(1, 130)[0]
    if broken:
        session.model.lm_head.weight.data[0] = torch.nan
    parts = ids[:93], ids[93:]
    if line is None:
        return torch.cat([session.score(part) for part in parts])
    return torch.cat([losses for part in parts for losses in score(session, part, mesh=line)])


def answers_of(dtype: torch.dtype, line: Line | None) -> list[Tensor]:
    """The logits of the last tokens of prompts, as they are read and behind emptied memories.

    The last prompts are as long as that.
    """
    torch.manual_seed(3)
    model, prompts = tiny_senri().to(dtype), random_tokens(ROWS, 101)
    return [
        last_logits(model, ids, keep=4, chunk=16, before_answer=change, mesh=line)
        for ids in (prompts, prompts[:, :4])
        for change in (None, zero_memories)
    ]


class TokenLinear(nn.Module):
    """A linear map without a matrix product, whose sums may depend on how many rows there are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features = linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        out = (x[..., None, :] * self.weight).sum(-1)
        return out if self.bias is None else out + self.bias


def _told(session: Session) -> dict[str, Tensor]:
    snapshot = session.snapshot()
    assert snapshot.hidden is not None
    states = {
        f"{name} of layer {layer}": x
        for layer, state in enumerate(snapshot.states)
        for name, x in state._asdict().items()  # type: ignore[union-attr]
        if x is not None
    }
    rest = {"hidden": snapshot.hidden, "pending": snapshot.pending, "recent": snapshot.recent}
    logits = F.log_softmax(session._streams.logits(), -1)
    return {**states, **rest, "logits": logits, "said": torch.stack([*session.stream(max_new_tokens=6)])}


def every_stream(rank: int, size: int, folder: str) -> None:
    """All streams, bits, and what is said of texts that differ."""
    with meeting(rank, size, folder) as line:
        found: dict[str, Any] = {name: stream_of(name, torch.float32, line) for name in STREAMS}
        found["bits"], found["reports"] = bits_of(line), []
        found["losses"], found["answers"] = losses_of(torch.float32, line), answers_of(torch.float32, line)
        found["broken"] = losses_of(torch.float32, line, broken=True)
        session = Session(tiny_senri(), chunk=16)
        prefill(session, torch.ones(101, dtype=torch.int64), mesh=line, progress=found["reports"].append)
        for ids in (torch.ones(40 + rank, dtype=torch.int64), torch.full((40,), 1 + rank)):
            try:
                prefill(session, ids, mesh=line)
            except ValueError as error:
                found.setdefault("refused", []).append(str(error))
        torch.save(found, f"{folder}/{rank}.pt")
