"""Recall from scratch without the command line: train a preset, then measure what it recalls.

``python -m benchmarks.recall --preset million --seed 0`` trains into ``runs/recall-million-0`` unless a
model lies there, and appends rows to ``benchmarks/results/recall.jsonl`` but for cells that it has already.
``--ablate`` does so with each part of the recipe changed in turn, ``--symbols NAME`` with a task over
symbols (``newllm/configs/symbols-NAME.yaml``); ``--preset mqar`` both of its sizes, ``--peer deltanet`` the
peer of equal state. A GPU machine needs nothing but torch, transformers and this checkout.
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

from benchmarks.deltanet import with_deltanet
from newllm.backend import training_device
from newllm.cli.presets import preset_path
from newllm.cli.train import RecallOptions, run_senri
from newllm.cli.train_symbols import SymbolOptions, run as run_symbols
from newllm.data.passkey import PasskeyTask
from newllm.data.recall.passkeys import passkey_suite
from newllm.data.recall.prompts import Suite
from newllm.data.recall.suites import make_suite, suite_names
from newllm.evaluation.control import zero_memories
from newllm.evaluation.recall import Task, measure, model_answers, usual_samples
from newllm.evaluation.rows import Row, RowFile, weights_digest
from newllm.models.files import load_senri, load_tokenizer
from newllm.runs import commit
from newllm.training.assemble import passkey_task, read_corpus
from newllm.training.config import SourceConfig
from newllm.training.symbols import state_bytes

ABLATIONS: dict[str, list[str]] = {
    "whole": [],
    "paper-features": ["model.feature_scale=1.0", "model.feature_bias=0.0"],
    "fixed-features": ["train.freeze_features=true"],
    "gates-at-the-common-rate": ["train.memory_multiplier=1.0"],
    "no-curriculum": ["task.lengths=[{longest}]"],
    "no-dilution": ["task.dilution=1"],
    "no-edge-keys": ["task.edge=0.0"],
    "no-straddling-keys": ["task.straddle=0.0"],
    "no-near-keys": ["task.near=0.0"],
    "questions-in-one-place": ["task.shift=false"],
    "sigmoid-gates": ["model.gate=sigmoid"],
    "delta": ["model.rule=delta", "task.dilution=1"],
    "gamma-dpfp": ["model.rule=gamma", "model.feature=dpfp", "task.dilution=1"],
    "sharper-features": ["model.feature_scale=8.0", "model.feature_bias=-8.0"],
    "write-gate": ["model.write_gate=true"],
    "short-convolution": ["model.short_conv=4"],
    "decay": ["model.memory_decay=0.999", "task.dilution=1"],
    "shared-memory": ["model.share_memory=true", "task.dilution=1"],
    "public-recipe": [
        "train.lr=3.0e-4", "train.memory_multiplier=1.0", "model.gate=sigmoid", "model.feature_scale=1.0",
        "model.feature_bias=0.0", "task.lengths=[{longest}]", "task.dilution=1", "task.edge=0.0",
        "task.straddle=0.0", "task.near=0.0", "task.shift=false",
    ],
}  # fmt: skip
"""The recipe without one of its parts, or with one more; ``public-recipe`` has none of them."""
SYMBOLS = {"mqar": ("mqar64", "mqar256")}
"""Names of several tasks over symbols."""


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


def preset(name: str, command: str, dotted: list[str]) -> dict[str, Any]:
    """The preset's values with each ``group.key=value`` of ``dotted`` in place."""
    values: dict[str, Any] = yaml.safe_load(preset_path(name, command).read_text(encoding="utf-8"))
    for word in dotted:
        key, _, text = word.partition("=")
        *groups, last = key.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = _value(text)
    return values


def _value(text: str) -> Any:
    """What a word means; to YAML 1.1 alone, 1e-3 would be a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return yaml.safe_load(text)


def train(name: str, args: argparse.Namespace, changes: list[str]) -> float | None:
    """Train, and the seconds it took, all told; None where it was done before."""
    began, out = time.monotonic(), args.out / name
    if (out / "last").is_dir():
        return None
    longest = max(preset(args.preset, "train recall", args.set)["task"]["lengths"])
    own = [word.format(longest=longest) for word in changes]
    values = preset(args.preset, "train recall", [*args.set, *own, f"train.seed={args.seed}"])
    failed = run_senri(options_from(RecallOptions, {**values, "out": str(out), "overwrite": True}))
    if failed:
        raise SystemExit(failed)
    return time.monotonic() - began


def suites(model: Any, folder: Path, args: argparse.Namespace) -> list[Suite]:
    """The suites that were asked for, in the validation documents of the embedded text."""
    text, tokenizer = read_corpus("embedded", SourceConfig()).validation.joined(), load_tokenizer(folder)
    values = yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))
    digits, segment = values["task"]["key_length"], model.config.segment
    task: PasskeyTask = passkey_task(tokenizer, text, digits)
    # Prompts of millions of tokens are drawn where they are read.
    task = task._replace(filler=task.filler.to(model.device))
    own = {"passkey": None, "passkey_border": segment}
    return [
        passkey_suite(task, own[name]) if name in own else make_suite(name, tokenizer, text, segment=segment)
        for name in suite_names(args.suites)
    ]


def evaluate(name: str, args: argparse.Namespace, seconds: float | None, variant: str) -> list[Row]:
    """Every suite at every length, at first also with emptied memories; ``variant`` names an ablation."""
    device = training_device()
    folder = args.out / name / "last"
    model = load_senri(folder).to(device).eval()
    rows, found, digest = RowFile(args.rows), [], weights_digest(model)
    if seconds is None:
        seconds = next((row["seconds_trained"] for row in rows.rows if row.get("weights") == digest), None)
    facts = {
        "model": name, "weights": digest, "window": model.config.sliding_window,
        "segment": model.config.segment, "parameters": model.num_parameters(), "commit": args.commit,
        "seconds_trained": None if seconds is None else round(seconds, 1), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }  # fmt: skip
    if variant:
        trained = yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))
        facts |= {"variant": variant, "preset": args.preset, "steps": trained["train"]["steps"]}
    made = suites(model, folder, args)
    plan = [(suite, length, "on") for length in args.lengths for suite in made]
    plan[len(made) : len(made)] = [(suite, args.lengths[0], "zeroed") for suite in made]
    for suite, length, memory in plan:
        answerer = model_answers(model, before_answer=zero_memories if memory == "zeroed" else None)
        for depth in args.depths if suite.placed else (None,):
            if time.monotonic() > args.began + args.seconds:
                print(f"out of time before {suite.name} of {length} tokens, depth {depth}", flush=True)
                return found
            cell = Task(
                [length], [depth], lambda n: min(args.samples, usual_samples(n)), args.seed, args.tokens
            )
            began = time.monotonic()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                found += measure(
                    answerer, suite, cell, facts={**facts, "memory": memory}, rows=rows, progress=False
                )
            print(_line(found[-1]), f"{time.monotonic() - began:.1f} s", flush=True)
    return found


def _line(row: Row) -> str:
    low, high = row["ci95"]
    return (
        f"{row['suite']:15} {row['memory']:6} {row['length']:>9} depth {row['depth']!s:<5} "
        f"{row['score']:.3f} [{low:.3f}, {high:.3f}] of {row['samples']},"
    )


def table(rows: list[Row]) -> str:
    """Scores, lengths downwards and depths to the right."""
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    lines = [f"{'suite':16}{'memory':8}{'length':>10}" + "".join(f"{depth!s:>8}" for depth in depths)]
    for key in dict.fromkeys((row["suite"], row["memory"], row["length"]) for row in rows):
        own = [row for row in rows if (row["suite"], row["memory"], row["length"]) == key]
        cells = {row["depth"]: f"{row['score']:>8.3f}" for row in own}
        scores = "".join(cells.get(depth, f"{'':>8}") for depth in depths)
        lines.append(f"{key[0]:16}{key[1]:8}{key[2]:>10}{scores}")
    return "\n".join(lines)


def symbols(name: str, args: argparse.Namespace) -> None:
    """Train on symbols and test, unless the rows have it all; ``--peer`` takes its layers."""
    values = preset(name, "train symbols", [*args.set, f"train.seed={args.seed}"])
    label = "-".join(filter(None, (name, args.peer, str(args.seed))))
    places = {"out": str(args.out / label), "rows": str(args.rows), "name": label}
    options = options_from(SymbolOptions, {**values, **places})
    known = {row["length"] for row in RowFile(args.rows).rows if row["model"].partition(" ")[0] == label}
    if known >= set(options.tests):
        print(f"{label}: measured before")
        return

    def exchange(model: Any) -> tuple[Any, str, int]:
        changed, whose, size = with_deltanet(model, state_bytes(model) // model.config.num_hidden_layers)
        print(f"{label}: DeltaNet of {whose}, {size:,} bytes of state", flush=True)
        return changed, f"{label} ({whose})", size

    run_symbols(options, exchange if args.peer else None, args.commit)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="million")
    parser.add_argument("--symbols", help="a task over symbols in place of --preset")
    parser.add_argument("--peer", choices=["deltanet"], help="its layers in the place of Senri's attention")
    parser.add_argument("--ablate", nargs="*", help=f"all or some of {', '.join(ABLATIONS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/recall.jsonl"))
    parser.add_argument("--suites", default="passkey")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**15, 2**20, 2**17, 2**19])
    parser.add_argument("--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--samples", type=int, default=100, help="most of a cell")
    parser.add_argument("--seconds", type=float, default=1e9, help="in all, before no new cell is begun")
    parser.add_argument("--tokens", type=int, default=2**20, help="of one pass")
    parser.add_argument("--commit", default=commit(), help="of a checkout without its history")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the preset, such as train.steps=10")
    return parser.parse_args()


def main() -> None:
    """Parse, train, measure, print."""
    args = parsed()
    args.began = time.monotonic()
    # Drawing a batch takes 3 ms on one thread; many threads only wait for each other.
    torch.set_num_threads(1)
    for name in SYMBOLS.get(args.preset, (args.symbols,) if args.symbols else ()):
        symbols(name, args)
    if args.symbols or args.preset in SYMBOLS:
        return
    variants = {"": []} if args.ablate is None else {key: ABLATIONS[key] for key in args.ablate or ABLATIONS}
    for variant, changes in variants.items():
        name = "-".join(filter(None, ("recall", args.preset, variant, str(args.seed))))
        seconds = train(name, args, changes)
        took = "before" if seconds is None else f"in {seconds:.1f} s"
        print(f"{name}: trained {took}", flush=True)
        print(table(evaluate(name, args, seconds, variant)), flush=True)


if __name__ == "__main__":
    main()
