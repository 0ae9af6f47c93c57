"""Reading with a bar, and a reply as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from newllm.models.turns import stop_of

if TYPE_CHECKING:
    import torch

    from newllm.models.history import HistorySession
    from newllm.models.sampling import Sampling
    from newllm.models.session import Session

    Stream = Session | HistorySession

_SHOWN_AT_ONCE = 1024


def feed_with_progress(session: Stream, ids: torch.Tensor) -> None:
    """Read ``ids``, with a bar when they are many."""
    from tqdm import tqdm

    with tqdm(total=len(ids), desc="reading", unit="token", disable=len(ids) <= _SHOWN_AT_ONCE) as bar:
        for part in ids.split(_SHOWN_AT_ONCE):
            session.feed(part)
            bar.update(len(part))


def reply(session: Stream, *, tokens: int, sampling: Sampling, generator: torch.Generator) -> Iterator[int]:
    """The tokens of a reply: until the model ends it, or writes the human's next message itself."""
    tokenizer: Any = session.tokenizer
    stop = stop_of(tokenizer) or ""
    held: list[int] = []
    for step in session.stream(max_new_tokens=tokens, sampling=sampling, generator=generator):
        if (token := int(step)) >= 0:
            held.append(token)
        begun = tokenizer.decode(held).strip()
        if stop and begun == stop:
            return
        # What may become the stop is kept back until it does or does not.
        if not (stop and stop.startswith(begun)):
            yield from held
            held = []
    yield from held


def show(tokenizer: Any, tokens: Iterable[int]) -> int:
    """Print ``tokens`` as text while they come; their number."""
    import torch
    from transformers import TextStreamer

    streamer, count = TextStreamer(tokenizer, skip_special_tokens=True), 0
    for token in tokens:
        streamer.put(torch.tensor([token]))
        count += 1
    streamer.end()
    return count
