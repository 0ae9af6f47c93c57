"""A long text over ranks: they read slices of it together, and all end with the whole stream's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from newllm.distributed.line import Line, line_of
from newllm.distributed.senri import sliced
from newllm.distributed.sequence_parallel import Mesh, least_slice, slice_bounds
from newllm.models.senri.modeling import SenriForCausalLM
from newllm.models.session import Session
from newllm.models.session_input import Input, token_rows
from newllm.models.streams import Snapshot
from newllm.modules.cache import InfiniCacheLayer, cache_layer
from newllm.ops import checks


def prefill(
    session: Session, text: Input, *, mesh: Mesh, progress: Callable[[int], object] | None = None
) -> None:
    """``session.feed(text)`` with the work shared by the ranks of ``mesh``, which all call it.

    Each rank holds the model and a session at the same place of the same stream, and gives the same text.
    Afterwards all are at its end, and each may go on by itself. The text is read in rounds, of about
    ``session.chunk`` tokens on each rank, so that memory does not grow with it; between rounds the constant
    state goes from the last rank to the others. What lies before the first border of segments, behind the
    last, or is too short to be sliced, is read by every rank.

    The stream is that of one process to rounding; given equal q, k and v, the linear rule's memories have
    the same bits.

    Args:
        session: of a Senri model; its rows have read equally many tokens.
        text: as for ``session.feed``, with equally many tokens in each row.
        mesh: one dimension of a device mesh, or a process group.
        progress: is told how many tokens of each row have been read, after each round.

    Raises:
        TypeError: for another kind of model or mesh. ValueError: for rows of different lengths, for ranks
            that differ in their text or in what they have read, and as ``session.feed``.
        RuntimeError: where a rank does not answer within the process group's timeout.
    """
    line = mesh if isinstance(mesh, Line) else line_of(mesh)
    ids = _checked(session, text, line)
    lead, borders = _plan(session, ids.shape[1], line.size)
    told = progress or (lambda tokens: None)

    def feed(part: Tensor) -> None:
        # Even of nothing: it reads what the session said last.
        session.feed(part)
        told(part.shape[1])

    feed(ids[:, :lead])
    for first, end in pairwise(borders):
        _round(session, ids[:, first:end].to(session.model.device), line)
        told(end - first)
    feed(ids[:, borders[-1] :])


def score(session: Session, text: Input, *, mesh: Mesh) -> Iterator[Tensor]:
    """``session.score(text)`` with the work shared as in :func:`prefill`: losses ``[N]``, round by round.

    Every rank gets those of all tokens. Raises as ``prefill`` and ``session.score``.
    """
    line = mesh if isinstance(mesh, Line) else line_of(mesh)
    checks.require(
        session.batch_size == 1, "session", f"one of batch_size {session.batch_size}", "of one row"
    )
    ids = _checked(session, text, line)
    lead, borders = _plan(session, ids.shape[1], line.size)
    yield session.score(ids[:, :lead])
    for first, end in pairwise(borders):
        yield _round_losses(session, ids[:, first:end].to(session.model.device), line)
    yield session.score(ids[:, borders[-1] :])


def _checked(session: Session, text: Input, line: Line) -> Tensor:
    """The text as ids ``[B, T]``, the same on all ranks."""
    model = session.model
    if not isinstance(model, SenriForCausalLM):
        raise TypeError(f"session must be of a SenriForCausalLM, got {type(model).__name__}")
    rows = token_rows(text, session.tokenizer, session.batch_size, model.config.vocab_size)
    lengths = [len(row) for row in rows]
    checks.require(len({*lengths}) == 1, "text", f"rows of {lengths} tokens", "equally long in all rows")
    read = {
        position + (pending >= 0) for position, pending in zip(session.tokens, session.pending, strict=True)
    }
    checks.require(len(read) == 1, "session", f"rows that have read {session.tokens} tokens", "in step")
    ids = torch.stack(rows)
    # A sum in which the places count, so that texts of one length differ too.
    places = torch.arange(1, ids.numel() + 1)
    facts = torch.tensor([ids.shape[1], read.pop(), int((ids.flatten() * places).sum())])
    low, high = _extremes(facts, line, model.device)
    names = "tokens of text", "tokens read before", "sum of text"
    for name, few, most in zip(names, low, high, strict=True):
        checks.require(few == most, "text", f"{name} between {few} and {most}", "the same on all ranks")
    return ids


def _extremes(facts: Tensor, line: Line, device: torch.device) -> tuple[list[int], list[int]]:
    """The least and the largest of each fact over all ranks."""
    found = line.largest(torch.cat([-facts, facts]).to(device)).tolist()
    return [-value for value in found[: len(facts)]], found[len(facts) :]


def _plan(session: Session, tokens: int, ranks: int) -> tuple[int, list[int]]:
    """Tokens before the first round, and the borders of rounds, of which each can be sliced."""
    config = session.model.config
    window, segment = config.sliding_window, config.segment
    read = session.tokens[0] + (session.pending[0] >= 0)
    # What goes on behind earlier tokens needs a window of them, and whole segments.
    lead = 0 if read == 0 else max((window or 0) - read, -read % segment)
    lead = min(tokens, lead + -(read + lead) % segment)
    least = ranks * least_slice(segment, window, ranks)
    segments = (tokens - lead) // segment
    most = segments * segment // least
    if ranks == 1 or most == 0:
        return lead, [lead]
    rounds = max(1, min(most, -(-segments * segment // (ranks * session.chunk))))
    return lead, [lead + part * segments // rounds * segment for part in range(rounds + 1)]


def cache_of(snapshot: Snapshot) -> Cache:
    """A cache with which a Senri model goes on from ``snapshot``, whose tensors it may change."""
    layers = [InfiniCacheLayer(counted=False) for _ in snapshot.states]
    for layer, state in zip(layers, snapshot.states, strict=True):
        layer.state = state  # type: ignore[assignment] # of a Senri model
    return Cache(layers=layers)


def _round_losses(session: Session, ids: Tensor, line: Line) -> Tensor:
    """Read ``ids [1, T]`` as :func:`_round`; the loss of each token ``[T]``, NaN for a stream's first."""
    before = session.snapshot().hidden
    start, hidden = _round(session, ids, line)
    # What each of this rank's tokens is followed by, in this round.
    targets = ids[0, start + 1 : start + 1 + hidden.shape[1]]
    mine = session.losses(hidden[0, : len(targets)], targets)
    losses = mine.new_zeros(ids.shape[1])
    losses[start + 1 : start + 1 + len(mine)] = mine
    # Each token's loss is told by one rank, the others say zero.
    losses = line.total(losses)
    losses[:1] = torch.nan if before is None else session.losses(before, ids[0, :1])
    return losses


@torch.no_grad()
def _round(session: Session, ids: Tensor, line: Line) -> tuple[int, Tensor]:
    """Read ``ids [B, T]``, which begin at a border of segments, in slices.

    Returns where this rank's slice begins and the hidden states after its tokens.
    """
    model, before = session.model, session.snapshot()
    window, segment = model.config.sliding_window, model.config.segment
    first, end = slice_bounds(ids.shape[1], line.size, segment=segment, window=window)[line.rank]
    cache = cache_of(before)
    with sliced(model, line, first):
        out = model.model(ids[:, first:end], past_key_values=cache, use_cache=True)
    found = (cache_layer(cache, layer, InfiniCacheLayer).state for layer in range(len(before.states)))
    states = tuple(state.map(line.from_last) for state in found if state is not None)
    hidden = line.from_last(out.last_hidden_state[:, -1])
    recent = torch.cat([before.recent, ids], 1)[:, -before.recent.shape[1] :]
    session.restore(Snapshot(states, hidden, before.pending, recent))
    return first, out.last_hidden_state
