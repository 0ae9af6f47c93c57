"""Recall from scratch: train a preset, then measure passkeys by length and depth, without the command line.

``python -m benchmarks.recall --preset million --seed 0`` trains into ``runs/recall-million-0`` unless a
model lies there, and appends rows to ``benchmarks/results/recall.jsonl`` but for cells that it has already.
A GPU machine needs nothing but torch, transformers and this checkout.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml

from newllm.backend import training_device
from newllm.cli.presets import preset_path
from newllm.cli.train import RecallOptions, run_senri
from newllm.data.recall.passkeys import passkey_suite
from newllm.evaluation.control import zero_memories
from newllm.evaluation.recall import Task, measure, model_answers, usual_samples
from newllm.evaluation.rows import Row, RowFile, weights_digest
from newllm.models.files import load_senri, load_tokenizer
from newllm.runs import commit
from newllm.training.assemble import passkey_task, read_corpus
from newllm.training.config import SourceConfig


def options_from(kind: Any, values: dict[str, Any]) -> Any:
    """The dataclass ``kind`` from nested YAML values."""
    hints, known = get_type_hints(kind), {field.name for field in fields(kind)}
    if unknown := values.keys() - known:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(
        **{
            name: options_from(hints[name], value) if is_dataclass(hints[name]) else value
            for name, value in values.items()
        }
    )


def merged(one: dict[str, Any], dotted: list[str]) -> dict[str, Any]:
    """``one`` with each ``group.key=value`` of ``dotted`` in place."""
    for word in dotted:
        key, _, text = word.partition("=")
        *groups, last = key.split(".")
        place = one
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = yaml.safe_load(text)
    return one


def train(preset: str, out: Path, changes: list[str]) -> float:
    """Train unless it was done; seconds it took, all told."""
    began = time.monotonic()
    if not (out / "last").is_dir():
        values = yaml.safe_load(preset_path(preset, "train recall").read_text(encoding="utf-8"))
        options = options_from(RecallOptions, {**merged(values, changes), "out": str(out), "overwrite": True})
        run_senri(options)
        torch.cuda.synchronize() if torch.cuda.is_initialized() else None
    return time.monotonic() - began


def evaluate(out: Path, name: str, args: argparse.Namespace, seconds: float) -> list[Row]:
    """Passkeys at exact depths and across borders, with the memory and with it emptied."""
    device = training_device()
    model = load_senri(out / "last").to(device).eval()
    corpus = read_corpus("embedded", SourceConfig())
    task = passkey_task(load_tokenizer(out / "last"), corpus.validation.joined(), args.key_length)
    # Prompts of millions of tokens are drawn where they are read.
    task = task._replace(filler=task.filler.to(device))
    segment = model.config.segment
    assert segment is not None
    facts = {
        "model": name, "weights": weights_digest(model), "memory": "on",
        "window": model.config.sliding_window,
        "segment": segment, "parameters": model.num_parameters(), "seconds_trained": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "commit": commit(),
    }  # fmt: skip
    rows, found = RowFile(args.rows), []
    stop = args.began + args.seconds

    def samples(length: int) -> int:
        return min(args.samples, usual_samples(length))

    plan = [(suite, length, False) for length in args.lengths for suite in (None, segment)]
    plan[2:2] = [(None, args.lengths[0], True)]
    for across, length, forget in plan:
        for depth in args.depths:
            if time.monotonic() > stop:
                print(f"out of time before {length} tokens, depth {depth}", flush=True)
                return found
            cell = Task([length], [depth], samples, args.seed, args.batch_tokens)
            began = time.monotonic()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                found += measure(
                    model_answers(model, before_answer=zero_memories if forget else None),
                    passkey_suite(task, across), cell,
                    facts={**facts, "memory": "zeroed" if forget else "on"}, rows=rows, progress=False,
                )  # fmt: skip
            row = found[-1]
            low, high = row["ci95"]
            print(
                f"{row['suite']:15} {row['memory']:6} {length:>9} depth {depth:<5} {row['score']:.3f} "
                f"[{low:.3f}, {high:.3f}] of {row['samples']}, {time.monotonic() - began:.1f} s",
                flush=True,
            )
    return found


def table(rows: list[Row]) -> str:
    """Scores, lengths downwards and depths to the right."""
    depths = sorted({row["depth"] for row in rows})
    lines = [f"{'suite':16}{'memory':8}{'length':>10}" + "".join(f"{depth:>8}" for depth in depths)]
    for key in dict.fromkeys((row["suite"], row["memory"], row["length"]) for row in rows):
        own = [row for row in rows if (row["suite"], row["memory"], row["length"]) == key]
        cells = {row["depth"]: f"{row['score']:>8.3f}" for row in own}
        scores = "".join(cells.get(depth, f"{'':>8}") for depth in depths)
        lines.append(f"{key[0]:16}{key[1]:8}{key[2]:>10}{scores}")
    return "\n".join(lines)


def main() -> None:
    """Parse, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="million")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the run (default: recall-PRESET-SEED)")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/recall.jsonl"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**15, 2**20, 2**17, 2**19])
    parser.add_argument("--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--samples", type=int, default=100, help="most of a cell")
    parser.add_argument("--seconds", type=float, default=1e9, help="in all, before no new cell is begun")
    parser.add_argument("--batch-tokens", type=int, default=2**20)
    parser.add_argument("--set", nargs="*", default=[], help="changes of the preset, such as train.steps=10")
    args = parser.parse_args()
    args.began = time.monotonic()
    name = args.name or f"recall-{args.preset}-{args.seed}"
    out = args.out / name
    # Drawing a batch takes 3 ms on one thread; many threads only wait for each other.
    torch.set_num_threads(1)
    seconds = train(args.preset, out, [*args.set, f"train.seed={args.seed}"])
    values = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    args.key_length = values["task"]["key_length"]
    print(f"{name}: trained in {seconds:.1f} s", flush=True)
    rows = evaluate(out, name, args, seconds)
    print(table(rows))
    (out / "table.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
