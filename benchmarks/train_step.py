"""One training step of a SmolLM2-135M shape: Senri, the same model with full attention, and window alone.

``python benchmarks/train_step.py`` writes ``benchmarks/results/train_step.jsonl`` and prints tokens/s, the
peak of memory beyond weights and optimiser, and the share of attention. All models are compiled alike, train
in bfloat16 autocast with AdamW at batch 1, and take turns within one process. Compiling dominates, so the
models of all lengths are compiled side by side first, by processes of their own that run nothing, into the
caches on disk that the measuring process reads. Without a GPU it runs a tiny shape, into ``runs/bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from newllm import ops
from newllm.backend import training_device
from newllm.files import replace_file
from newllm.measuring.timing import Clock
from newllm.models import SenriConfig, SenriForCausalLM
from newllm.modules.rotary import Rotary
from newllm.runs import commit, provenance
from newllm.training.losses import batch_loss

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}  # fmt: skip
TINY = {**SMOLLM2, "vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1}  # fmt: skip
SENRI, FULL, WINDOW = "newllm", "full attention, SDPA", "window alone"


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


def models(sizes: dict[str, Any], window: int, segment: int) -> dict[str, Any]:
    """The three models by name."""
    layers = sizes["num_hidden_layers"]
    memory = [layers // 3, 2 * layers // 3]
    options = {"sliding_window": window, "segment": segment, "gate": "tanh"}
    return {
        SENRI: SenriForCausalLM(SenriConfig(**sizes, **options, memory_layers=memory)),
        WINDOW: SenriForCausalLM(SenriConfig(**sizes, **options, memory_layers=[])),
        FULL: LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=_PLAIN_SDPA)),
    }


def training_step(
    model: Any, ids: Tensor, checkpointing: bool, backend: str | Callable[..., Any] | None
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
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            value = loss(ids)
        value.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def attention_step(
    name: str, sizes: dict[str, Any], tokens: int, window: int, segment: int, device: torch.device
) -> Callable[[], None]:
    """The attention of all layers alone, forward and backward, at the model's sizes."""
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    layers = sizes["num_hidden_layers"]
    width = sizes["hidden_size"] // heads
    dtype = torch.bfloat16
    q = torch.randn(1, heads, tokens, width, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(1, kv_heads, tokens, width, device=device, dtype=dtype, requires_grad=True) for _ in "kv"
    )
    beta = torch.zeros(heads, device=device, requires_grad=True)
    rope = Rotary.from_theta(width)(tokens, q)
    memory = {SENRI: 2, WINDOW: 0, FULL: 0}[name]

    def windowed() -> Tensor:
        return ops.window_attention(q, k, v, window=window, rope=rope)

    def remembering() -> Tensor:
        return ops.infini_attention(q, k, v, beta, window=window, segment=segment, gate="tanh", rope=rope)[0]

    def full() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    plain = full if name == FULL else windowed
    calls = [remembering] * memory + [plain] * (layers - memory)

    def step() -> None:
        for call in calls:
            call().sum().backward()

    return step


class _InCache(Exception):
    """The code lies in the cache on disk."""


def _only_compile(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    # Else the backward pass would be compiled when it first runs, which it does not.
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        compile_fx(graph, inputs)
    raise _InCache


def compile_ahead(name: str, tokens: int, window: int, checkpointing: bool, threads: int) -> None:
    """Leave the code of one model's step at one length in the cache on disk; run nothing."""
    device = training_device()
    sizes = SMOLLM2 if device.type == "cuda" else TINY
    torch.set_num_threads(threads)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    model = models(sizes, window, window)[name].to(device)
    try:
        with torch._inductor.config.patch(compile_threads=threads):
            training_step(model, ids, checkpointing, _only_compile)()
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _InCache):
            raise


def compile_all_ahead(args: argparse.Namespace) -> None:
    """``compile_ahead`` for all models and lengths side by side."""
    began, tasks = (
        time.monotonic(),
        [(name, n) for n in reversed(args.tokens) for name in (SENRI, FULL, WINDOW)],
    )
    threads = max(1, (os.cpu_count() or 1) // len(tasks))
    # A process that has used CUDA must not be forked.
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for done in [
            pool.submit(compile_ahead, name, n, args.window, n >= args.checkpointing_from, threads)
            for name, n in tasks
        ]:
            done.result()
    print(f"compiled {len(tasks)} steps ahead in {time.monotonic() - began:.0f} s", flush=True)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per length and model."""
    device = training_device()
    on_gpu = device.type == "cuda"
    sizes, window = SMOLLM2 if on_gpu else TINY, args.window
    clock, run, rows = Clock(device), uuid.uuid4().hex[:12], []
    facts = provenance(0) | {"commit": args.commit}
    for tokens in args.tokens:
        # One cache of compiled code for three models: another length would be one shape too many.
        torch._dynamo.reset()
        torch.manual_seed(0)
        ids = torch.randint(sizes["vocab_size"], (1, tokens), device=device)
        checkpointing = tokens >= args.checkpointing_from
        steps: dict[str, Callable[[], None]] = {}
        peaks: dict[str, float | None] = {}
        began = time.monotonic()
        for name, model in models(sizes, window, window).items():
            steps[name] = training_step(
                model.to(device), ids, checkpointing, "inductor" if args.compile else None
            )
            for _ in range(3):
                steps[name]()
            peaks[name] = clock.extra_gib(steps[name])
        print(f"{tokens:>7,} tokens  first steps in {time.monotonic() - began:.0f} s", flush=True)
        times = clock.race(steps, seconds=args.seconds)
        alone = {name: attention_step(name, sizes, tokens, window, window, device) for name in steps}
        for call in alone.values():
            call()
        attention = clock.race(alone, seconds=args.seconds / 2)
        for name, timed in times.items():
            rows.append(
                {
                    "suite": "train_step", "op": "training step", "impl": name, "direction": "step",
                    "shape": "SmolLM2-135M" if on_gpu else "tiny", "batch": 1, "tokens": tokens,
                    "window": window, "segment": window, "checkpointing": checkpointing,
                    "dtype": "bfloat16 autocast", "ms": timed.ms, "ms_low": timed.low, "ms_high": timed.high,
                    "tokens_per_second": 1e3 * tokens / timed.ms, "gib": peaks[name],
                    "attention_ms": attention[name].ms, "attention_share": attention[name].ms / timed.ms,
                    "floor_ms": None, "run": run, "device": facts["devices"], "torch": facts["torch"],
                    "triton": facts["triton"], "commit": facts["commit"], "date": facts["date"],
                }
            )  # fmt: skip
        show(rows[-len(times) :])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows of one length, and newllm beside the others."""
    for row in rows:
        memory = "" if row["gib"] is None else f", peak {row['gib']:.2f} GiB"
        print(
            f"{row['tokens']:>7,} tokens  {row['impl']:22} {row['tokens_per_second']:>12,.0f} tokens/s"
            f"{memory}, attention {row['attention_share']:.0%}"
        )
    speed = {row["impl"]: row["tokens_per_second"] for row in rows}
    print(
        f"{'':17}{SENRI}: {speed[SENRI] / speed[FULL]:.2f} x full attention, "
        f"{speed[SENRI] / speed[WINDOW]:.2f} x window alone",
        flush=True,
    )


def main() -> None:
    """Measure and write."""
    on_gpu = training_device().type == "cuda"
    lengths, window = ([2048, 8192, 32_768, 65_536], 1024) if on_gpu else ([64, 128], 16)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths, help=f"lengths ({lengths})")
    parser.add_argument("--window", type=int, default=window, help="tokens, also of a segment")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the turns at one length")
    parser.add_argument("--checkpointing-from", type=int, default=65_536, help="recompute from here on")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--processes", type=int, default=12, help="that compile ahead; 0: none")
    parser.add_argument("--commit", default=commit(), help="of a checkout without its history")
    parser.add_argument("--out", type=Path, help="file of the rows")
    args = parser.parse_args()
    if args.compile and args.processes:
        compile_all_ahead(args)
    rows = measure(args)
    folder = Path(__file__).parent / "results" if on_gpu else Path("runs/bench")
    path = args.out or folder / "train_step.jsonl"
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))
    print(path)


if __name__ == "__main__":
    main()
