"""From a request to a job: the session it goes on from, the tokens it reads."""

from __future__ import annotations

import torch

from newllm.models.sampling import Sampling
from newllm.models.streams import Snapshot
from newllm.models.turns import following, opening, stop_of, text_ids
from newllm.serving.engine import Engine
from newllm.serving.jobs import Job
from newllm.serving.protocol import ChatRequest, CompletionRequest, Refused


def prepared(
    engine: Engine,
    asked: CompletionRequest | ChatRequest,
    sampling: Sampling,
    most: int,
    deadline: float,
) -> Job:
    """The job of a request; it holds the request's session until it ends.

    Args:
        engine: will answer.
        asked: the request.
        sampling: where the request does not say.
        most: tokens of an answer.
        deadline: when it is ended, by ``time.monotonic()``.

    Raises:
        Refused: for a prompt that cannot be read. InUse, ValueError: as ``Engine.claim``.
    """
    ways = asked.sampling(sampling)
    kept = None if asked.session is None else engine.claim(asked.session)
    # A session that was kept before it had read anything is as none.
    start = None if kept is None or kept.hidden is None else kept
    try:
        ids = _read(engine, asked, start)
        if start is None and not len(ids):
            raise Refused("prompt must hold a token where nothing was read before, got none", "prompt")
    except BaseException:
        engine.release(asked.session)
        raise
    ends = [stop_of(engine.tokenizer)] if isinstance(asked, ChatRequest) else []
    return Job(
        ids,
        tell=lambda event: None,
        max_tokens=min(most, asked.limit(most)),
        sampling=ways,
        seed=asked.seed,
        stops=(*asked.stop, *(end for end in ends if end)),
        start=start,
        name=asked.session,
        deadline=deadline,
    )


def _read(engine: Engine, asked: CompletionRequest | ChatRequest, start: Snapshot | None) -> torch.Tensor:
    tokenizer = engine.tokenizer
    if isinstance(asked, ChatRequest):
        turns = [message.turn() for message in asked.messages]
        if start is None:
            return opening(tokenizer, turns)
        closed = int(start.pending[0]) == tokenizer.eos_token_id
        return text_ids(tokenizer, following(tokenizer, turns, closed=closed), begins=False)
    prompt = asked.text()
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt, begins=start is None)
    last = engine.model.config.vocab_size - 1
    if any(not 0 <= token <= last for token in prompt):
        raise Refused(f"prompt must hold token ids from 0 to {last}", "prompt")
    return torch.tensor(prompt, dtype=torch.int64)
