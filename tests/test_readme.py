"""What README.md says is so: its figures come from files, its examples run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from source_tree import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import newllm
from newllm.data.tokenizer import byte_tokenizer
from newllm.modules import InfiniAttention
from newllm.modules.rotary import Rotary

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# The words of an example -> the names that the text before it has introduced.
MODEL = "path/to/llama"


def example(marker: str) -> str:
    found = [text for text in EXAMPLES if marker in text]
    assert len(found) == 1, f"README.md must have one example with {marker!r}"
    return found[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a Llama of 21 shallow layers and a novel."""
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=21,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=256,
        eos_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / MODEL)
    byte_tokenizer().save_pretrained(tmp_path / MODEL)
    (tmp_path / "novel.txt").write_text("It is a truth universally acknowledged. " * 8, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(code: str, **names: Any) -> dict[str, Any]:
    names["newllm"] = newllm
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_convert_example(folder: Path) -> None:
    model = run(example("newllm.convert("))["model"]
    assert model.config.memory_layers == [10, 20]
    assert newllm.SenriForCausalLM.from_pretrained(folder / "senri").config.segment == 256


def test_drop_in_example(folder: Path) -> None:
    code = example("InfiniAttention.from_attention")
    assert len(code.split("\n\n")[1].strip().splitlines()) + 2 == 5
    model = run(code)["model"]
    assert all(isinstance(layer.self_attn, InfiniAttention) for layer in model.model.layers)
    ids = torch.arange(20)[None]
    base = LlamaForCausalLM.from_pretrained(folder / MODEL)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)


def test_session_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = newllm.convert(folder / MODEL, window=32)
    run(example("newllm.Session("), model=model, tokenizer=byte_tokenizer())
    assert (folder / "after-the-novel.safetensors").is_file()
    assert capsys.readouterr().out


def test_operator_example() -> None:
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    cos, sin = Rotary.from_theta(8)(20, q)
    names = run(
        example("ops.infini_attention"), q=q, k=k, v=v, beta=torch.zeros(4), cos=cos, sin=sin, state=None
    )
    assert names["out"].shape == q.shape
    assert isinstance(names["state"], newllm.InfiniState)


def test_recall_table_is_the_demo_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| (memory|window only) \| (\d+) windows \| (.*) \|$", README, re.MULTILINE)
    told = {(name.replace(" ", "_"), multiple): cells.split(" | ") for name, multiple, cells in rows}
    measured = {
        (name, multiple): [f"{score:.2f}" for score in depths.values()]
        for name, lengths in results["recall"].items()
        for multiple, depths in lengths.items()
    }
    assert told == measured
    (size,) = set(results["state_bytes"].values())
    assert f"{size:,} bytes at every length" in " ".join(README.split())
