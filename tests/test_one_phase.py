"""One-phase training of gated context models: the same figures in training and evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from newllm.models import ContextLMConfig, ContextLMForCausalLM
from newllm.training.one_phase import METRICS, batch_metrics, evaluate_batches, train_epoch
from newllm.training.phase_two import perplexity


def gated(**options: float) -> ContextLMForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "embed_dim": 8, "context_dim": 6, "hidden_dim": 10}
    return ContextLMForCausalLM(
        ContextLMConfig(**sizes, dropout=0.0, initializer_range=0.3, **options)  # type: ignore[arg-type]
    )


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(1, 3, (3, 20), generator=generator).cumsum(1)) % 12 for _ in range(count)]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_row_10_training_and_evaluation_say_the_same(weight: float) -> None:
    model = gated(reconstruction_weight=weight)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    trained, judged = train_epoch(model, batches(), still), evaluate_batches(model, batches())
    assert trained == judged and set(METRICS) < set(judged)
    assert judged["perplexity"] == perplexity(judged["token_loss"])
    assert (judged["reconstruction_loss"] > 0) == (weight > 0)
    one = batch_metrics(model.eval(), batches(1)[0])
    assert one["loss"].requires_grad and not one["token_loss"].requires_grad


def test_row_10_both_losses_fall() -> None:
    model = gated(reconstruction_weight=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    before = evaluate_batches(model, batches())
    for _ in range(15):
        train_epoch(model, batches(), optimizer)
    after = evaluate_batches(model, batches())
    for name in ("token_loss", "reconstruction_loss"):
        assert after[name] < before[name]
    assert after["reconstruction_accuracy"] > before["reconstruction_accuracy"]


def test_id_0_is_a_token_like_any_other() -> None:
    model = gated().eval()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    found = batch_metrics(model, ids)
    logits = model(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert torch.equal(found["token_loss"], expected.detach())


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = gated()
    with torch.no_grad():
        model.lm_head.bias.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="the loss of batch 0 is nan"):
        train_epoch(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1))
