"""One sequence over the GPUs of a host: strong scaling of a layer and of a training step, and its exactness.

``python benchmarks/scale_out.py --out DIR --processes 2`` writes ``DIR/scale_out.jsonl``, one row per
measurement, by launching each of PARTS in so many processes with a time limit of its own: ``exact`` (bits
and errors against one GPU), ``layer`` (forward and backward on one GPU and on all), ``step`` (a SmolLM2-135M
shape: forward, loss, backward, AdamW), ``prefill`` (a prompt read by that model, and the states it leaves),
``forward`` (millions of tokens through a layer, the memory's error against float64),
``hop`` (a message to the neighbour), ``compiled`` (the step under torch.compile). A row on one GPU is timed
on all at the same time, so that they share clocks and heat; the fastest counts. A row is on the disk as soon
as it is measured; a part that fails or takes too long is named and the next begins. ``--parts`` chooses
parts, whose rows are then added to the file. Without GPUs it runs tiny shapes over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from newllm import ops
from newllm.backend import training_device
from newllm.distributed.line import Line, line_of
from newllm.distributed.prefill import prefill
from newllm.distributed.senri import parallelize
from newllm.distributed.sequence_parallel import sequence_attention, slice_bounds, traffic
from newllm.models import SenriConfig, SenriForCausalLM
from newllm.models.session import Session
from newllm.modules.rotary import Rotary
from newllm.runs import provenance
from newllm.training.losses import batch_loss

# Query heads, KV heads, width.
SHAPES = {"8B": (32, 8, 128), "SmolLM": (9, 3, 64)}
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {**SMOLLM2, "vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1}  # fmt: skip


class Bench:
    """Where rows go, and how calls are timed on all ranks together."""

    def __init__(self, out: Path, device: torch.device, line: Line, seconds: float) -> None:
        self.device, self.line, self.seconds = device, line, seconds
        self.file, self.began = out / "scale_out.jsonl", time.perf_counter()
        self.facts = provenance(0)

    def row(self, part: str, **values: Any) -> None:
        """Write and show a row; the first rank does."""
        if self.line.first:
            facts = {key: self.facts[key] for key in ("torch", "commit", "date", "devices")}
            row = {"suite": "scale_out", "part": part, "ranks": self.line.size, **values, **facts}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{time.perf_counter() - self.began:6.1f} s", part, values, flush=True)

    def synchronise(self) -> None:
        torch.get_device_module(self.device).synchronize()

    def times(
        self, call: Callable[[], Any], *, warm: int = 2, least: int = 5, most: int = 20
    ) -> list[Tensor]:
        """Milliseconds of several calls, which all ranks start together: ``[ranks]`` of each call."""
        for _ in range(warm):
            call()
        taken, begin = [], time.perf_counter()
        for done in range(most):
            late = torch.tensor(float(time.perf_counter() - begin > self.seconds), device=self.device)
            # The same number of rounds on all ranks; and a common start.
            dist.all_reduce(late)
            if done >= least and late:
                break
            self.synchronise()
            start = time.perf_counter()
            call()
            self.synchronise()
            mine = torch.tensor([1e3 * (time.perf_counter() - start)], device=self.device)
            all_ranks = [torch.empty_like(mine) for _ in range(self.line.size)]
            dist.all_gather(all_ranks, mine)
            taken.append(torch.cat(all_ranks))
        return taken

    def race(self, name: str, call: Callable[[], Any], *, alone: bool, **values: Any) -> float:
        """A row of the median over rounds: of the slowest rank together, of the fastest ``alone``.

        ``ms_ranks`` are the medians of each rank: GPUs of one host are not equally fast.
        """
        times = self.times(call)
        each = [float(x.min() if alone else x.max()) for x in times]
        low, ms, high = statistics.quantiles(each, n=4, method="inclusive")
        self.row(
            name,
            gpus=1 if alone else self.line.size,
            ms=ms,
            ms_low=low,
            ms_high=high,
            ms_ranks=torch.stack(times).median(0).values.tolist(),
            rounds=len(each),
            **values,
        )
        return ms


def inputs(
    bench: Bench, shape: str, tokens: int, *, seed: int, grad: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and beta of one layer."""
    heads, kv_heads, width = SHAPES[shape]
    draw = torch.Generator(bench.device).manual_seed(seed)
    q, k, v = (
        torch.randn(1, n, tokens, width, device=bench.device, dtype=dtype, generator=draw).requires_grad_(
            grad
        )
        for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v, torch.linspace(-1, 1, heads, device=bench.device).requires_grad_(grad)


def exact(bench: Bench, shape: str, tokens: int, window: int, dtype: torch.dtype) -> None:
    """Bits of output and memory, and differences of gradients, between one GPU and all."""
    line = bench.line
    first, end = slice_bounds(tokens, line.size, segment=window, window=window)[line.rank]
    for rule in ("linear", "delta"):
        whole = inputs(bench, shape, tokens, seed=1, grad=True, dtype=dtype)
        slope = torch.randn(
            whole[0].shape, device=bench.device, generator=torch.Generator(bench.device).manual_seed(2)
        )
        out, state = ops.infini_attention(*whole, window=window, segment=window, rule=rule)
        wanted = torch.autograd.grad(out, whole, slope.to(dtype))
        part = [x.detach()[:, :, first:end].requires_grad_() for x in whole[:3]]
        beta = whole[3].detach().requires_grad_()
        own, after = sequence_attention(*part, beta, mesh=line, window=window, segment=window, rule=rule)
        found = torch.autograd.grad(own, [*part, beta], slope[:, :, first:end].to(dtype))
        beta_slope = found[3].clone()
        dist.all_reduce(beta_slope)
        bits = [torch.equal(own, out[:, :, first:end])]
        bits.append(not line.last or torch.equal(after.matrix, state.matrix))
        same = torch.tensor([float(x) for x in bits], device=bench.device)
        dist.all_reduce(same, dist.ReduceOp.MIN)
        pairs = [
            *zip(found[:3], (x[:, :, first:end] for x in wanted[:3]), strict=True),
            (beta_slope, wanted[3]),
        ]
        errors = torch.stack([relative(a, b) for a, b in [(own, out[:, :, first:end]), *pairs]])
        dist.all_reduce(errors, dist.ReduceOp.MAX)
        names = ("out", "dq", "dk", "dv", "dbeta")
        bench.row(
            "exact", shape=shape, rule=rule, tokens=tokens, window=window, output_bits=bool(same[0]),
            state_bits=bool(same[1]), **dict(zip(names, errors.tolist(), strict=True)),
        )  # fmt: skip


def relative(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference as a share of the largest value."""
    return (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)


def hop(bench: Bench, sizes: list[int]) -> None:
    """A message to the right neighbour, of several sizes: the time of one hop."""
    for size in sizes:
        message = torch.zeros(size, dtype=torch.uint8, device=bench.device)
        bench.race(
            "hop", lambda m=message: bench.line.shift(m, m, "a message").wait(), alone=False, bytes=size
        )


def layer_step(parts: Any, slope: Tensor, **options: Any) -> Callable[[], None]:
    """Forward and backward of a layer."""
    attend = sequence_attention if "mesh" in options else ops.infini_attention

    def step() -> None:
        out, _ = attend(*parts, **options)
        torch.autograd.grad(out, parts, slope)

    return step


def layers(bench: Bench, shape: str, lengths: list[int], window: int, dtype: torch.dtype) -> None:
    """Strong scaling: the same sequence on one GPU and on all."""
    heads, kv_heads, width = SHAPES[shape]
    for tokens in lengths:
        ms = {}
        for alone in (True, False):
            first, end = (0, tokens) if alone else slice_bounds(
                tokens, bench.line.size, segment=window, window=window
            )[bench.line.rank]  # fmt: skip
            own = end - first
            parts = inputs(bench, shape, own, seed=bench.line.rank, grad=True, dtype=dtype)
            slope = torch.randn_like(parts[0])
            rope = Rotary.from_theta(width)(own if alone else own + window, parts[0])
            mesh = {} if alone else {"mesh": bench.line}
            step = layer_step(parts, slope, window=window, segment=window, rope=rope, **mesh)
            sent = traffic(1, kv_heads, width, width, window=window, dtype=dtype)
            ms[alone] = bench.race(
                "layer", step, alone=alone, shape=shape, tokens=tokens, window=window, direction="fwd+bwd",
                sent=0 if alone else 2 * sent.forward, heads=heads, kv_heads=kv_heads, width=width,
            )  # fmt: skip
            del parts, slope, rope, step
        bench.row("layer speedup", shape=shape, tokens=tokens, speedup=ms[True] / ms[False])


def long_forward(bench: Bench, shape: str, tokens: int, window: int, dtype: torch.dtype) -> None:
    """A very long sequence through one layer, and its memory beside float64."""
    line = bench.line
    first, end = slice_bounds(tokens, line.size, segment=window, window=window)[line.rank]
    parts = inputs(bench, shape, end - first, seed=line.rank, grad=False, dtype=dtype)
    rope = Rotary.from_theta(parts[0].shape[3])(end - first + window, parts[0])
    with torch.no_grad():

        def call() -> Any:
            return sequence_attention(*parts, mesh=line, window=window, segment=window, rope=rope)

        state = call()[1]
        total = torch.zeros(state.matrix.shape, dtype=torch.float64, device=bench.device)
        for begin in range(0, end - first, 16 * window):
            k, v = (x[:, :, begin : begin + 16 * window].double() for x in parts[1:3])
            total += torch.where(k > 0, k + 1, k.clamp(max=0).exp()).mT @ v
        dist.all_reduce(total)
        error = (
            relative(state.matrix, total)
            if line.last
            else torch.zeros((), dtype=torch.float64, device=bench.device)
        )
        dist.all_reduce(error, dist.ReduceOp.MAX)
        bench.race(
            "forward", call, alone=False, shape=shape, tokens=tokens, window=window, state_error=float(error)
        )


def training_steps(bench: Bench, sizes: dict[str, Any], tokens: int, window: int, compiled: bool) -> None:
    """A training step on one GPU, and sliced over all with gradients averaged by DDP."""
    line, device, ms = bench.line, bench.device, {}
    config = SenriConfig(**sizes, sliding_window=window, gate="tanh", prefill_chunk=tokens)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(sizes["vocab_size"], (1, tokens), generator=draw).to(device)
    batch = {"input_ids": ids, "targets": torch.cat([ids[:, 1:], ids[:, :1]], 1)}
    for alone in (True, False):
        torch.manual_seed(0)
        model: Any = SenriForCausalLM(config).to(device).train()
        own = batch
        if not alone:
            first, end = slice_bounds(tokens, line.size, segment=window, window=window)[line.rank]
            own = {name: x[:, first:end] for name, x in batch.items()}
            parallelize(model, line)
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

        def loss_of(model: Any, part: dict[str, Tensor]) -> Tensor:
            return batch_loss(model(input_ids=part["input_ids"], use_cache=False).logits, part)

        loss = torch.compile(loss_of) if compiled else loss_of

        def step(loss: Any = loss, model: Any = model, part: Any = own, optimiser: Any = optimiser) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                value = loss(model, part)
            value.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return value.detach()

        mean = step()
        dist.all_reduce(mean)
        ms[alone] = bench.race(
            "step", step, alone=alone, tokens=tokens, window=window, compiled=compiled,
            first_loss=float(mean) / line.size, parameters=sum(p.numel() for p in model.parameters()),
        )  # fmt: skip
        del model, optimiser, step, loss
        if device.type == "cuda":
            torch.cuda.empty_cache()
    bench.row("step speedup", tokens=tokens, compiled=compiled, speedup=ms[True] / ms[False])


def prompts(bench: Bench, sizes: dict[str, Any], tokens: int, window: int, dtype: torch.dtype) -> None:
    """A prompt read by one session, and by all together; the largest difference of the first memory."""
    line, device, ms, memories = bench.line, bench.device, {}, []
    config = SenriConfig(**sizes, sliding_window=window, gate="tanh")
    torch.manual_seed(0)
    model: Any = SenriForCausalLM(config).to(device, dtype).eval()
    ids = torch.randint(sizes["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(0))
    for alone in (True, False):
        session = Session(model)

        def read(session: Session = session, alone: bool = alone) -> None:
            session.reset()
            if alone:
                session.feed(ids)
            else:
                prefill(session, ids, mesh=line)

        read()
        layer = config.memory_layers[0]
        memories.append(session.snapshot().states[layer].matrix)
        ms[alone] = bench.race(
            "prefill", read, alone=alone, tokens=tokens, window=window, chunk=session.chunk,
            state_bytes=session.state_bytes,
        )  # fmt: skip
    difference = relative(memories[1], memories[0])
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    bench.row(
        "prefill speedup", tokens=tokens, speedup=ms[True] / ms[False], memory_difference=float(difference)
    )


# Part -> seconds it may take, Triton's compilation included.
PARTS = {"exact": 75, "layer": 75, "step": 60, "prefill": 60, "forward": 45, "hop": 30, "compiled": 150}


def parts_of(bench: Bench, part: str) -> None:
    """Measure one of PARTS."""
    if bench.device.type == "cuda":
        dtype, window, k = torch.bfloat16, 1024, 1024
        small, lengths, long, train = 16 * k, [512 * k, 256 * k, 128 * k], 4096 * k, 64 * k
        prompt, sizes, hops = 256 * k, SMOLLM2, [2**10, 2**17, 2**20, 2**23, 2**26]
    else:
        dtype, window = torch.float32, 16
        small, lengths, long, train = 128, [128, 64], 256, 64
        prompt, sizes, hops = 2048, TINY, [2**10, 2**17]
    if part == "exact":
        for shape in SHAPES:
            exact(bench, shape, small, window, dtype)
    elif part == "layer":
        for tokens in lengths:
            for shape in SHAPES:
                layers(bench, shape, [tokens], window, dtype)
    elif part == "forward":
        long_forward(bench, "8B", long, window, dtype)
    elif part == "prefill":
        prompts(bench, sizes, prompt, window, dtype)
    elif part == "hop":
        hop(bench, hops)
    else:
        # Else DDP's buckets cut the compiled model into a dozen graphs, to send gradients a bit earlier.
        with torch._dynamo.config.patch(optimize_ddp=False):
            training_steps(bench, sizes, train, window, compiled=part == "compiled")


def measure(part: str, out: Path, seconds: float) -> None:
    """One part in one of the launched processes."""
    device = training_device()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    # A group of its own, so that neighbours need not wait for the sums of gradients.
    line = line_of(dist.new_group(list(range(dist.get_world_size()))))
    parts_of(Bench(out, device, line, seconds), part)
    dist.destroy_process_group()


def together(command: list[str], processes: int, seconds: float) -> str | None:
    """``command`` as so many ranks; why it was stopped, None where all ended well.

    Nothing is left of it then: when one rank fails, or the time is over, the others are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ends, ranks = time.monotonic() + seconds, []
    try:
        for rank in map(str, range(processes)):
            ranks.append(
                subprocess.Popen(command, env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank})
            )
        while time.monotonic() < ends:
            codes = [process.poll() for process in ranks]
            failed = [f"rank {rank} ended with {code}" for rank, code in enumerate(codes) if code]
            if failed:
                return ", ".join(failed)
            if None not in codes:
                return None
            time.sleep(0.05)
        return f"out of time, {seconds:.0f} seconds"
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def launch(part: str, args: argparse.Namespace) -> bool:
    """One part in ``args.processes`` processes; whether it ended well."""
    own = [sys.executable, __file__, "--out", str(args.out), "--seconds", str(args.seconds), "--parts", part]
    began = time.monotonic()
    stopped = together(own, args.processes, PARTS[part] * args.patience)
    told = f"stopped: {stopped}" if stopped else "done"
    print(f"{part}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    return stopped is None


def main() -> None:
    """Launch the parts, or be one of a part's processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each row")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of the parts' time limits")
    args = parser.parse_args()
    if "RANK" in os.environ:
        measure(args.parts[0], args.out, args.seconds)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [part for part in args.parts if not launch(part, args)]
    sys.exit(f"not done: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
