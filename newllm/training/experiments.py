"""Experiments on both phases: one architecture on so many documents, to one row of figures."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import torch

from newllm.backend import training_device
from newllm.data.token_cache import Tokens, cached_tokens
from newllm.models import ContextLMConfig, ContextLMForCausalLM
from newllm.training.assemble import chosen_tokenizer, read_corpus
from newllm.training.config import SourceConfig
from newllm.training.phase_config import FromBase, Phase1Config, Phase2Config
from newllm.training.two_phase import Stream, run_phases


class Architecture(NamedTuple):
    """Layers L, context width C and input tokens k of a model, and its embedding width."""

    num_layers: int = 1
    context_dim: int = 768
    num_input_tokens: int = 1
    embed_dim: int = 768

    @property
    def name(self) -> str:
        """``{L}L_{C}d_{k}tok``."""
        return f"{self.num_layers}L_{self.context_dim}d_{self.num_input_tokens}tok"

    def config(self, vocabulary: int) -> ContextLMConfig:
        """The model's configuration."""
        return ContextLMConfig(
            vocab_size=vocabulary,
            embed_dim=self.embed_dim,
            cell="context",
            context_dim=self.context_dim,
            num_hidden_layers=self.num_layers,
            input_tokens=self.num_input_tokens,
        )


ARCHITECTURES: dict[str, Architecture] = {
    "baseline": Architecture(6),
    "two_tokens": Architecture(6, num_input_tokens=2),
    "wide": Architecture(6, 1152),
    "deep": Architecture(9),
    "shallow_wide": Architecture(3, 1536, 2),
}
"""The documents' architectures by name."""


def scaled(architecture: Architecture, embed_dim: int) -> Architecture:
    """The same shape around embeddings of another width: contexts grow or shrink with it."""
    width = max(1, architecture.context_dim * embed_dim // architecture.embed_dim)
    return architecture._replace(context_dim=width, embed_dim=embed_dim)


def matrix(
    layers: Sequence[int], widths: Sequence[int], tokens: Sequence[int], embed_dim: int
) -> list[Architecture]:
    """Every combination."""
    return [Architecture(*choice, embed_dim) for choice in product(layers, widths, tokens)]


def calculate_params(architecture: Architecture, vocabulary: int) -> dict[str, int]:
    """Parameters of the whole model, its ContextBlock and its TokenBlock."""
    with torch.device("meta"):
        model = ContextLMForCausalLM(architecture.config(vocabulary))
    body = model.model
    parts: dict[str, Any] = {"total": model}
    parts |= {name: getattr(body, name) for name in ("context_block", "token_block")}
    return {name: sum(one.numel() for one in part.parameters()) for name, part in parts.items()}


@dataclass
class DataConfig(FromBase):
    """What experiments read: the first documents of a corpus.

    Args:
        data: a name (see newllm data sources), a file or a folder.
        offline: auto lets a stand-in take the place of a dataset out of reach, and says so; error does not.
        tokenizer: bytes, bpe:SIZE, words:SIZE, a folder or a hub id.
        validation_tokens: most validation tokens.
        source: which documents are read, and which of them judge.
    """

    data: str = "embedded"
    offline: str = "auto"
    tokenizer: str = "bpe:1024"
    validation_tokens: int = 10000
    source: SourceConfig = field(default_factory=SourceConfig)


class ExperimentRunner:
    """Runs both phases again and again on parts of one corpus.

    Every run begins from the same seeds, so that its figures depend on nothing that ran before.

    Args:
        data: the corpus and its tokenizer.
        phase1: how contexts are trained.
        phase2: how tokens are predicted.
        seed: of the weights.
        control: measure the untrained control too.
        log: called with rows of metrics.
    """

    def __init__(
        self,
        data: DataConfig,
        phase1: Phase1Config,
        phase2: Phase2Config,
        *,
        seed: int = 42,
        control: bool = False,
        log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.phase1, self.phase2, self.seed, self.control = phase1, phase2, seed, control
        self.corpus = read_corpus(data.data, data.source, offline=data.offline)
        self.tokenizer = chosen_tokenizer(data.tokenizer, self.corpus)
        self.tokens = cached_tokens(self.corpus.train, self.tokenizer)
        self.validation = Stream.of(
            cached_tokens(self.corpus.validation, self.tokenizer), data.validation_tokens
        )
        self.log = log or (lambda row: None)

    def run(
        self,
        architecture: Architecture,
        samples: int,
        *,
        phase1: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Both phases on the first ``samples`` documents; ``phase1`` overrides options, ``seed`` all seeds.

        Raises ``ValueError`` for more documents than there are.
        """
        if not 1 <= samples <= self.tokens.documents:
            raise ValueError(
                f"samples must be between 1 and the {self.tokens.documents} documents of the training text, "
                f"got {samples}"
            )
        seed = self.seed if seed is None else seed
        train = Stream.of(first_documents(self.tokens, samples))
        torch.manual_seed(seed)
        model = ContextLMForCausalLM(architecture.config(len(self.tokenizer))).to(training_device())
        first = Phase1Config.from_base(self.phase1, {"seed": seed, **(phase1 or {})})
        second = replace(self.phase2, seed=seed)
        rows: list[dict[str, Any]] = []

        def log(row: dict[str, Any]) -> None:
            rows.append(row)
            self.log({"config_name": architecture.name, "num_samples": samples, **row})

        found = run_phases(
            model, train.beside(model), self.validation.beside(model), first, second, log=log,
            control=self.control,
        )  # fmt: skip
        del model
        gc.collect()
        return _row(architecture, samples, seed, train, self.validation, found, rows)


def first_documents(tokens: Tokens, count: int) -> Tokens:
    """The first ``count`` documents of ``tokens``."""
    borders = tokens.borders[: count + 1]
    return Tokens(tokens.ids[: borders[-1]], borders)


def _row(
    architecture: Architecture,
    samples: int,
    seed: int,
    train: Stream,
    validation: Stream,
    found: dict[str, Any],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    trained, (phase,) = found["trained"], found["trained"]["phase_one"]
    shape = architecture._asdict()
    row = {
        "config_name": architecture.name,
        "num_samples": samples,
        "seed": seed,
        **{name: shape[name] for name in ("num_layers", "context_dim", "num_input_tokens", "embed_dim")},
        "train_tokens": len(train.ids),
        "val_tokens": len(validation.ids),
        "phase1_iterations": phase["sweeps"],
        "phase1_stopped": phase["stopped"],
        "phase1_seconds": phase["seconds"],
        "phase2_seconds": trained["phase_two_seconds"],
        "train_effective_rank": trained["train_rank"][0]["share"],
        "val_effective_rank": trained["validation_rank"][0]["share"],
        "best_epoch": trained["best_epoch"],
        "train_ppl": trained["train"]["perplexity"],
        "val_ppl": trained["perplexity"],
        "val_acc": trained["accuracy"],
        "history": [one for one in rows if one.get("model") == "trained"],
    }
    if "untrained_contexts" in found:
        other = found["untrained_contexts"]
        row |= {
            "untrained_val_ppl": other["perplexity"],
            "untrained_val_acc": other["accuracy"],
            "untrained_val_effective_rank": other["validation_rank"][0]["share"],
        }
    return row
