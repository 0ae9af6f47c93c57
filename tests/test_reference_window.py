"""Sliding-window attention against a loop over tokens and heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from newllm.ops import window_attention
from newllm.testing import assert_rounding, largest
from tests import loops
from tests.infini_cases import table

F64 = torch.float64


def inputs(
    batch: int = 1, kv_heads: int = 1, group: int = 1, tokens: int = 12, key: int = 4, value: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, kv_heads * group, tokens, key, dtype=F64)
    k = torch.randn(batch, kv_heads, tokens, key, dtype=F64)
    return q, k, torch.randn(batch, kv_heads, tokens, value, dtype=F64)


@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 12))
@settings(max_examples=80)
def test_row_69_window_equals_the_loop(
    data: st.DataObject, batch: int, kv_heads: int, group: int, tokens: int
) -> None:
    """Any padding, window or segment, shared or own tables, grouped heads, widths."""
    q, k, v = inputs(
        batch, kv_heads, group, tokens, data.draw(st.sampled_from([2, 4])), data.draw(st.integers(1, 3))
    )
    window = data.draw(st.none() | st.integers(1, 6))
    segment = data.draw(st.integers(1, window or 6))
    row = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    real = torch.tensor([data.draw(row) for _ in range(batch)])
    mask = data.draw(st.sampled_from([None, real]))
    real = torch.ones_like(real) if mask is None else real
    rope = data.draw(st.sampled_from([None, "shared", "rows"]))
    tables = None
    if rope == "shared":
        tables = table(torch.arange(tokens, dtype=F64) + 7, q.shape[3])
    elif rope == "rows":
        positions = torch.where(real, real.cumsum(1), 55) + torch.arange(batch)[:, None]
        tables = table(positions.to(F64), q.shape[3])
    out = window_attention(
        q, k, v, window=window, segment=segment, rope=tables, padding_mask=mask, backend="reference"
    )
    wanted = np.zeros(out.shape)
    for b in range(batch):
        kept = real[b].nonzero().flatten().tolist()
        for n, t in enumerate(kept):
            first = n // segment * segment if window is None else max(0, n - window + 1)
            for h in range(kv_heads * group):
                seen = [
                    (n - m, k[b, h // group, kept[m]].numpy(), v[b, h // group, kept[m]].numpy())
                    for m in range(first, n + 1)
                ]
                wanted[b, h, t] = loops.attend(q[b, h, t].numpy(), seen, rope is not None)
    size = (1 + largest(q.norm(dim=-1)) * largest(k.norm(dim=-1))) * largest(v)
    # Positions up to 67 turn the rounding of an angle into that many eps.
    assert_rounding(out, torch.from_numpy(wanted), additions=67 + tokens * q.shape[3], magnitude=size)


@pytest.mark.parametrize("window", [1, 4, 11, 12, 20])
def test_row_69_a_token_beyond_the_window_has_zero_effect(window: int) -> None:
    q, k, v = inputs(tokens=12)
    out = window_attention(q, k, v, window=window)
    for t in range(12):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, :, t], other_v[:, :, t] = 7, -7
        changed = window_attention(q, other_k, other_v, window=window)
        reached = (changed != out).any(-1)[0, 0].nonzero().flatten().tolist()
        assert reached == list(range(t, min(t + window, 12)))


def test_row_69_gradients_end_at_the_window_too() -> None:
    q, k, v = inputs(tokens=12)
    k.requires_grad_()
    v.requires_grad_()
    out = window_attention(q, k, v, window=3)
    for gradient in torch.autograd.grad(out[:, :, 8].sum(), (k, v)):
        reached = gradient.any(-1)[0, 0].nonzero().flatten().tolist()
        assert reached == [6, 7, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"window": 12}, {"window": 40}, {"window": None, "segment": 12}])
def test_a_text_within_the_window_gives_the_bits_of_full_attention(
    dtype: torch.dtype, options: dict[str, int | None]
) -> None:
    q, k, v = (x.to(dtype) for x in inputs(2, 2, 2))
    out = window_attention(q, k, v, **options)  # type: ignore[arg-type]
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_only_relative_positions_matter() -> None:
    q, k, v = inputs()
    near, far = (
        window_attention(q, k, v, window=5, rope=table(torch.arange(12, dtype=F64) + start, 4))
        for start in (0, 1000)
    )
    size = (1 + largest(q.norm(dim=-1)) * largest(k.norm(dim=-1))) * largest(v)
    assert_rounding(near, far, additions=1012, magnitude=size)


def test_padding_gives_zeros_and_wholly_padded_rows_are_finite() -> None:
    q, k, v = inputs(2)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3:9:2] = True
    out = window_attention(q, k, v, window=4, padding_mask=mask)
    assert not out.masked_select(~mask[:, None, :, None]).any()
    garbage = (x.masked_fill(~mask[:, None, :, None], 1e30) for x in (q, k, v))
    assert torch.equal(window_attention(*garbage, window=4, padding_mask=mask), out)
