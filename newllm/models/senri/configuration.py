"""Configuration of Senri models."""

# Types are not postponed here: transformers checks fields against them.
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from newllm.modules.infini_attention import FAMILIES
from newllm.types import Detach, GateKind, Rule

FeatureKind = Literal["elu1", "dpfp"]
_CHOICES = {"gate": GateKind, "rule": Rule, "feature": FeatureKind, "detach": Detach}
# Fields of other families that Senri decides for itself.
_REPLACED = (
    "model_type",
    "architectures",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "transformers_version",
    "_name_or_path",
    "quantization_config",
)


@strict
class SenriConfig(LlamaConfig):
    """A Llama-type decoder with a sliding window in every layer and a memory in some.

    Args:
        sliding_window: keys a query sees, its own included; None attends within segments.
        segment: tokens folded into the memory at once, at most ``sliding_window`` (None: that).
        memory_layers: indices of the layers that own a memory (None: ``default_memory_layers``).
        gate: ``sigmoid`` (the paper) or ``tanh`` (starts exactly shut; what ``convert`` uses).
        rule: ``linear``, ``delta`` or ``gamma``.
        feature: ``elu1`` with initial ``feature_scale`` and ``feature_bias`` (1 and 0 are the paper's), or
            ``dpfp`` with ``feature_order``.
        write_gate, memory_decay, short_conv: the write gate, decay and short convolution of
            ``InfiniAttention``.
        share_memory: one memory for all ``memory_layers``: each reads, as it was before a segment, what all
            of them wrote (linear rule, no decay).
        memory_eps: least denominator of a memory's readout.
        detach, bptt_segments: how far gradients flow back through the memory.
        prefill_chunk: most tokens of one pass; longer inputs are read chunk by chunk.
        attention_out_bias: bias of the output projection. qk_norm: RMSNorms of q and k heads (Qwen3).

    Raises:
        ValueError: for a segment above the window, layers that do not exist, heads that do not divide, or
            an unknown choice.
    """

    model_type = "senri"

    sliding_window: int | None = 1024
    segment: int | None = None
    memory_layers: list[int] | None = None
    layer_types: list[str] | None = None
    gate: str = "sigmoid"
    rule: str = "linear"
    feature: str = "elu1"
    feature_scale: float | int = 4.0
    feature_bias: float | int = -4.0
    feature_order: int = 1
    write_gate: bool = False
    memory_decay: float | int | None = None
    short_conv: int | None = None
    share_memory: bool = False
    memory_eps: float | int = 1e-6
    detach: str = "none"
    bptt_segments: int | None = None
    prefill_chunk: int = 32768
    attention_out_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.segment is None:
            self.segment = self.sliding_window
        if self.memory_layers is None:
            self.memory_layers = default_memory_layers(self.num_hidden_layers)
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        self.layer_types = [kind] * self.num_hidden_layers
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        if self.segment is None:
            raise ValueError("segment must be given when sliding_window is None, got None")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1 or None, got {self.sliding_window}")
        if self.sliding_window is not None and not 1 <= self.segment <= self.sliding_window:
            raise ValueError(
                f"segment must be between 1 and sliding_window ({self.sliding_window}), got {self.segment}"
            )
        last = self.num_hidden_layers - 1
        if any(not 0 <= layer <= last for layer in self.memory_layers or ()):
            raise ValueError(f"memory_layers must lie between 0 and {last}, got {self.memory_layers}")
        if len(set(self.memory_layers or ())) < len(self.memory_layers or ()):
            raise ValueError(f"memory_layers must name each layer once, got {self.memory_layers}")
        if self.share_memory and (self.rule != "linear" or self.memory_decay is not None):
            raise ValueError(
                f"share_memory needs rule 'linear' and memory_decay None, got {self.rule!r} and "
                f"{self.memory_decay}"
            )
        self._check_numbers()
        if self.attention_dropout:
            raise ValueError(f"attention_dropout must be 0, got {self.attention_dropout}")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), got {self.num_attention_heads}"
            )
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}"
                )

    def _check_numbers(self) -> None:
        for name in ("prefill_chunk", "feature_order"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.memory_eps > 0:
            raise ValueError(f"memory_eps must be above 0, got {self.memory_eps}")
        if self.bptt_segments is not None and self.bptt_segments < 0:
            raise ValueError(f"bptt_segments must be 0 or more, or None, got {self.bptt_segments}")
        if self.bptt_segments is not None and self.detach != "none":
            raise ValueError(f"detach must be 'none' when bptt_segments is given, got {self.detach!r}")

    def validate_architecture(self) -> None:
        """Nothing to add: heads need not fill the hidden size, as they must in Llama."""

    @classmethod
    def from_base(cls, base: Any, **overrides: Any) -> "SenriConfig":
        """The configuration of a Llama, SmolLM, Mistral, Qwen2 or Qwen3 model with a window and memory.

        Raises ``ValueError`` for another family.
        """
        if base.model_type not in FAMILIES:
            raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {base.model_type!r}")
        fields = {name: value for name, value in base.to_dict().items() if name not in _REPLACED}
        qwen2 = base.model_type == "qwen2"
        bias = qwen2 or bool(fields.get("attention_bias", False))
        fields |= {
            "attention_bias": bias,
            "attention_out_bias": bias and not qwen2,
            "qk_norm": base.model_type == "qwen3",
        }
        return cls(**{**fields, **overrides})


def default_memory_layers(layers: int) -> list[int]:
    """The documents' layout, 10 and 20 of 30 layers; shallower models at thirds of their depth."""
    step = 10 if layers > 20 else max(1, layers // 3)
    return [layer for layer in (step, 2 * step) if layer < layers] or [0]
