"""Reading with a bar, and a reply as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from newllm.models.turns import Turn, following, opening, stop_of, text_ids

if TYPE_CHECKING:
    import torch

    from newllm.models.history import HistorySession
    from newllm.models.sampling import Sampling
    from newllm.models.session import Session

    Stream = Session | HistorySession

_SHOWN_AT_ONCE = 1024


def message_ids(session: Stream, text: str) -> torch.Tensor:
    """Ids ``[T]`` of ``text`` as the next message to a model, up to where it answers."""
    tokenizer: Any = session.tokenizer
    turns = [Turn("user", text)]
    if session.tokens == [0]:
        return opening(tokenizer, turns)
    closed = session.pending[0] == tokenizer.eos_token_id
    return text_ids(tokenizer, following(tokenizer, turns, closed=closed), begins=False)


def feed_with_progress(session: Stream, ids: torch.Tensor) -> None:
    """Read ``ids``, with a bar when they are many."""
    from tqdm import tqdm

    from newllm.evaluation.process import resident_bytes

    with tqdm(total=len(ids), desc="reading", unit="token", disable=len(ids) <= _SHOWN_AT_ONCE) as bar:
        for part in ids.split(_SHOWN_AT_ONCE):
            session.feed(part)
            bar.set_postfix_str(f"process {resident_bytes() / 1e6:,.0f} MB", refresh=False)
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


def answer(session: Stream, tokens: Iterable[int], read: int, began: float) -> None:
    """Print ``tokens`` as text while they come; then, on stderr, how fast it went and what it takes.

    ``read`` tokens have been read since ``began``, a time of ``time.perf_counter``.
    """
    from newllm.evaluation.process import resident_bytes

    start = time.perf_counter()
    written = _show(session.tokenizer, tokens)
    print(
        f"{read:,} tokens read at {read / (start - began):.1f} tokens/s, "
        f"{written:,} written at {written / (time.perf_counter() - start):.1f} tokens/s; "
        f"after {session.tokens[0]:,} tokens: state {session.state_bytes:,} bytes, "
        f"process {resident_bytes() / 1e6:,.0f} MB",
        file=sys.stderr,
    )


def _show(tokenizer: Any, tokens: Iterable[int]) -> int:
    """Print ``tokens`` as text while they come; their number."""
    import torch
    from transformers import TextStreamer

    streamer, count = TextStreamer(tokenizer, skip_special_tokens=True), 0
    for token in tokens:
        streamer.put(torch.tensor([token]))
        count += 1
    streamer.end()
    return count
