"""``newllm chat``: a conversation with a model of any family."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from newllm.cli.loading import Dtype

if TYPE_CHECKING:
    import torch

    from newllm.cli.turns import Stream
    from newllm.models.sampling import Sampling

_HELP = "exit or quit ends, reset forgets everything, save PATH and load PATH keep the conversation"


@dataclass
class Options:
    """Talk with a model; a Senri remembers by a state of constant size, any other by its own cache.

    Lines of the terminal, or of a script on stdin. exit and quit end, reset forgets everything, save PATH and
    load PATH keep the conversation in a file.

    Args:
        model: folder or hub id of a causal model.
        max_new_tokens: tokens of a reply at most.
        temperature: 0 always takes the likeliest token, more is more varied.
        top_k: sample from so many tokens (null: from all).
        top_p: sample from the likeliest tokens that have this share of probability (null: all).
        repetition_penalty: makes the last 50 tokens less likely, 1 is none.
        seed: seed of the sampling (null: another one each time).
        dtype: dtype of the weights.
        device: a device as PyTorch names it (auto: the first accelerator, else the CPU).
    """

    model: str
    max_new_tokens: int = 100
    temperature: float = 0.9
    top_k: int | None = 50
    top_p: float | None = 0.95
    repetition_penalty: float = 1.2
    seed: int | None = None
    dtype: Dtype = "auto"
    device: str = "auto"


def run(options: Options) -> None:
    """Answer line by line until the end; on stderr, how fast it went and what it takes."""
    from newllm.cli.loading import load_stream
    from newllm.models.sampling import Sampling, generator

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty)
    session = load_stream(options.model, dtype=options.dtype, device=options.device)
    random = generator(options.seed, session.model.device)
    if sys.stdin.isatty():
        print(_HELP)
    while (line := _line()) is not None:
        match line.split(maxsplit=1):
            case []:
                continue
            case ["exit" | "quit"]:
                return
            case ["reset"]:
                session.reset()
                print("forgot everything", file=sys.stderr)
            case ["save" | "load" as what, *path]:
                _told(_on_disk, session, what, *path)
            case _:
                _told(_answer, session, line, options.max_new_tokens, sampling, random)


def _line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _told(do: Callable[..., None], *arguments: Any) -> None:
    """Do it; a failure is told, and the conversation goes on."""
    try:
        do(*arguments)
    except (OSError, ValueError) as error:
        print(f"newllm: {error}", file=sys.stderr)


def _on_disk(session: Stream, what: str, path: str = "") -> None:
    if not path:
        raise ValueError(f"{what} needs the path of a file")
    {"save": session.save, "load": session.load}[what](path)
    print(f"{what}: {session.tokens[0]:,} tokens are in {path}", file=sys.stderr)


def _answer(session: Stream, text: str, tokens: int, sampling: Sampling, random: torch.Generator) -> None:
    from newllm.cli.turns import answer, feed_with_progress, message_ids, reply

    ids, began = message_ids(session, text), time.perf_counter()
    feed_with_progress(session, ids)
    answer(session, reply(session, tokens=tokens, sampling=sampling, generator=random), len(ids), began)
