"""Feature maps of the associative memory."""

from __future__ import annotations

import torch
from torch import Tensor

from newllm.types import FeatureMap

PAPER = FeatureMap()


def feature_width(feature: FeatureMap | None, key_width: int) -> int:
    """Width F of the features of keys that are ``key_width`` wide."""
    if feature is None or feature.kind == "elu1":
        return key_width
    return 2 * key_width * int(feature.order or 1)


def feature_map(x: Tensor, feature: FeatureMap | None) -> Tensor:
    """Non-negative features ``[B, H, ..., F]`` of projections ``x [B, H, ..., K]``, in x's dtype.

    A query head takes the scale and bias of the key/value head that it shares.
    """
    feature = feature or PAPER
    if feature.kind == "dpfp":
        return _dpfp(x, int(feature.order or 1))
    if feature.scale is not None:
        x = x * _per_head(feature.scale, x)
    if feature.bias is not None:
        x = x + _per_head(feature.bias, x)
    return _elu_plus_one(x)


def key_features(k: Tensor, feature: FeatureMap | None) -> Tensor:
    """Features of keys ``k [B, Hkv, ..., K]`` as they are written: times the write gate, if there is one."""
    features = feature_map(k, feature)
    if feature is None or feature.write is None or feature.write_bias is None:
        return features
    score = (k * _per_head(feature.write, k)).sum(-1, keepdim=True) + _per_head(feature.write_bias, k)
    return features * score.sigmoid()


def _elu_plus_one(x: Tensor) -> Tensor:
    # Not F.elu(x) + 1: that cancels for negative x and loses up to 0.5 % in float32 around x = -12.
    # The sum of both halves has the same bits as a choice between x + 1 and exp(x), and a cheaper gradient.
    return x.clamp(max=0).exp() + x.relu()


def _dpfp(x: Tensor, order: int) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al. 2021, eq. 37)."""
    halves = torch.cat([x, -x], -1).relu()
    return torch.cat([halves * halves.roll(shift, -1) for shift in range(1, order + 1)], -1)


def _per_head(parameter: Tensor, x: Tensor) -> Tensor:
    """``parameter [Hkv]`` or ``[Hkv, K]`` as it multiplies ``x [B, H, ..., K]``."""
    heads = parameter.to(x.dtype).repeat_interleave(x.shape[1] // parameter.shape[0], 0)
    return heads.view(len(heads), *[1] * (x.ndim - 3), -1)
