"""From options to the parts of a training run: documents, tokenizer, model, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from newllm.data.documents import documents
from newllm.data.passkey import PasskeyTask, byte_passkey, text_passkey
from newllm.data.recall.drafts import language
from newllm.data.recall.suites import examples
from newllm.data.sources import Corpus, coverage, open_source
from newllm.data.streams import Needles, OrderedStreams, PackedBlocks
from newllm.data.token_cache import Tokens, cached_tokens
from newllm.data.tokenizer import is_byte_tokenizer
from newllm.data.vocabularies import open_tokenizer
from newllm.models.convert import convert, load_base, load_base_tokenizer
from newllm.models.files import load_model
from newllm.training.batches import NeedleBatches
from newllm.training.config import ConvertConfig, SourceConfig, StreamConfig, TaskConfig, TrainConfig
from newllm.training.feed import Batches
from newllm.training.suite_batches import SuiteBatches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A needle's filler need not be all of a large text.
_FILLER_CHARACTERS = 1_000_000


class Streams(NamedTuple):
    """Batches to learn from and to judge by (with their number), and what is worth recording about them."""

    train: Batches
    validation: tuple[Batches, int] | None
    carry: bool
    facts: dict[str, Any]


def read_corpus(name: str, source: SourceConfig, *, offline: Any = "auto") -> Corpus:
    """The documents that ``source`` asks for, in the order it asks for."""
    fields = asdict(source)
    seed = fields.pop("shuffle")
    corpus = open_source(name, offline=offline, **fields)
    return corpus if seed is None else corpus._replace(train=corpus.train.shuffled(seed))


def senri_base(
    path: str | Path, conversion: ConvertConfig, *, seed: int
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A Senri model and its tokenizer from a checkpoint: as it is, or converted by ``conversion``."""
    import torch

    torch.manual_seed(seed)
    tokenizer = load_base_tokenizer(path)
    base = load_base(path, dtype="float32")
    if base.config.model_type == "senri":
        return base, tokenizer
    return convert(base, **asdict(conversion)), tokenizer


def plain_base(path: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Any causal model of transformers and its tokenizer."""
    return load_model(path, dtype="float32"), load_base_tokenizer(path)


def chosen_tokenizer(name: str | None, corpus: Corpus, suites: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model; bytes where none is named.

    One that is trained learns from the corpus and from what ``suites`` hide in it, but for passkeys: digits.
    """
    text = corpus.train
    if hidden := examples([suite for suite in suites if suite != "passkey"]):
        names = [f"example {number}" for number in range(len(hidden))]
        text = documents(text.name, [*text.titles, *names], [*text.texts, *hidden])
    return open_tokenizer(name or "bytes", text)


def passkey_task(tokenizer: PreTrainedTokenizerBase, text: str, key_length: int) -> PasskeyTask:
    """The passkey task in ``text``.

    Raises ``ValueError`` for a tokenizer that joins digits.
    """
    if is_byte_tokenizer(tokenizer):
        return byte_passkey(text, key_length)
    return text_passkey(tokenizer, text, key_length)


def make_streams(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    stream: StreamConfig,
    task: TaskConfig,
    train: TrainConfig,
    *,
    rows: int,
    segment: int | None,
    processes: int = 1,
    progress: bool = True,
) -> Streams:
    """The batches that ``stream`` asks for, of ``rows`` rows, and those of the validation documents.

    ``segment`` is the model's, None where it has none. Raises ``ValueError`` for other streams than packed
    ones without it, and as the streams do.
    """
    sets = train.accumulation * processes
    if stream.kind != "packed" and segment is None:
        raise ValueError(f"stream.kind {stream.kind!r} needs a model with a state of its own, such as Senri")
    tokens, held = (
        cached_tokens(part, tokenizer, progress=progress) for part in (corpus.train, corpus.validation)
    )
    facts: dict[str, Any] = {"tokens": len(tokens.ids), "validation_tokens": len(held.ids)}
    facts |= {f"coverage_{name}": round(share, 6) for name, share in coverage(tokens.ids, held.ids).items()}
    if stream.kind == "needles":
        options: Any = {"segment": segment or 1, "steps": train.steps * sets, "seed": train.seed}
        batches: Batches
        if task.suites == ["passkey"]:
            filler = passkey_task(tokenizer, corpus.train.joined(), task.key_length)
            batches = NeedleBatches(filler, task, **options)
        else:
            batches = SuiteBatches(language(tokenizer, corpus.train.joined()), task, **options)
    else:
        batches = _stream(
            tokens, stream, rows, sets, train.seed, _needles(corpus, tokenizer, stream, segment)
        )
    validation = None
    if train.eval_steps:
        try:
            judged = _stream(held, stream, rows, sets, 0, None, shuffle=False)
        except ValueError as error:
            raise ValueError(f"the validation text is too short: {error}") from error
        validation = judged, min(train.eval_batches, len(judged))
    return Streams(batches, validation, stream.kind == "ordered", facts)


def _stream(
    tokens: Tokens,
    stream: StreamConfig,
    rows: int,
    sets: int,
    seed: int,
    needles: Needles | None,
    shuffle: bool = True,
) -> PackedBlocks | OrderedStreams:
    options: dict[str, Any] = {"length": stream.length, "seed": seed, "needles": needles, "shuffle": shuffle}
    if stream.kind == "ordered":
        return OrderedStreams(tokens, rows=rows, sets=sets, **options)
    return PackedBlocks(tokens, rows=rows, **options)


def _needles(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, stream: StreamConfig, segment: int | None
) -> Needles | None:
    if stream.needles == 0:
        return None
    text = corpus.train.joined()[:_FILLER_CHARACTERS]
    try:
        task = passkey_task(tokenizer, text, stream.key_length)
    except ValueError as error:
        raise ValueError(f"{error}; --stream.needles 0 trains without needles") from error
    return Needles(task, stream.needles, stream.answer_only, segment or stream.length // 4 or 1)
