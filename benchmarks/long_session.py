"""Decoding after a short and after a long context, in turns: speed and memory do not depend on the length.

``python benchmarks/long_session.py senri-smollm2 --text austen:emma`` (after ``newllm data get austen``)
prints one JSON object and writes it to ``benchmarks/results/long_session.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from newllm.cli.loading import load_streaming
from newllm.data.text import load_text
from newllm.evaluation.process import resident_bytes
from newllm.files import replace_file
from newllm.models.session import Session
from newllm.models.streams import Snapshot
from newllm.runs import commit, provenance

RESULTS = Path(__file__).parent / "results" / "long_session.jsonl"


def main() -> None:
    """Read, decode in turns, write and print one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", default="austen:emma")
    parser.add_argument("--tokens", type=int, nargs=2, default=[1_000, 100_000])
    parser.add_argument("--steps", type=int, default=16, help="tokens of a turn")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--commit", default=commit(), help="of a checkout without its history")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the row")
    options = parser.parse_args()
    model, tokenizer = load_streaming(options.model, dtype=options.dtype)
    ids = tokenizer(load_text(options.text).text, add_special_tokens=False, verbose=False)["input_ids"]
    short, long = options.tokens
    ids = torch.tensor((ids * (1 + long // len(ids)))[:long])
    session, resident = Session(model), []
    with tqdm(total=long, desc="reading", unit="token") as bar:
        session.feed(ids[:short])
        bar.update(short)
        early = session.snapshot()
        for part in ids[short:].split(4096):
            session.feed(part)
            resident.append(resident_bytes() / 1e6)
            bar.update(len(part))
        read = bar.format_dict["elapsed"]
    late = session.snapshot()
    turns: list[tuple[_Seconds, _Seconds]] = [
        (_decode(session, early, options.steps), _decode(session, late, options.steps))
        for _ in range(options.turns)
    ]
    rates = [options.steps / statistics.median(turn[n].wall for turn in turns) for n in range(2)]
    facts = provenance(0)
    row = {
        "suite": "long_session",
        "model": Path(options.model).name,
        "text": options.text,
        "dtype": options.dtype,
        "device": facts["devices"],
        "threads": torch.get_num_threads(),
        "tokens_per_second": {str(n): rate for n, rate in zip(options.tokens, rates, strict=True)},
        "ratio": rates[1] / rates[0],
        # Of a turn's pair, whatever else the machine does: CPU time is not the clock's.
        "ratio_of_cpu_time": statistics.median(near.cpu / far.cpu for near, far in turns),
        "turns": options.turns,
        "steps": options.steps,
        "read_tokens_per_second": long / read,
        "state_bytes": session.state_bytes,
        "resident_mb": {"first": resident[0], "last": resident[-1], "most": max(resident)},
        **{name: facts[name] for name in ("newllm", "torch", "date")},
        "commit": options.commit,
    }
    text = json.dumps(row)
    replace_file(options.out, lambda file: file.write_text(f"{text}\n", encoding="utf-8"))
    print(text)
    print(options.out)


class _Seconds(NamedTuple):
    wall: float
    cpu: float


def _decode(session: Session, snapshot: Snapshot, steps: int) -> _Seconds:
    """Time of ``steps`` tokens after ``snapshot``, the first not counted: its logits are there."""
    session.restore(snapshot)
    stream = session.stream(max_new_tokens=steps + 1)
    next(stream)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in stream:
        pass
    return _Seconds(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
