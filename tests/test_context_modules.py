"""Context blocks, token blocks, updaters, and attention over contexts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from newllm import testing
from newllm.modules import ContextBlock, ContextKVAttention, ContextLayer, RecurrentCell, SlotRule, TokenBlock
from newllm.modules.context_block import recent_tokens, shift_contexts
from newllm.modules.context_kv import visible_positions
from newllm.modules.updaters import updater_of

TINY = torch.finfo(torch.float64).eps


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def close(actual: Tensor, expected: Tensor, additions: int = 64) -> None:
    testing.assert_rounding(actual, expected, additions=additions, magnitude=additions)


# Context blocks


def test_row_20_counts_and_the_token_at_every_layer() -> None:
    assert count(ContextLayer(768, 768)) == 1_181_952
    assert count(ContextBlock(768, 768, 6)) == 7_091_712
    assert count(ContextBlock(500, 768)) == 635_500
    assert count(ContextBlock(256, 768)) == 262_912
    block = ContextBlock(4, 3, 2).double()
    context, x = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    second = block.layers[1]
    first_out, out = block.step(context, x)
    by_hand = first_out + torch.nn.functional.gelu(
        torch.cat([first_out, x], -1) @ second.linear.weight.T + second.linear.bias
    )
    close(out, torch.nn.functional.layer_norm(by_hand, (4,)))


def test_row_21_initial_numbers_are_as_mandated() -> None:
    block = ContextBlock(256, 256)
    linear = block.layers[0].linear
    # The standard deviation of n normal numbers is known to 1 / sqrt(2 n); five times that is never seen.
    for values, std in ((linear.weight, 0.1), (linear.bias, 0.01)):
        assert abs(values.std() / std - 1) < 5 / (2 * values.numel()) ** 0.5
    token = TokenBlock(256, 64, input_tokens=2).layers[0]
    assert abs(token.residual.weight.std() / 0.1 - 1) < 5 / (2 * token.residual.weight.numel()) ** 0.5
    xavier = (2 / (512 + 256)) ** 0.5
    assert linear.weight.std() > 1.5 * xavier


def test_a_sweep_is_the_loop_over_tokens() -> None:
    block = ContextBlock(5, 3, 2, input_tokens=2).double()
    x = block.inputs(torch.randn(2, 7, 3, dtype=torch.float64))
    contexts, state, _ = block(x)
    context = torch.zeros(2, 5, dtype=torch.float64)
    for token, expected in zip(x.unbind(1), contexts.unbind(1), strict=True):
        context = block.step(context, token)[-1]
        close(context, expected)
    assert torch.equal(state, contexts[:, -1])


def test_row_35_several_input_tokens_are_the_manual_concatenation() -> None:
    x = torch.randn(2, 5, 3)
    joined = recent_tokens(x, 3)
    for t in range(5):
        parts = [x[:, s] if s >= 0 else torch.zeros(2, 3) for s in (t - 2, t - 1, t)]
        assert torch.equal(joined[:, t], torch.cat(parts, -1))
    continued = recent_tokens(x[:, 2:], 3, before=x[:, :2])
    assert torch.equal(continued, joined[:, 2:])


def test_shifted_contexts_start_from_zero_or_from_the_end() -> None:
    contexts = torch.arange(1.0, 7).view(3, 2)
    assert shift_contexts(contexts).tolist() == [[0, 0], [1, 2], [3, 4]]
    assert shift_contexts(contexts, "wrap").tolist() == [[5, 6], [1, 2], [3, 4]]
    with pytest.raises(ValueError, match="start must be 'zero' or 'wrap', got 'carry'"):
        shift_contexts(contexts, "carry")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        ContextBlock(4, 3, 0)


# Token blocks


@pytest.mark.parametrize("plan", ["A", "D", "E", "F", "G"])
def test_row_37_plans_read_their_contexts_and_no_others(plan: str) -> None:
    block, tokens = ContextBlock(4, 3, 2), TokenBlock(4, 3, 2, plan=plan)  # type: ignore[arg-type]
    x, context = torch.randn(6, 3), torch.randn(6, 4)
    with torch.no_grad():
        outputs = block.step(context, x)
    chosen = [one.requires_grad_() for one in tokens.choose(outputs, context)]
    out = tokens(x, chosen)
    assert out.shape == (6, 3)
    out.square().sum().backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in chosen)
    assert all(parameter.grad is None for parameter in block.parameters())
    assert all(p.grad is not None for n, p in tokens.named_parameters() if "context_norm" not in n)
    expected = {"A": 1, "D": 1, "E": 2, "F": 1, "G": 2}[plan]
    with pytest.raises(
        ValueError, match=rf"contexts must hold {expected} tensors for plan {plan} with 2 layers, got 3"
    ):
        tokens(x, [context] * 3)


def test_row_37_plan_e_reads_layer_by_layer() -> None:
    tokens = TokenBlock(4, 3, 2).double()
    x, one, two = (torch.randn(6, width, dtype=torch.float64) for width in (3, 4, 4))
    first, second = tokens.layers
    expected, _ = second(first(x, one)[0], two)
    assert torch.equal(tokens(x, [one, two]), expected)
    assert count(TokenBlock(500, 768)) == 976_128
    assert count(TokenBlock(768, 768, 6)) == 7_091_712


def test_token_features_shrink_in_equal_steps() -> None:
    widths = [
        (layer.linear.in_features - 4, layer.out_dim) for layer in TokenBlock(4, 6, 3, input_tokens=3).layers
    ]
    assert widths == [(18, 14), (14, 10), (10, 6)]
    with pytest.raises(ValueError, match="layers must be at least 2 for plan G, got 1"):
        TokenBlock(4, 3, 1, plan="G")
    with pytest.raises(ValueError, match="plan must be one of A, D, E, F, G, got 'B'"):
        TokenBlock(4, 3, plan="B")  # type: ignore[arg-type]


# Updaters


def test_row_02_the_simple_updater_keeps_no_past_of_its_own() -> None:
    """The gradient to the context before flows through h alone: cut there, none is left."""
    x = torch.randn(1, 1, 3, dtype=torch.float64)
    for name, kept in (("simple", 0.0), ("gated", 0.1)):
        cell = RecurrentCell(3, 6, 4, updater=name).double()
        with torch.no_grad():
            cell.first.weight[:, 3:] = 0
        state = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
        _, contexts, _ = cell(x, state)
        contexts[0, 0, 0].backward()
        assert state.grad is not None
        assert (state.grad.abs().max() > kept) if kept else (state.grad.abs().max() < TINY)


def test_row_02_the_simple_updater_is_its_formula() -> None:
    cell = RecurrentCell(3, 6, 4, 2, updater="simple").double()
    x, state = torch.randn(1, 1, 3).double(), torch.randn(1, 4).double()
    hidden, contexts, last = cell(x, state)
    h = torch.cat([x[:, 0], state], -1)
    for layer in (cell.first, *cell.deeper):
        h = layer(h).relu()
    close(hidden[:, 0], h)
    close(last, torch.nn.functional.layer_norm(cell.updater.candidate(h).tanh(), (4,)))
    assert torch.equal(contexts[:, 0], last)


def test_row_03_updaters_by_name_and_by_their_weights() -> None:
    for name in ("gated", "simple"):
        assert updater_of(RecurrentCell(3, 6, 4, updater=name).state_dict()) == name
    with pytest.raises(ValueError, match="updater must be one of gated, simple, got 'overwrite'"):
        RecurrentCell(3, 6, 4, updater="overwrite")
    with pytest.raises(ValueError, match=r"weights must hold an updater's candidate\.weight, got none"):
        updater_of(["head.weight"])


def test_hidden_features_see_the_context_before_their_token() -> None:
    """Predict first, then update: h at t reads c at t-1, whether tokens come together or one by one."""
    cell = RecurrentCell(3, 6, 4, 2, clamp=10.0).double()
    x = torch.randn(2, 5, 3).double()
    hidden, contexts, last = cell(x)
    state = None
    for t in range(5):
        one, context, state = cell(x[:, t : t + 1], state)
        close(one[:, 0], hidden[:, t])
        close(context[:, 0], contexts[:, t])
    assert state is not None
    close(state, last)


# Attention over contexts


def test_row_43_visible_positions() -> None:
    rule = SlotRule(chunk_size=100)
    expected = {
        0: [0],
        98: [98],
        99: [99],
        100: [99, 100],
        199: [99, 199],
        200: [99, 199, 200],
        350: [99, 199, 299, 350],
    }
    assert {p: visible_positions(p, rule) for p in expected} == expected
    doubled = rule._replace(duplicate_boundary=True)
    assert visible_positions(199, doubled) == [99, 199, 199]
    assert visible_positions(350, doubled) == [99, 199, 299, 350]


def test_newest_contexts_and_intervals() -> None:
    newest = SlotRule(chunk_size=100, max_contexts=3)
    assert visible_positions(350, newest) == [199, 299, 350]
    assert visible_positions(399, newest) == [199, 299, 399]
    assert visible_positions(50, newest) == [50]
    steps = SlotRule(20, "interval", 4)
    assert visible_positions(70, steps) == [10, 30, 50, 70]
    assert visible_positions(95, steps) == [35, 55, 75, 95]
    assert visible_positions(5, steps) == [5]
    assert (newest.capacity, steps.capacity, SlotRule().capacity) == (2, 60, None)
    for wrong, said in (
        (SlotRule(0), "chunk_size must be at least 1, got 0"),
        (SlotRule(kind="last"), "kind must be 'chunk' or 'interval', got 'last'"),  # type: ignore[arg-type]
        (SlotRule(max_contexts=0), "max_contexts must be at least 1 or None, got 0"),
        (SlotRule(kind="interval"), "max_contexts must be given for kind 'interval', got None"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong.checked()


def attend(attention: ContextKVAttention, x: Tensor, own: Tensor, bank: Tensor, visible: Tensor) -> Tensor:
    return attention(x, attention.project(own), attention.project(bank), visible)


def test_row_44_the_output_is_independent_of_batch_mates() -> None:
    """Slots that a query does not see, such as the padding of a shorter history, take no part."""
    attention = ContextKVAttention(8, 6, 2).double().eval()
    x, own, bank = (torch.randn(2, n, d).double() for n, d in ((3, 8), (3, 6), (5, 6)))
    visible = torch.zeros(2, 3, 5, dtype=torch.bool)
    visible[:, :, :2] = True
    visible[1] = True
    together = attend(attention, x, own, bank, visible)
    alone = attend(attention, x[:1], own[:1], bank[:1, :2], visible[:1, :, :2])
    close(together[:1], alone)
    bank[0, 2:] = 1e3
    assert torch.equal(attend(attention, x, own, bank, visible)[:1], together[:1])


def test_attention_is_a_softmax_over_slots_and_the_own_context() -> None:
    attention = ContextKVAttention(4, 3, 1).double().eval()
    x, own, bank = (torch.randn(1, n, d).double() for n, d in ((1, 4), (1, 3), (2, 3)))
    rows = torch.cat([bank[0], own[0]])
    keys, values = attention.project(rows)
    weights = (keys @ attention.query(x)[0, 0] / 2).softmax(0)
    expected = attention.norm(x[0, 0] + attention.out(weights @ values))
    close(attend(attention, x, own, bank, torch.ones(1, 1, 2, dtype=torch.bool))[0, 0], expected)
    nothing = attend(attention, x, own, bank[:, :0], torch.ones(1, 1, 0, dtype=torch.bool))
    close(nothing[0, 0], attention.norm(x[0, 0] + attention.out(attention.value(own)[0, 0])))
    with pytest.raises(ValueError, match=r"heads must divide embed_dim \(8\), got 3"):
        ContextKVAttention(8, 4, 3)


def test_slots_of_one_position_come_in_order() -> None:
    seen = visible_positions(1234, SlotRule(chunk_size=7))
    assert all(a < b for a, b in pairwise(seen)) and len(seen) == 1235 // 7 + 1
