"""What a memory gives SmolLM2-135M beside full attention and its window alone, all continued alike.

``python -m benchmarks.smollm2 --base FOLDER`` converts the checkpoint four ways (a memory in
two layers, in every third, in none, and full attention as it was), trains each on books and needles, and
appends to ``benchmarks/results/smollm2.jsonl`` the perplexity of a held-out novel beyond the window and the
recall of passkeys. Arms and cells that are there are not made again; ``--arms`` takes some.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.recall import options_from, preset
from newllm.backend import training_device
from newllm.cli.train import SenriOptions
from newllm.data.recall.passkeys import passkey_suite
from newllm.data.text import load_text
from newllm.data.tokenizer import encode
from newllm.evaluation.control import zero_memories
from newllm.evaluation.intervals import mean95
from newllm.evaluation.recall import Task, measure, model_answers, usual_samples
from newllm.evaluation.rows import IDENTITY, Row, RowFile, weights_digest
from newllm.models.convert import convert, load_base, load_base_tokenizer
from newllm.models.files import load_model, save_model
from newllm.runs import Run, commit
from newllm.training.assemble import make_streams, passkey_task, read_corpus
from newllm.training.trainer import LanguageTrainer

FULL = "full attention"
ARMS: dict[str, list[int] | None] = {
    "memory in two layers": [10, 20],
    "memory in every third layer": list(range(2, 30, 3)),
    "window alone": [],
    FULL: None,
}


def train(arm: str, args: argparse.Namespace) -> Path:
    """The folder of the arm's continued model."""
    out = args.out / arm.replace(" ", "-")
    if (out / "done").is_dir():
        return out / "done"
    options: SenriOptions = options_from(SenriOptions, preset("smollm2", "train senri", args.set))
    torch.manual_seed(options.train.seed)
    model: Any = load_base(args.base, dtype="float32")
    tokenizer = load_base_tokenizer(args.base)
    layers = ARMS[arm]
    # What a segment counts in a memory means nothing to an arm that has none.
    task = options.task if layers else replace(options.task, dilution=1)
    if layers is not None:
        kept = [layer for layer in layers if layer < model.config.num_hidden_layers]
        conversion = replace(options.convert, memory_layers=kept)
        model = convert(model, **vars(conversion))
    model.to(training_device())
    corpus = read_corpus(args.data, options.source)
    rows = options.stream.rows or 1
    streams = make_streams(
        corpus, tokenizer, options.stream, task, options.train, rows=rows,
        segment=options.convert.segment, progress=False,
    )  # fmt: skip
    record = Run(out, {"arm": arm, "data": args.data}, seed=options.train.seed)
    began = time.monotonic()
    trainer = LanguageTrainer(model, streams.train, options.train, record, tokenizer=tokenizer)
    trainer.fit()
    if trainer.interrupted:
        raise SystemExit(128 + trainer.interrupted)
    record.log(arm=arm, seconds=round(time.monotonic() - began, 1))
    save_model(model, tokenizer, out / "done", overwrite=True)
    return out / "done"


@torch.inference_mode()
def novel_losses(model: Any, ids: Tensor, *, block: int, skip: int, emptied: bool) -> Tensor:
    """Losses in nats of tokens from ``skip`` on in blocks of ``block``, each read from an empty state.

    ``emptied`` keeps the memories empty: no segment adds to them.
    """
    found = []
    for start in range(0, len(ids) - block, block):
        part = ids[None, start : start + block + 1].to(model.device)
        options: dict[str, Any] = {"use_cache": False}
        if emptied:
            options["segment_weight"] = torch.zeros(1, -(-block // model.config.segment), device=model.device)
        hidden = model.model(part[:, :-1], **options).last_hidden_state[0, skip:]
        for rows, targets in zip(hidden.split(1024), part[0, skip + 1 :].split(1024), strict=True):
            found.append(F.cross_entropy(model.lm_head(rows).float(), targets, reduction="none").cpu())
    return torch.cat(found)


def measure_arm(arm: str, folder: Path, args: argparse.Namespace, rows: RowFile) -> None:
    """Perplexity of the novel and recall of passkeys; arms with a memory also without its content."""
    device = training_device()
    model: Any = load_model(folder, dtype="float32").to(device).eval()
    tokenizer = load_base_tokenizer(folder)
    remembers = bool(getattr(model.config, "memory_layers", None))
    facts: Row = {
        "model": arm, "weights": weights_digest(model), "commit": args.commit, "depth": None,
        "text": args.novel,
    }  # fmt: skip
    ids = encode(tokenizer, load_text(args.novel).text)[: args.novel_tokens]
    for emptied in (False, True) if remembers else (False,):
        cell = {
            **facts, "suite": "perplexity_beyond", "memory": "zeroed" if emptied else "on", "seed": 0,
            "length": args.block, "samples": (len(ids) - 1) // args.block * (args.block - args.skip),
        }  # fmt: skip
        row = rows.find({key: cell.get(key) for key in IDENTITY})
        if row is None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses = novel_losses(model, ids, block=args.block, skip=args.skip, emptied=emptied).double()
            low, high = mean95(float(losses.sum()), float(losses.square().sum()), len(losses))
            row = {**cell, "score": math.exp(float(losses.mean())), "ci95": (math.exp(low), math.exp(high))}
            rows.append(row)
        print(f"{arm}, memory {cell['memory']}: {row['score']:.3f}", flush=True)
    if arm == FULL:
        return
    task = passkey_task(tokenizer, load_text(args.novel).text, 5)
    plan = Task(args.lengths, args.depths, lambda n: min(args.samples, usual_samples(n)), 0, args.tokens)
    for memory in ("on", "zeroed") if remembers else ("on",):
        answerer = model_answers(model, before_answer=zero_memories if memory == "zeroed" else None)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = measure(
                answerer, passkey_suite(task), plan, facts={**facts, "memory": memory}, rows=rows,
                progress=False,
            )  # fmt: skip
        for row in found:
            print(
                f"{arm}, memory {memory}: {row['length']} at {row['depth']}: {row['score']:.3f}", flush=True
            )


def main() -> None:
    """Parse, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="folder or GGUF file of SmolLM2-135M")
    parser.add_argument("--data", default="austen+shakespeare+kjv")
    parser.add_argument("--novel", default="austen:northangerabbey", help="held out")
    parser.add_argument("--novel-tokens", type=int, default=120_000)
    parser.add_argument("--block", type=int, default=8192)
    parser.add_argument("--skip", type=int, default=2048, help="first tokens of a block that do not count")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=65536, help="of one pass")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/smollm2.jsonl"))
    parser.add_argument("--commit", default=commit(), help="of a checkout without its history")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the preset, such as train.steps=10")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = RowFile(args.rows)
    for arm in args.arms:
        measure_arm(arm, train(arm, args), args, rows)


if __name__ == "__main__":
    main()
