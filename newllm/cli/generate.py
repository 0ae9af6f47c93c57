"""``newllm generate``: continue a text, or answer it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from newllm.cli.loading import CompileOption, Dtype


@dataclass
class Options:
    """Read a prompt of any length and print what the model makes of it.

    A model with a chat template answers the prompt as a message; others, and all with --raw, continue it.

    Args:
        model: folder or hub id of a Senri or context model.
        prompt: text to read.
        prompt_file: a file, or a text by its name (austen:emma), to read before the prompt.
        max_new_tokens: tokens to write at most.
        temperature: 0 always takes the likeliest token, more is more varied.
        top_k: sample from so many tokens (null: from all).
        top_p: sample from the likeliest tokens that have this share of probability (null: all).
        repetition_penalty: makes the last 50 tokens less likely, 1 is none.
        seed: seed of the sampling.
        raw: no chat template.
        compile: how a step is run; auto is a CUDA graph on a GPU and plain on a CPU, full compiles it.
        dtype: dtype of the weights.
        device: a device as PyTorch names it (auto: the first accelerator, else the CPU).
        sequence_ranks: processes of torchrun that read the prompt together, in slices; the first writes.
    """

    model: str
    prompt: str | None = None
    prompt_file: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    raw: bool = False
    compile: CompileOption = "auto"
    dtype: Dtype = "auto"
    device: str = "auto"
    sequence_ranks: int = 1


def run(options: Options) -> None:
    """Print the text, then on stderr what was read and written and how large the state is."""
    prompt = _prompt(options)
    from newllm.cli.ranks import check_ranks, feed_over_ranks, rank_device

    check_ranks(options.sequence_ranks)
    from newllm.cli.loading import load_streaming, step_mode
    from newllm.cli.turns import feed_with_progress, show
    from newllm.evaluation.process import resident_bytes
    from newllm.models.sampling import Sampling, generator
    from newllm.models.session import Session
    from newllm.models.turns import Turn, opening, text_ids

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty)
    device = rank_device(options.device, options.sequence_ranks)
    model, tokenizer = load_streaming(options.model, dtype=options.dtype, device=device)
    session = Session(model, tokenizer, compile=step_mode(options.compile, model))
    templated = not options.raw and tokenizer.chat_template is not None
    ids = opening(tokenizer, [Turn("user", prompt)]) if templated else text_ids(tokenizer, prompt)
    if options.sequence_ranks == 1:
        feed_with_progress(session, ids)
    elif not feed_over_ranks(session, ids):
        return
    started = time.perf_counter()
    steps = session.stream(
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        generator=generator(options.seed, model.device),
    )
    written = show(tokenizer, (int(step) for step in steps if int(step) >= 0))
    rate = written / (time.perf_counter() - started)
    print(
        f"{len(ids):,} tokens read, {written:,} written at {rate:.1f} tokens/s; "
        f"state {session.state_bytes:,} bytes, process {resident_bytes() / 1e6:,.0f} MB",
        file=sys.stderr,
    )


def _prompt(options: Options) -> str:
    parts = [] if options.prompt is None else [options.prompt]
    if options.prompt_file is not None:
        from newllm.data.text import load_text

        parts.insert(0, load_text(options.prompt_file).text)
    if not any(parts):
        raise ValueError("prompt must hold some text: give --prompt, --prompt-file, or both")
    return "\n\n".join(parts)
