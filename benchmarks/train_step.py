"""One training step of a SmolLM2-135M shape: Senri, the same model with full attention, and window alone.

``python benchmarks/train_step.py`` writes ``benchmarks/results/train_step.jsonl`` and prints tokens/s, the
peak of memory beyond weights and optimiser, and the share of attention. All models are compiled alike and
train in bfloat16 autocast with AdamW at batch 1; ``--cuda-graphs`` replays both passes as CUDA graphs, which
loses no time to launching kernels. Each model at each length has a process of its own: all are compiled side
by side, and then the three of a length take turns on the device. One that fails is named, in its row too, and
the others go on; the file is written anew after each length. Without a GPU it runs a tiny shape, into
``runs/bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from newllm import ops
from newllm.backend import training_device
from newllm.files import replace_file
from newllm.measuring.timing import Clock, Timed, summary, turns
from newllm.measuring.workers import Wait, Worker
from newllm.models import SenriConfig, SenriForCausalLM
from newllm.modules.rotary import Rotary
from newllm.runs import commit, provenance
from newllm.training.losses import batch_loss

Backend = Callable[[torch.fx.GraphModule, list[Tensor]], Callable[..., Any]]
Samples = list[tuple[float, float]]
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}  # fmt: skip
TINY = {**SMOLLM2, "vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1}  # fmt: skip
SENRI, FULL, WINDOW = "newllm", "full attention, SDPA", "window alone"
# Times taken in one turn, least and most turns, share of the time limit that is for compiling.
_TIMED, _ROUNDS, _COMPILING = 2, (3, 25), 0.6


# Under torch.compile, transformers makes a mask for its "sdpa", which keeps it from FlashAttention's kernels.
_PLAIN_SDPA = "plain_causal_sdpa"


def _causal_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=options["scaling"], enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register(_PLAIN_SDPA, _causal_sdpa)


def make_model(name: str, sizes: dict[str, Any], window: int) -> Any:
    """One of the three; segments are as long as the window."""
    layers = sizes["num_hidden_layers"]
    if name == FULL:
        return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=_PLAIN_SDPA))
    memory = [layers // 3, 2 * layers // 3] if name == SENRI else []
    return SenriForCausalLM(
        SenriConfig(**sizes, sliding_window=window, segment=window, gate="tanh", memory_layers=memory)
    )


def training_step(
    model: Any, ids: Tensor, checkpointing: bool, backend: str | Backend | None
) -> Callable[[], None]:
    """A whole step: forward, loss, backward, AdamW; compiled by ``backend``, not at all by None."""
    model.train()
    if checkpointing:
        new = hasattr(model, "activation_checkpointing_enable")
        getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=ids.is_cuda)

    def loss_of(ids: Tensor) -> Tensor:
        return batch_loss(model(input_ids=ids, use_cache=False).logits, {"input_ids": ids})

    loss = loss_of if backend is None else torch.compile(loss_of, backend=backend)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            value = loss(ids)
        value.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def attention_layers(
    name: str, sizes: dict[str, Any], tokens: int, window: int, device: torch.device
) -> list[tuple[int, Callable[[], object]]]:
    """The model's kinds of attention: how many layers are of it, and one of them, forward and backward."""
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    layers = sizes["num_hidden_layers"]
    width = sizes["hidden_size"] // heads
    shapes = [(1, heads, tokens, width), *2 * [(1, kv_heads, tokens, width)]]
    q, k, v = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes
    )
    beta = torch.zeros(heads, device=device, requires_grad=True)
    rope, gradient = Rotary.from_theta(width)(tokens, q), torch.randn_like(q)

    def full() -> object:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, (q, k, v), gradient)

    def windowed() -> object:
        out = ops.window_attention(q, k, v, window=window, rope=rope)
        return torch.autograd.grad(out, (q, k, v), gradient)

    def remembering() -> object:
        out, _ = ops.infini_attention(q, k, v, beta, window=window, segment=window, gate="tanh", rope=rope)
        return torch.autograd.grad(out, (q, k, v, beta), gradient)

    if name == FULL:
        return [(layers, full)]
    return [(layers - 2, windowed), (2, remembering)] if name == SENRI else [(layers, windowed)]


def compiling(wait: Wait, cuda_graphs: bool) -> Backend:
    """Inductor, on both passes at once; with the first graph compiled, wait."""
    waits = iter([wait])

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        # Else the backward pass would be compiled when it first runs, in the turn of this process.
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            compiled = compile_fx(graph, inputs, config_patches={"triton.cudagraphs": cuda_graphs})
        for each in waits:
            each()
        return compiled  # type: ignore[no-any-return]

    return backend


def prepare(
    wait: Wait, name: str, tokens: int, window: int, checkpointing: bool, compiled: bool, cuda_graphs: bool,
    threads: int,
) -> tuple[dict[str, Any], dict[str, Callable[[], Samples]]]:  # fmt: skip
    """One model at one length, warm: its peak of memory, and turns of its step and of its attention."""
    device = training_device()
    sizes = SMOLLM2 if device.type == "cuda" else TINY
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    ids = torch.randint(sizes["vocab_size"], (1, tokens), device=device)
    model = make_model(name, sizes, window).to(device)
    layers = attention_layers(name, sizes, tokens, window, device)
    for _, call in layers:
        # Kernels of our own are compiled when they first run: better now, beside the others.
        call()
    step = training_step(model, ids, checkpointing, compiling(wait, cuda_graphs) if compiled else None)
    if not compiled:
        wait()
    with torch._inductor.config.patch(compile_threads=threads):
        step()
    clock = Clock(device)
    for _ in range(2):
        step()
    gib = clock.extra_gib(step)

    def turn(*calls: tuple[int, Callable[[], object]]) -> Samples:
        """Times of the calls, each so often; before, memory is taken, and afterwards left to the others."""
        for _, call in calls:
            call()
        found = []
        for _ in range(_TIMED):
            times = [(count, *clock.once(call)) for count, call in calls]
            found.append((sum(n * ms for n, ms, _ in times), sum(n * host for n, _, host in times)))
        torch.cuda.empty_cache()
        return found

    torch.cuda.empty_cache()
    return {"gib": gib}, {"step": lambda: turn((1, step)), "attention": lambda: turn(*layers)}


def race(workers: dict[str, Worker], what: str, seconds: float, until: float) -> dict[str, Timed]:
    """Times of a call of ``workers`` in turns; one that fails is left out."""
    taken: dict[str, Samples] = {name: [] for name in workers}
    for _ in turns(seconds, _ROUNDS):
        for name, worker in workers.items():
            taken[name] += worker.call(what, until) or []
    return {name: summary(taken[name]) for name, worker in workers.items() if worker.error is None}


def start(args: argparse.Namespace) -> dict[int, dict[str, Worker]]:
    """All workers, by length and model; they prepare at once."""
    names = (SENRI, WINDOW, FULL)
    threads = max(1, 2 * (os.cpu_count() or 1) // (len(names) * len(args.tokens)))

    def worker(name: str, tokens: int) -> Worker:
        checkpointing = tokens >= args.checkpointing_from
        choices = (checkpointing, args.compile, args.cuda_graphs)
        return Worker(prepare, name, tokens, args.window, *choices, threads)

    return {tokens: {name: worker(name, tokens) for name in names} for tokens in args.tokens}


def measure(args: argparse.Namespace, write: Callable[[list[dict[str, Any]]], None]) -> None:
    """Rows of three models, length by length, each time all of them to ``write``."""
    began = time.monotonic()
    until, compiled_by = began + args.limit, began + _COMPILING * args.limit
    waiting, rows = start(args), []
    shared = facts(args)
    while waiting:
        ready = [n for n, workers in waiting.items() if all(worker.waits() for worker in workers.values())]
        now = time.monotonic()
        if now < until and (not ready or (len(ready) < len(waiting) and now < compiled_by)):
            time.sleep(0.05)
            continue
        tokens = ready[0] if ready else next(iter(waiting))
        print(f"{tokens:>7,} tokens  turns begin after {now - began:.0f} s", flush=True)
        workers = waiting.pop(tokens)
        rows += length_rows(tokens, workers, args, shared, until)
        write(rows)
        show(rows[-len(workers) :])
        for worker in workers.values():
            worker.end()


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common."""
    on_gpu, made = training_device().type == "cuda", provenance(0)
    return {
        "suite": "train_step", "op": "training step", "direction": "step", "batch": 1,
        "shape": "SmolLM2-135M" if on_gpu else "tiny", "window": args.window, "segment": args.window,
        "compiled": args.compile, "cuda_graphs": args.cuda_graphs,
        "dtype": "bfloat16 autocast", "floor_ms": None,
        "device": made["devices"], "torch": made["torch"], "triton": made["triton"],
        "commit": args.commit, "date": made["date"], "run": uuid.uuid4().hex[:12],
    }  # fmt: skip


def length_rows(
    tokens: int, workers: dict[str, Worker], args: argparse.Namespace, shared: dict[str, Any], until: float
) -> list[dict[str, Any]]:
    """One row per model; of one that failed, with its ``error`` and without numbers."""
    found = {name: worker.prepared(until) or {"gib": None} for name, worker in workers.items()}
    steps = race(workers, "step", args.seconds, until)
    attention = race(workers, "attention", args.seconds / 2, until)
    numbers = ("ms", "ms_low", "ms_high", "host_ms", "tokens_per_second", "attention_ms", "attention_share")
    rows = []
    for name, worker in workers.items():
        row = {**shared, "impl": name, "tokens": tokens, "checkpointing": tokens >= args.checkpointing_from}
        row |= dict.fromkeys(numbers) | found[name] | {"error": worker.error}
        if name in steps:
            took = steps[name]
            row |= {"ms": took.ms, "ms_low": took.low, "ms_high": took.high, "host_ms": took.host_ms}
            row |= {"rounds": took.rounds, "tokens_per_second": 1e3 * tokens / took.ms}
        if name in attention:
            alone = attention[name].ms
            row |= {"attention_ms": alone, "attention_share": alone / row["ms"]}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows of one length, and newllm beside the others."""
    speed = {row["impl"]: row["tokens_per_second"] for row in rows if row["tokens_per_second"]}
    for row in rows:
        start = f"{row['tokens']:>7,} tokens  {row['impl']:22}"
        if row["error"] is not None:
            print(f"{start} failed: {row['error']}")
        if row["impl"] in speed:
            memory = "" if row["gib"] is None else f", peak {row['gib']:.2f} GiB"
            share = "" if row["attention_share"] is None else f", attention {row['attention_share']:.0%}"
            print(f"{start} {row['tokens_per_second']:>12,.0f} tokens/s{memory}{share}")
    beside = {"full attention": FULL, "window alone": WINDOW}
    ratios = [
        f"{speed[SENRI] / speed[other]:.2f} x {said}"
        for said, other in beside.items()
        if {SENRI, other} <= {*speed}
    ]
    print(f"{'':17}{SENRI}: {', '.join(ratios) or 'nothing to compare'}", flush=True)


def main() -> None:
    """Measure and write."""
    on_gpu = training_device().type == "cuda"
    lengths, window = ([2048, 8192, 32_768, 65_536], 1024) if on_gpu else ([64, 128], 16)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths, help=f"lengths ({lengths})")
    parser.add_argument("--window", type=int, default=window, help="tokens, also of a segment")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the turns at one length")
    parser.add_argument("--limit", type=float, default=450.0, help="seconds for all; what is late has failed")
    parser.add_argument("--checkpointing-from", type=int, default=65_536, help="recompute from here on")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--commit", default=commit(), help="of a checkout without its history")
    parser.add_argument("--out", type=Path, help="file of the rows")
    args = parser.parse_args()
    folder = Path(__file__).parent / "results" if on_gpu else Path("runs/bench")
    path = args.out or folder / "train_step.jsonl"

    def write(rows: list[dict[str, Any]]) -> None:
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))

    measure(args, write)
    print(path)


if __name__ == "__main__":
    main()
