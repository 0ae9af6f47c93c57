"""``newllm generate``: continue a text, or answer it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from newllm.cli.loading import CompileOption, Dtype


@dataclass
class Options:
    """Read a prompt of any length and print what the model makes of it.

    A model with a chat template answers the prompt as a message; others, and all with --raw, continue it.

    Args:
        model: folder or hub id of a Senri or context model.
        prompt: text to read.
        prompt_file: a file, or a text by its name (austen:emma), to read before the prompt.
        load: file of a session (--save, or save in newllm chat) to go on from.
        save: file to keep the session in, once the prompt is read and again after the answer.
        max_new_tokens: tokens to write at most (0 only reads).
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
    load: Path | None = None
    save: Path | None = None
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
    """Print the text, then on stderr what was read and written, how fast, and what it takes."""
    prompt = _checked(options)
    from newllm.cli.ranks import check_ranks, feed_over_ranks, rank_device

    check_ranks(options.sequence_ranks)
    from newllm.cli.loading import load_streaming, step_mode
    from newllm.cli.turns import answer, feed_with_progress, message_ids
    from newllm.models.sampling import Sampling, generator
    from newllm.models.session import Session
    from newllm.models.turns import text_ids

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty)
    device = rank_device(options.device, options.sequence_ranks)
    model, tokenizer = load_streaming(options.model, dtype=options.dtype, device=device)
    session = Session(model, tokenizer, compile=step_mode(options.compile, model))
    if options.load is not None:
        session.load(options.load)
    if tokenizer.chat_template is None or options.raw:
        ids = text_ids(tokenizer, prompt, begins=session.tokens == [0])
    else:
        ids = message_ids(session, prompt)
    began = time.perf_counter()
    if options.sequence_ranks == 1:
        feed_with_progress(session, ids)
    elif not feed_over_ranks(session, ids):
        return
    if options.save is not None:
        session.save(options.save)
    most, random = options.max_new_tokens, generator(options.seed, model.device)
    steps = session.stream(max_new_tokens=most, sampling=sampling, generator=random) if most else iter(())
    answer(session, (token for step in steps if (token := int(step)) >= 0), len(ids), began)
    if options.save is not None:
        session.save(options.save)


def _checked(options: Options) -> str:
    """The prompt; what cannot be done is said before hours of reading."""
    if options.max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {options.max_new_tokens}")
    if options.save is not None and options.save.is_dir():
        raise ValueError(f"save must name a file, got the folder {options.save}")
    parts = [] if options.prompt is None else [options.prompt]
    if options.prompt_file is not None:
        from newllm.data.text import load_text

        parts.insert(0, load_text(options.prompt_file).text)
    if not any(parts):
        raise ValueError("prompt must hold some text: give --prompt, --prompt-file, or both")
    return "\n\n".join(parts)
