"""Public operators: pure functions of tensors, state in and (output, state) out.

One layout everywhere: B batch, H query heads, Hkv key/value heads, T tokens, K key width, V value width,
F feature width, S segment, W window, R ring length (W, or S without a window), N segments.
"""

from newllm.ops.context_sweep import context_sweep
from newllm.ops.decode import infini_decode
from newllm.ops.gemv import gemv
from newllm.ops.infini import infini_attention
from newllm.ops.memory import memory_retrieve, memory_scan, memory_update
from newllm.ops.window import window_attention

__all__ = [
    "context_sweep",
    "gemv",
    "infini_attention",
    "infini_decode",
    "memory_retrieve",
    "memory_scan",
    "memory_update",
    "window_attention",
]
