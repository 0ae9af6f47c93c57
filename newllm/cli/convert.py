"""``newllm convert``: a Llama-family checkpoint as Senri, and the proof that nothing was lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm.cli.loading import Dtype
from newllm.training.config import ConvertConfig

if TYPE_CHECKING:
    from newllm.models.senri import SenriForCausalLM

_COMPARED = 64


@dataclass
class Options(ConvertConfig):
    """Give a Llama, SmolLM, Mistral, Qwen2 or Qwen3 checkpoint a sliding window and a memory.

    Within the window the result equals the base model exactly, which is checked; the memory's gates start
    shut and open in training.

    Args:
        source: folder, hub id, GGUF file, or ``smollm2`` (see ``newllm data get``).
        out: folder to write.
        dtype: of the weights (auto: the checkpoint's; float32 for GGUF).
        overwrite: replace a folder that exists.
    """

    source: str
    out: str = field(kw_only=True)
    dtype: Dtype = "auto"
    overwrite: bool = False


def run(options: Options) -> None:
    """Convert, save, and print what was made."""
    from newllm.cli.loading import quiet, source_path
    from newllm.models.convert import convert, load_base, load_base_tokenizer
    from newllm.models.files import check_free, save_model

    quiet()
    out = Path(options.out)
    check_free(out, options.overwrite)
    source = source_path(options.source)
    tokenizer = load_base_tokenizer(source)
    base = load_base(source, dtype=options.dtype)
    model = convert(
        base,
        window=options.window,
        segment=options.segment,
        memory_layers=options.memory_layers,
        gate=options.gate,
        write_gate=options.write_gate,
        memory_decay=options.memory_decay,
        short_conv=options.short_conv,
        share_memory=options.share_memory,
        rule=options.rule,
    )
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    save_model(model, tokenizer, out, overwrite=options.overwrite)
    for name, value in _report(base, model).items():
        print(f"{name:14}{value}")
    print(f"{'saved in':14}{out}")


def _report(base: Any, model: SenriForCausalLM) -> dict[str, str]:
    from newllm.models.session import Session

    config = model.config
    session = Session(model)
    session.feed([0])
    added = model.state_dict().keys() - base.state_dict().keys()
    kinds = sorted({name.split("self_attn.")[-1] for name in added})
    tokens, difference = _compared(base, model)
    return {
        "base": str(getattr(config, "base_model", None) or base.config.name_or_path),
        "family": f"{base.config.model_type}, {config.num_hidden_layers} layers",
        "parameters": f"{model.num_parameters():,}",
        "window": f"{config.sliding_window} keys, segments of {config.segment}",
        "memory layers": ", ".join(map(str, config.memory_layers or [])) or "none",
        "state": f"{session.state_bytes:,} bytes a sequence, at every length",
        "new": f"{', '.join(kinds)} of each memory layer" if kinds else "nothing",
        "check": f"on {tokens} tokens the logits differ from the base model's by at most {difference}",
    }


def _compared(base: Any, model: SenriForCausalLM) -> tuple[int, float]:
    """The number of tokens compared, within the window, and the largest difference of a logit."""
    import torch

    tokens = min(_COMPARED, model.config.sliding_window)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    with torch.no_grad():
        difference = model(ids, use_cache=False).logits - base.eval()(ids, use_cache=False).logits
    return tokens, float(difference.abs().max())
