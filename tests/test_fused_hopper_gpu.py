"""The kernels for Hopper: every option and shape that they take, and where others take over."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from newllm.testing import DRAWS
from tests.attention_cases import Launches, judge, layer, window
from tests.determinism_parts import CONFIGURATIONS, NEIGHBOURS, neighbours, repeated
from tests.test_fused_attention_gpu import OPTIONS, sized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]

BF16 = torch.bfloat16
KERNELS = {
    f"_infini_attention_{part}_hopper_kernel" for part in ("forward", "backward_keys", "backward_queries")
}
WIDE = {"key": 128, "value": 128}
# Tokens, window, segment: one token a tile, edges inside tiles, whole tiles, a segment of several tiles.
SHAPES = [(4, 1, 1), (68, 64, 64), (132, 17, 3), (2048, 256, 128), (1032, 300, 250), (1031, 1000, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("changes", OPTIONS)
def test_every_option(changes: str, shape: tuple[int, int, int]) -> None:
    judge(layer(changes), BF16, "cuda", draws=DRAWS[BF16], **sized(*shape, **WIDE))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("changes", ["", "padded", "no-rope", "long"])
def test_the_window_alone(changes: str, width: int, shape: tuple[int, int, int]) -> None:
    sizes = sized(*shape, key=width, value=width)
    judge(window(changes), BF16, "cuda", draws=DRAWS[BF16], **sizes)


@pytest.mark.parametrize("shape", [(132, 65, 64), (1032, 300, 250)], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (24, 8), (32, 8), (8, 1)])
@pytest.mark.parametrize("changes", ["learned", "delta padded stream"])
def test_groups_of_queries(changes: str, heads: int, kv_heads: int, shape: tuple[int, int, int]) -> None:
    changes = changes.replace("learned", "tanh") if kv_heads == 1 else changes
    sizes = sized(*shape, **WIDE, heads=heads, kv_heads=kv_heads)
    judge(layer(changes), BF16, "cuda", draws=DRAWS[BF16], **sizes)


@pytest.mark.parametrize(
    ("changes", "sizes", "expected"),
    [
        ("learned", {}, KERNELS),
        ("learned delta padded stream", {}, KERNELS),
        ("learned", {"tokens": 131}, {name for name in KERNELS if "keys" not in name}),
        ("learned", {"heads": 8}, {name for name in KERNELS if "keys" in name}),
        ("learned", {"key": 64, "value": 64}, {name for name in KERNELS if "keys" in name}),
        ("learned local", {}, set()),
        ("learned", {"key": 96, "value": 96}, set()),
    ],
)
def test_which_kernels_run(
    changes: str, sizes: dict[str, int], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = layer(changes)
    inputs = case.inputs("changed", BF16, device="cuda", **{**sized(132, 132, 64, **WIDE), **sizes})
    launches = Launches(monkeypatch)
    case.results(partial(case.call, function=partial(case.public, backend="fused")), inputs)
    assert {name for name in launches.names if name.endswith("_hopper_kernel")} == expected


def test_a_device_that_changes_between_processes_gives_the_same_bits() -> None:
    named = {(each.family, each.option, each.dtype): each for each in CONFIGURATIONS}
    with neighbours(NEIGHBOURS):
        assert repeated(named["window", "", BF16], "cuda", 600) == []
        assert repeated(named["layer", "learned", BF16], "cuda", 300) == []
