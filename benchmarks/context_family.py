"""The documents' experiment on the context family, and the questions that they left open.

    python -m benchmarks.context_family prepare chat.npz     # where the corpora are: tokens and embeddings
    python -m benchmarks.context_family run chat.npz         # on a GPU: all experiments, all seeds
    python -m benchmarks.context_family report               # docs/context-family.md from the rows

Rows go to ``benchmarks/results/context-family.jsonl``; a row of the same experiment, variant, seed and device
is replaced, so that experiments can be run one by one with ``--only``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.context_family_report import write_report
from newllm.backend import resolve, training_device, use_backend
from newllm.evaluation.context_checks import stream_checks
from newllm.evaluation.ngram import NGram
from newllm.files import replace_file
from newllm.models import (
    ContextKVConfig,
    ContextKVForCausalLM,
    ContextLMConfig,
    ContextLMForCausalLM,
)
from newllm.runs import commit, provenance
from newllm.training.end_to_end import train_end_to_end
from newllm.training.phase_config import Phase1Config, Phase2Config
from newllm.training.two_phase import Stream, run_phases

RESULTS = Path("benchmarks/results/context-family.jsonl")
PAGE = Path("docs/context-family.md")
_KEY = ("experiment", "variant", "seed", "device")
_NGRAM_ORDER = 16


def prepare(path: Path, *, data: str, tokens: int, validation: int) -> None:
    """Write ids and borders of a chat corpus by SmolLM2's tokenizer, and SmolLM2's embeddings in float16."""
    from newllm.cli.loading import source_path
    from newllm.data.token_cache import cached_tokens
    from newllm.models.convert import load_base, load_base_tokenizer
    from newllm.training.assemble import read_corpus
    from newllm.training.config import SourceConfig

    base = source_path("smollm2")
    tokenizer = load_base_tokenizer(base)
    corpus = read_corpus(data, SourceConfig())
    print(corpus.said())
    arrays: dict[str, Any] = {"vocabulary": len(tokenizer), "name": corpus.record()["read"]}
    for name, part, limit in (("train", corpus.train, tokens), ("validation", corpus.validation, validation)):
        stream = Stream.of(cached_tokens(part, tokenizer), limit)
        arrays |= {
            f"{name}_ids": stream.ids.numpy().astype("uint16"),
            f"{name}_borders": stream.borders.numpy(),
        }
        print(f"{name}: {len(stream.ids):,} tokens")
    arrays["embedding"] = (
        load_base(base, dtype="float32").get_input_embeddings().weight.detach().half().numpy()
    )
    arrays["vocabulary"] = len(arrays["embedding"])

    def write(place: Path) -> None:
        with place.open("wb") as file:
            np.savez(file, **arrays)

    replace_file(path, write)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


class Bench:
    """The data, the sizes, and where rows go."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        held = np.load(path)
        self.options, self.device = options, training_device()
        self.vocabulary = int(held["vocabulary"])
        self.embedding = torch.from_numpy(held["embedding"]).float()
        self.name = str(held["name"])
        self.streams = {
            name: Stream(
                torch.from_numpy(held[f"{name}_ids"].astype("int64")),
                torch.from_numpy(held[f"{name}_borders"]),
            )
            for name in ("train", "validation")
        }
        about = provenance(0) | {"commit": options.commit}
        self.about = {key: about[key] for key in ("torch", "commit", "date")}
        self.about["device"] = (
            torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "two CPU cores"
        )
        self.run = hashlib.sha256(f"{time.time_ns()}".encode()).hexdigest()[:12]

    def stream(self, name: str, limit: int | None = None) -> Stream:
        """The first ``limit`` tokens of a set."""
        whole = self.streams[name]
        ids = whole.ids[:limit]
        return Stream(ids, whole.borders[whole.borders < len(ids)])

    def lm(self, seed: int, **fields: Any) -> ContextLMForCausalLM:
        """A two-phase model with the given embeddings, turned into its width without changing a product."""
        torch.manual_seed(seed)
        config = ContextLMConfig(
            vocab_size=self.vocabulary, embed_dim=self.options.embed_dim, cell="context",
            **{"context_dim": self.options.context_dim, **fields},
        )  # fmt: skip
        return self._with_embeddings(ContextLMForCausalLM(config))

    def kv(self, seed: int, **fields: Any) -> ContextKVForCausalLM:
        """A Context-KV model with the same embeddings."""
        torch.manual_seed(seed)
        width = self.options.embed_dim
        config = ContextKVConfig(
            vocab_size=self.vocabulary, embed_dim=width, context_dims=[self.options.context_dim],
            intermediate_size=4 * width, **fields,
        )  # fmt: skip
        return self._with_embeddings(ContextKVForCausalLM(config))

    def _with_embeddings(self, model: Any) -> Any:
        """Rows of the pretrained table under a fixed map with orthonormal rows or columns."""
        given, width = self.embedding.shape[1], self.options.embed_dim
        generator = torch.Generator().manual_seed(0)
        square = torch.linalg.qr(torch.randn(max(given, width), max(given, width), generator=generator))[0]
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(self.embedding @ square[:given, :width])
        return model.to(self.device)

    def log(self, row: dict[str, Any]) -> None:
        """One line for the screen."""
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))

    def write(self, experiment: str, variant: str, seed: int, figures: dict[str, Any]) -> None:
        """Add or replace a row."""
        sizes = {name: getattr(self.options, name) for name in ("embed_dim", "context_dim", "epochs")}
        row = {
            "suite": "context-family", "experiment": experiment, "variant": variant, "seed": seed, **figures,
            **sizes, "data": self.name, **self.about, "run": self.run,
        }  # fmt: skip
        old = read_rows(self.options.results)
        kept = [one for one in old if any(one[key] != row[key] for key in _KEY)]
        text = "".join(f"{json.dumps(one)}\n" for one in (*kept, row))
        self.options.results.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.options.results, lambda place: place.write_text(text, encoding="utf-8"))
        shown = {k: v for k, v in figures.items() if isinstance(v, int | float | str)}
        self.log({"experiment": experiment, "variant": variant, "seed": seed, **shown})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, none where there is none."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def phases(bench: Bench, model: Any, tokens: int, *, control: bool = False, **phase1: Any) -> dict[str, Any]:
    """Both phases, and the control, as flat figures per variant."""
    options = bench.options
    train, held = (part.beside(model) for part in (bench.stream("train", tokens), bench.stream("validation")))
    synchronise(bench.device)
    began = time.perf_counter()
    found = run_phases(
        model, train, held, Phase1Config(**{"seed": options.seed, **phase1}),
        Phase2Config(epochs=options.epochs, batch_size=512, seed=options.seed), log=bench.log,
        inspect=stream_checks, control=control,
    )  # fmt: skip
    flat = {}
    for name, one in found.items():
        (rank,), (check,) = one["validation_rank"], one["validation_check"]
        (phase,) = one.get("phase_one") or [{"sweeps": 0, "stopped": "none", "seconds": 0.0}]
        rate = phase.get("convergence_rate")
        flat[name] = {
            "tokens": len(train.ids), "validation_tokens": len(held.ids),
            "perplexity": one["perplexity"], "accuracy": one["accuracy"],
            "train_perplexity": one["train"]["perplexity"], "best_epoch": one["best_epoch"],
            "stopped": one["stopped"], "validation_rank": rank["share"], "horizon": check["horizon"],
            "sweeps": phase["sweeps"], "phase1_stopped": phase["stopped"], "convergence_rate": rate,
            "phase1_seconds": phase["seconds"], "cache_seconds": one["cache_seconds"],
            "phase2_seconds": one["phase_two_seconds"],
            "seconds": phase["seconds"] + one["cache_seconds"] + one["phase_two_seconds"],
        }  # fmt: skip
    flat["whole"] = {"wall_seconds": time.perf_counter() - began}
    return flat


def synchronise(device: torch.device) -> None:
    """Wait for what is under way."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weights_hash(model: Any) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def documents(bench: Bench, seed: int) -> None:
    """The documents' run with its control; the first seed twice, and once on the reference path."""
    tokens = bench.options.tokens
    model = bench.lm(seed)
    flat = phases(bench, model, tokens, control=True)
    digest = weights_hash(model)
    extra: dict[str, Any] = {"sha256": digest, "backend": resolve("context_sweep", bench.device, None)}
    if seed == bench.options.seeds[0]:
        again = bench.lm(seed)
        phases(bench, again, tokens)
        extra["bit_equal"] = weights_hash(again) == digest
        if bench.options.reference:
            other = bench.lm(seed)
            with use_backend("reference"):
                slow = phases(bench, other, tokens)
            bench.write("documents", "trained, reference path", seed, slow["trained"])
        counted = NGram(bench.stream("train", tokens).ids, _NGRAM_ORDER, bench.vocabulary)
        figures = counted.evaluate(bench.stream("validation").ids)
        bench.write("documents", f"{_NGRAM_ORDER}-gram", seed, {"tokens": tokens, **figures})
    bench.write("documents", "trained", seed, {**flat["trained"], **extra})
    bench.write("documents", "untrained", seed, flat["untrained_contexts"])


def diversity(bench: Bench, seed: int) -> None:
    """Every loss at the same batch, weight and stopping rules."""
    for name in ("oacd", "mcdl", "odcm", "w_mse"):
        flat = phases(bench, bench.lm(seed), bench.options.small, diversity=name)
        bench.write("diversity", name, seed, flat["trained"])


def frozen(bench: Bench, seed: int) -> None:
    """Contexts as drawn, by phase 1, and trained with the TokenBlock by the next token."""
    flat = phases(bench, bench.lm(seed), bench.options.small, control=True)
    bench.write("frozen", "frozen after phase 1", seed, flat["trained"])
    bench.write("frozen", "frozen as drawn", seed, flat["untrained_contexts"])
    model = bench.lm(seed)
    train, held = (bench.stream("train", bench.options.small), bench.stream("validation"))
    began = time.perf_counter()
    found = train_end_to_end(
        model, train.beside(model), held.beside(model),
        Phase2Config(epochs=bench.options.epochs, seed=seed), log=bench.log,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    (check,) = stream_checks(model, held.beside(model).ids, [20])
    bench.write(
        "frozen", "end to end", seed,
        {
            "tokens": len(train.ids), "perplexity": found.perplexity, "accuracy": found.accuracy,
            "best_epoch": found.best_epoch, "stopped": found.stopped, "horizon": check["horizon"],
            "seconds": seconds,
        },
    )  # fmt: skip


def horizon(bench: Bench, seed: int) -> None:
    """Smaller steps by a token: the input half of W is scaled down, and contexts remember for longer."""
    for gain in (1.0, 0.5, 0.25):
        model = bench.lm(seed)
        block: Any = model.model.context_block
        with torch.no_grad():
            for layer in block.layers:
                layer.linear.weight[:, block.context_dim :] *= gain
        flat = phases(bench, model, bench.options.small, control=True)
        bench.write("horizon", f"input gain {gain:g}", seed, flat["trained"])
        bench.write("horizon", f"input gain {gain:g}, untrained", seed, flat["untrained_contexts"])


def chunks(bench: Bench, seed: int) -> None:
    """Context-KV by the size of its chunks; one block is trained, and every model has it."""
    first = bench.kv(seed, chunk_size=bench.options.chunks[0])
    flat = phases(bench, first, bench.options.small)
    blocks = copy.deepcopy(first.model.context_blocks.state_dict())
    bench.write("chunks", f"{bench.options.chunks[0]}", seed, flat["trained"])
    for size in bench.options.chunks[1:]:
        model = bench.kv(seed, chunk_size=size)
        model.model.context_blocks.load_state_dict(blocks)
        # One sweep draws contexts and one moves them: with a rate of 0 the block stays as it is.
        flat = phases(bench, model, bench.options.small, max_iterations=2, learning_rate=0.0)
        bench.write("chunks", f"{size}", seed, flat["trained"])


EXPERIMENTS = {
    "documents": documents, "diversity": diversity, "frozen": frozen, "horizon": horizon, "chunks": chunks,
}  # fmt: skip


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Experiments and seeds in order."""
    for name in options.only or EXPERIMENTS:
        for seed in options.seeds:
            yield name, seed


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare")
    one.add_argument("path", type=Path)
    one.add_argument("--data", default="chitchat")
    one.add_argument("--tokens", type=int, default=500_000)
    one.add_argument("--validation", type=int, default=23_000)
    two = commands.add_parser("run")
    two.add_argument("path", type=Path)
    two.add_argument("--only", nargs="*", choices=list(EXPERIMENTS))
    two.add_argument("--seeds", nargs="*", type=int, default=[42, 43, 44])
    two.add_argument("--tokens", type=int, default=500_000, help="of the documents' experiment")
    two.add_argument("--small", type=int, default=200_000, help="tokens of the other experiments")
    two.add_argument("--embed-dim", type=int, default=768)
    two.add_argument("--context-dim", type=int, default=256)
    two.add_argument("--epochs", type=int, default=40)
    two.add_argument("--chunks", nargs="*", type=int, default=[100, 16, 32, 64, 200])
    two.add_argument("--reference", action="store_true", help="run the first seed on the reference too")
    two.add_argument("--results", type=Path, default=RESULTS)
    two.add_argument("--commit", default=commit(), help="of a checkout without its history")
    three = commands.add_parser("report")
    three.add_argument("--results", type=Path, default=RESULTS)
    three.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.path, data=options.data, tokens=options.tokens, validation=options.validation)
    elif options.command == "report":
        write_report(read_rows(options.results), options.page, options.results)
    else:
        # TensorFloat-32 products: the tied head is most of the work.
        torch.set_float32_matmul_precision("high")
        bench = Bench(options.path, options)
        for name, seed in chosen(options):
            options.seed = seed
            EXPERIMENTS[name](bench, seed)


if __name__ == "__main__":
    main()
