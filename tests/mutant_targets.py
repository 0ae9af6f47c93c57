"""All that newllm reads from disk: how a whole one is written, and what makes one that was read valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from newllm.cli.options import parse
from newllm.cli.train import SenriOptions
from newllm.data.documents import numbered
from newllm.data.hub import HUB, hub_texts
from newllm.data.readers import read_corpus
from newllm.data.text import load_documents
from newllm.data.token_cache import cached_tokens
from newllm.data.tokenizer import byte_tokenizer
from newllm.data.vocabularies import open_tokenizer
from newllm.evaluation.rows import RowFile
from newllm.models import ContextLMConfig, ContextLMForCausalLM
from newllm.models.convert import load_base, load_base_tokenizer
from newllm.models.files import load_senri, load_tokenizer, save_model
from newllm.models.history import HistorySession
from newllm.models.session import Session
from newllm.runs import Run
from newllm.training.phase_checkpoints import PhaseCheckpoints
from tests.mutants import Target
from tests.package_files import PACKAGES
from tests.tiny_models import VOCABULARY, tiny_base, tiny_senri

TEXT = numbered("x", ["The cat sat.\n", "the dog, the cat & the Katze: Grüße!", "the end"])
ROWS = [{"step": step, "loss": 1 / step, "suite": "passkey", "notes": [{"b": None}]} for step in (1, 2, 3)]


def says(session: Session | HistorySession) -> None:
    """A session that goes on: three tokens of the vocabulary."""
    said = [int(token) for token in session.stream(max_new_tokens=3)]
    assert all(-1 <= token < VOCABULARY for token in said), said


# Models


def write_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    save_model(tiny_senri(vocab_size=264), byte_tokenizer(), folder / "model")


def read_checkpoint(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    model = load_senri(folder / "model")
    ids = tokenizer("a bc")["input_ids"]
    session = Session(model, tokenizer)
    session.feed(torch.tensor(ids))
    assert session.tokens == [len(ids)]
    assert {tensor.dtype.is_floating_point for tensor in model.parameters()} == {True}


def write_gguf(folder: Path) -> None:
    from gguf import GGUFWriter

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(range(263))
    base = tiny_base("llama", vocab_size=264, attention_bias=False)
    writer = GGUFWriter(folder / "model.gguf", "llama")
    for name, value in (("block_count", 3), ("context_length", 256), ("embedding_length", 32)):
        getattr(writer, f"add_{name}")(value)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(264)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, "ab"])
    writer.add_token_merges(["a b"])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    for name, tensor in gguf_tensors(base.state_dict()).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The weights of a Llama by the names and in the order of heads that GGUF has."""
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers": "blk",
    }  # fmt: skip
    found = {}
    for name, tensor in weights.items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        found[name] = tensor.float().numpy()
    return found


def read_gguf(folder: Path) -> None:
    tokenizer = load_base_tokenizer(folder / "model.gguf")
    assert isinstance(tokenizer("a the")["input_ids"], list)
    model = load_base(folder / "model.gguf")
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, model.config.vocab_size)


# Sessions

_MODELS: dict[str, Any] = {}


def model(kind: str) -> Any:
    """A small model of ``kind``, always the same one."""
    if kind not in _MODELS:
        torch.manual_seed(0)
        makers: dict[str, Any] = {
            "senri": tiny_senri,
            "context_lm": lambda: ContextLMForCausalLM(
                ContextLMConfig(
                    vocab_size=VOCABULARY, embed_dim=16, context_dim=24, hidden_dim=32, eos_token_id=None
                )
            ).eval(),
            "llama": lambda: tiny_base("llama"),
        }
        _MODELS[kind] = makers[kind]()
    return _MODELS[kind]


def session_target(kind: str) -> Target:
    def write(folder: Path) -> None:
        session = Session(model(kind))
        session.generate(torch.arange(1, 30), max_new_tokens=4)
        session.save(folder / "session.safetensors")

    def read(folder: Path) -> None:
        session = Session(model(kind))
        session.load(folder / "session.safetensors")
        says(session)

    return Target(write, read)


def conversation() -> HistorySession:
    return HistorySession(model("llama"), byte_tokenizer())


def write_conversation(folder: Path) -> None:
    session = conversation()
    session.feed(torch.arange(1, 20))
    list(session.stream(max_new_tokens=3))
    session.save(folder / "talk.json")


def read_conversation(folder: Path) -> None:
    session = conversation()
    session.load(folder / "talk.json")
    if session.tokens != [0]:
        says(session)


# Texts, caches and options


def write_options(folder: Path) -> None:
    (folder / "options.yaml").write_text(
        "data: embedded  # a comment\nprofile: auto\nlaunch: 1\nresume: false\n"
        "source: {limit: 10, subset: null, validation: 'fixed'}\n"
        "stream:\n  kind: needles\n  length: 64\n  needles: 0.25\n"
        "model:\n  hidden_size: 32\n  memory_layers: [1, 2]\n"
        "train: &shared\n  lr: 1.0e-3\n  steps: 20\n  schedule: cosine\n"
    )


def read_options(folder: Path) -> None:
    options = parse(SenriOptions, ["--config", str(folder / "options.yaml")], name="newllm train senri")
    assert options is not None
    assert isinstance(options.launch, int) and isinstance(options.stream.needles, float | int)
    assert options.stream.kind in ("packed", "ordered", "needles")


def write_texts(folder: Path) -> None:
    rows = [{"text": text, "title": "ß", "n": [1, {"a": None}]} for text in TEXT.texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plain.txt").write_text(TEXT.texts[1])


def read_texts(folder: Path) -> None:
    found = load_documents(str(folder))
    assert all(isinstance(text, str) for text in found.texts)
    byte_tokenizer()(list(found.texts))


def read_tokens(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokens = cached_tokens(TEXT, tokenizer, cache_dir=folder, progress=False)
    assert tokens.documents == len(TEXT.texts)
    for place, text in enumerate(TEXT.texts):
        assert tokens.document(place).tolist() == [*text.encode(), tokenizer.eos_token_id]


def read_vocabulary(folder: Path) -> None:
    made = open_tokenizer("bpe:300", TEXT, cache_dir=folder)
    ids = made(TEXT.texts[1])["input_ids"]
    assert all(0 <= token < len(made) for token in ids)


def write_hub_copy(folder: Path) -> None:
    place = folder / "hub" / "databricks--databricks-dolly-15k" / "train.jsonl"
    place.parent.mkdir(parents=True)
    place.write_text("".join(json.dumps(text) + "\n" for text in ("0123abc", *TEXT.texts)))


def read_hub_copy(folder: Path) -> None:
    source = HUB["dolly"]
    if not any(path.is_file() for path in folder.rglob("*")):
        return
    found = hub_texts(source, source.sets[0], "train", cache_dir=folder)
    numbered("dolly", found.texts)


def package_target(name: str) -> Target:
    def read(folder: Path) -> None:
        texts = read_corpus(name, folder / "package")
        numbered(name, texts.values())

    return Target(lambda folder: (folder / "package").write_bytes(PACKAGES[name]()), read)


# Runs


def write_phases(folder: Path) -> None:
    phases = PhaseCheckpoints(folder, seconds=0)
    phases.finish("one", {"loss": 1.5, "weights": torch.arange(5.0), "steps": [1, 2], "none": None})
    phases.begin("two")
    for step in (1, 2):
        phases.reached(lambda step=step: {"step": step, "deep": {"x": torch.ones(2, 3), 7: (1, "a")}})


def read_phases(folder: Path) -> None:
    phases = PhaseCheckpoints(folder, resume=True)
    assert phases.rounds in (0, 1, 2)
    assert len(phases.complaints) == 2 - phases.rounds
    assert all(str(folder) in complaint and len(complaint) < 1000 for complaint in phases.complaints)
    if phases.rounds:
        assert phases.result("one")["weights"].tolist() == [0, 1, 2, 3, 4]
        assert phases.begin("two")["step"] == phases.rounds


def write_rows(folder: Path) -> None:
    for name in ("results", "metrics"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Run(folder, {"data_read": {"train": {"sha256": "0"}}}, seed=0, resume=True)


def read_rows(folder: Path) -> None:
    found = [*RowFile(folder / "results.jsonl").rows, *Run(folder, {}, seed=0, writes=False).rows()]
    assert all(isinstance(row, dict) for row in found)


TARGETS: dict[str, Target] = {
    "checkpoint": Target(write_checkpoint, read_checkpoint),
    "gguf": Target(write_gguf, read_gguf),
    "session": session_target("senri"),
    "context session": session_target("context_lm"),
    "conversation": Target(write_conversation, read_conversation),
    "options": Target(write_options, read_options),
    "texts": Target(write_texts, read_texts),
    "token cache": Target(read_tokens, read_tokens),
    "vocabulary": Target(read_vocabulary, read_vocabulary),
    "hub copy": Target(write_hub_copy, read_hub_copy),
    **{f"package {name}": package_target(name) for name in PACKAGES},
    "phase checkpoint": Target(write_phases, read_phases),
    "rows": Target(write_rows, read_rows),
}
"""All that is attacked, by name."""
