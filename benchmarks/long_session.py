"""Decoding after a short and after a long context, in turns: speed and memory do not depend on the length.

``python benchmarks/long_session.py senri-smollm2 --text austen:emma`` (after ``newllm data get austen``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from newllm.cli.loading import load_streaming
from newllm.data.text import load_text
from newllm.evaluation.process import resident_bytes
from newllm.models.session import Session
from newllm.models.streams import Snapshot


def main() -> None:
    """Read, decode in turns, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", default="austen:emma")
    parser.add_argument("--tokens", type=int, nargs=2, default=[1_000, 100_000])
    parser.add_argument("--steps", type=int, default=16, help="tokens of a turn")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model, tokenizer = load_streaming(options.model, dtype=options.dtype)
    ids = tokenizer(load_text(options.text).text, add_special_tokens=False, verbose=False)["input_ids"]
    short, long = options.tokens
    ids = torch.tensor((ids * (1 + long // len(ids)))[:long])
    session = Session(model)
    started, resident = time.perf_counter(), []
    session.feed(ids[:short])
    early = session.snapshot()
    for part in ids[short:].split(4096):
        session.feed(part)
        resident.append(resident_bytes())
    read = long / (time.perf_counter() - started)
    late = session.snapshot()
    seconds: dict[int, list[float]] = {short: [], long: []}
    for _ in range(options.turns):
        for tokens, snapshot in ((short, early), (long, late)):
            seconds[tokens].append(_decode(session, snapshot, options.steps))
    rates = {str(tokens): options.steps / statistics.median(taken) for tokens, taken in seconds.items()}
    print(
        json.dumps(
            {
                "model": options.model,
                "text": options.text,
                "dtype": options.dtype,
                "threads": torch.get_num_threads(),
                "tokens_per_second": rates,
                "ratio": rates[str(long)] / rates[str(short)],
                "ratio_of_best": min(seconds[short]) / min(seconds[long]),
                "read_tokens_per_second": read,
                "state_bytes": session.state_bytes,
                "resident_mb": {
                    "first": resident[0] / 1e6,
                    "last": resident[-1] / 1e6,
                    "most": max(resident) / 1e6,
                },
            }
        )
    )


def _decode(session: Session, snapshot: Snapshot, steps: int) -> float:
    """Seconds of ``steps`` tokens after ``snapshot``, the first not counted: its logits are there."""
    session.restore(snapshot)
    stream = session.stream(max_new_tokens=steps + 1)
    next(stream)
    started = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
