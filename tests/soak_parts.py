"""The parts ``soak`` and ``sessions`` of ``python -m benchmarks.reliability``: streams that hardly end."""

from __future__ import annotations

import copy
import gc
import json
import statistics
import time
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from newllm import Session
from newllm.evaluation.process import resident_bytes
from newllm.evaluation.rows import RowFile
from newllm.models import ContextLMConfig, ContextLMForCausalLM
from newllm.models.streams import Snapshot
from tests.reliability_parts import Options, facts, in_parts
from tests.tiny_models import SIZES, VOCABULARY, tiny_senri

SESSIONS = 10_000
# Memory is flat if its last quarter's median is no larger than the first quarter's by this share.
FLAT = 0.01
_SENRI = {**SIZES, "num_hidden_layers": 2, "memory_layers": [0, 1]}


class Scale(NamedTuple):
    """Tokens read before anything is measured, tokens between two measurements, sizes of Senri."""

    warm: int
    step: int
    senri: dict[str, Any]


# The narrowest heads that the kernels have, in passes and segments that keep a GPU busy.
SCALES = {
    "cpu": Scale(4096, 2048, {**_SENRI, "sliding_window": 64, "segment": 32}),
    "cuda": Scale(65536, 65536, {**_SENRI, "hidden_size": 64, "sliding_window": 512, "segment": 256}),
}


def _context(scale: Scale) -> Any:
    """A gated context model that forgets: with little weight on its context it does not become chaotic."""
    config = ContextLMConfig(vocab_size=VOCABULARY, embed_dim=32, context_dim=32, hidden_dim=48)
    return ContextLMForCausalLM(config).eval()


STREAMS: dict[str, Callable[[Scale], Any]] = {
    "linear": lambda scale: tiny_senri(**scale.senri),
    "delta": lambda scale: tiny_senri(**scale.senri, rule="delta"),
    "context": _context,
}


class Twins:
    """A stream and the same in float64, which read the same tokens; kept in two files and one of numbers."""

    def __init__(self, name: str, device: str, folder: Path, resume: bool) -> None:
        torch.manual_seed(0)
        model = STREAMS[name](SCALES[device]).to(device)
        self.name, self.files = name, [folder / f"{name}-{kind}.safetensors" for kind in ("stream", "exact")]
        self.sessions = [Session(model), Session(copy.deepcopy(model).double())]
        if resume and all(file.exists() for file in self.files):
            for session, file in zip(self.sessions, self.files, strict=True):
                session.load(file)
            if len({tuple(session.tokens) for session in self.sessions}) > 1:
                raise RuntimeError(f"{self.files[0].parent} holds two states of different lengths; remove it")

    @property
    def tokens(self) -> int:
        return self.sessions[0].tokens[0]

    def read(self, count: int) -> None:
        """``count`` tokens, the same ones wherever the stream was cut."""
        drawn = torch.Generator().manual_seed(self.tokens)
        ids = torch.randint(1, VOCABULARY, (count,), generator=drawn)
        for session in self.sessions:
            session.feed(ids)

    def error(self) -> dict[str, float]:
        """The largest difference of each kind of state, as a share of its largest value."""
        stream, exact = (session.snapshot() for session in self.sessions)
        found: dict[str, float] = {}
        for (name, mine), (_, other) in zip(_floats(stream), _floats(exact), strict=True):
            size = float(other.abs().max())
            share = float((mine.double() - other).abs().max()) / size if size else 0.0
            found[name] = max(found.get(name, 0.0), share)
        return found

    def save(self) -> None:
        for session, file in zip(self.sessions, self.files, strict=True):
            session.save(file)


def _floats(snapshot: Snapshot) -> Iterator[tuple[str, torch.Tensor]]:
    for state in snapshot.states:
        if state is not None:
            yield from ((n, x) for n, x in state._asdict().items() if x is not None and x.is_floating_point())


class Seen:
    """What was measured of a stream, in memory that does not grow with it; ``device``: bytes of a GPU."""

    def __init__(self, room: int = 2**20) -> None:
        self.resident, self.device = (array("q", bytes(8 * room)) for _ in range(2))
        self.steps = 0
        self.most: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def note(self, resident: int, error: dict[str, float], device: int = 0) -> None:
        """After a step: bytes of both memories and the errors of the state."""
        self.resident[self.steps], self.device[self.steps] = resident, device
        self.steps += 1
        self.last = error
        self.most = {name: max(each, self.most.get(name, 0.0)) for name, each in error.items()}


def bound(tokens: int) -> float:
    """What a sum of so many tokens' parts may err by in float32, as a share of it (Higham, sec. 3.1)."""
    return tokens * torch.finfo(torch.float32).eps / 2


def soak(options: Options) -> bool:
    """Every stream in turns until the time is over, or each has read ``count`` tokens; a row for each."""
    folder = options.out.parent.parent / "runs" / "soak"
    if options.resume:
        folder.mkdir(parents=True, exist_ok=True)
    scale, on_gpu = SCALES[options.device], options.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    chosen = [options.part] if options.part else [*STREAMS]
    twins = [Twins(name, options.device, folder, options.resume) for name in chosen]
    before, began = [each.tokens for each in twins], time.perf_counter()
    for each in twins:
        each.read(scale.warm)
    seen = {each.name: Seen() for each in twins}
    while not all(each.steps for each in seen.values()) or time.perf_counter() - began < 60 * options.minutes:
        going = [each for each in twins if options.count is None or each.tokens < options.count]
        if not going:
            break
        for each in going:
            each.read(scale.step)
            held_there = torch.cuda.memory_allocated() if on_gpu else 0
            seen[each.name].note(resident_bytes(), each.error(), held_there)
    held, seconds = True, time.perf_counter() - began
    for each, start in zip(twins, before, strict=True):
        each.save()
        if not seen[each.name].steps:
            continue
        row = _measured(each, start, seen[each.name])
        held &= not row["failures"]
        _append(options, "soak", {"part": each.name, **row, "minutes": round(seconds / 60, 2)})
    return held


def _measured(twins: Twins, start: int, seen: Seen) -> dict[str, Any]:
    """A row of a stream: memory in the first and in the last quarter, the state's error, what is wrong."""
    tokens, errors = twins.tokens - start, seen.most
    memories = {"resident": seen.resident, "device": seen.device}
    quarters = {name: _quarters(each[: seen.steps]) for name, each in memories.items() if any(each)}
    failures = [
        f"{name} memory grew by {last - first:.0f} bytes in {tokens} tokens"
        for name, (first, last) in quarters.items()
        if last - first >= FLAT * first
    ]
    failures += [
        f"{name} is off by {error:.3g}, at most {bound(twins.tokens):.3g}"
        for name, error in errors.items()
        if not error <= bound(twins.tokens)
    ]
    return {
        "tokens": twins.tokens,
        "tokens_now": tokens,
        "state_bytes": twins.sessions[0].state_bytes,
        **{
            f"{name}_mb": {"first": round(first / 1e6, 2), "last": round(last / 1e6, 2)}
            for name, (first, last) in quarters.items()
        },
        "errors": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "last_errors": {name: float(f"{error:.3g}") for name, error in seen.last.items()},
        "bound": float(f"{bound(twins.tokens):.3g}"),
        "failures": failures,
    }


def _quarters(steps: array[int]) -> tuple[float, float]:
    """The medians of the first and of the last quarter."""
    quarter = max(1, len(steps) // 4)
    return statistics.median(steps[:quarter]), statistics.median(steps[-quarter:])


def opened_and_closed(count: int, device: str, samples: int = 10) -> list[int]:
    """Resident bytes after each of ``samples`` parts of ``count`` sessions: fed, continued, dropped.

    Raises AssertionError where a session outlives its last reference.
    """
    torch.manual_seed(0)
    model = tiny_senri().to(device)
    ids = torch.randint(1, VOCABULARY, (11,))
    found = []
    for part in range(samples):
        for _ in range(count * part // samples, count * (part + 1) // samples):
            session = Session(model)
            session.feed(ids)
            session.generate(max_new_tokens=2)
            alive = weakref.ref(session)
            del session
        gc.collect()
        assert alive() is None, "a session outlives its last reference"
        found.append(resident_bytes())
    return found


def sessions(options: Options) -> bool:
    """Sessions opened and closed one after the other."""
    count = options.count or SESSIONS

    def run(part: str) -> dict[str, object]:
        resident = opened_and_closed(count, options.device)
        state = Session(tiny_senri())
        state.feed([[1]])
        grown = (resident[-1] - resident[1]) / (0.8 * count)
        # What leaked once a session would be its state, or at least an object.
        failures = [f"memory grew by {grown:.0f} bytes a session"] if grown >= 64 else []
        return {"sessions": count, "resident_mb": [round(each / 1e6, 2) for each in resident],
                "grown_bytes_a_session": round(grown, 2), "state_bytes": state.state_bytes,
                "failures": failures}  # fmt: skip

    return in_parts("sessions", ["open and close"], run, options)


def _append(options: Options, suite: str, row: dict[str, Any]) -> None:
    RowFile(options.out / f"{suite}.jsonl").append({"suite": suite, **row, **facts(options)})
    print(json.dumps(row), flush=True)
