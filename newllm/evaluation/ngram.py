"""N-grams with interpolated Witten-Bell smoothing: what counting the last tokens comes to.

N training tokens, M validation tokens, V token ids.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_CELLS = 2**24


class Counts(NamedTuple):
    """Of the contexts of one length: which token followed which context, how often.

    ``codes [P]`` are sorted pairs, context * V + token, seen ``counts [P]`` times; ``totals [G]`` and
    ``kinds [G]`` are each context's tokens and different tokens, and ``starts [G + 1]`` where its pairs are.
    """

    codes: Tensor
    counts: Tensor
    totals: Tensor
    kinds: Tensor
    starts: Tensor


class NGram:
    """Probabilities of the next token from the ``order - 1`` tokens before it.

    p_k(w | c) = (n(c, w) + T(c) p_{k-1}(w | c')) / (n(c) + T(c)) with T(c) the number of different tokens
    after c and c' the context without its oldest token; below the shortest context all tokens are as likely
    (Witten and Bell, 1991).

    Args:
        ids: training tokens ``[N]``.
        order: n.
        vocabulary: V.

    Raises:
        ValueError: for an order below 1, fewer than two tokens, or ids outside the vocabulary.
    """

    def __init__(self, ids: Tensor, order: int, vocabulary: int) -> None:
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        if len(ids) < 2:
            raise ValueError(f"ids must hold at least 2 tokens, got {len(ids)}")
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ValueError(f"ids must lie between 0 and {vocabulary - 1}, got {int(ids.max())}")
        self.order, self.vocabulary = order, vocabulary
        self.levels: list[Counts] = []
        ids = ids.long()
        # The class of the context before each token; -1 where the text has not enough of them.
        contexts = torch.zeros_like(ids)
        for _ in range(order):
            known = contexts >= 0
            codes, counts = (contexts * vocabulary + ids)[known].unique(return_counts=True)
            classes = len(self.levels[-1].codes) if self.levels else 1
            self.levels.append(_counts(codes, counts, vocabulary, classes))
            contexts = self._longer(contexts, ids, codes)

    def _longer(self, contexts: Tensor, ids: Tensor, codes: Tensor) -> Tensor:
        """Classes of contexts one token longer: that of the pair that ends just before each token."""
        pairs = contexts * self.vocabulary + ids
        place = torch.searchsorted(codes, pairs).clamp(max=len(codes) - 1)
        found = torch.where((contexts >= 0) & (codes[place] == pairs), place, -1)
        return torch.cat([found.new_full((1,), -1), found[:-1]])

    def evaluate(self, ids: Tensor) -> dict[str, float]:
        """Loss (nats), perplexity and accuracy of each of ``ids [M]`` but the first, from those before it."""
        ids, classes = ids.long(), []
        contexts = torch.zeros_like(ids)
        for level in self.levels:
            classes.append(contexts)
            contexts = self._longer(contexts, ids, level.codes)
        loss, right = 0.0, 0
        for places in torch.arange(1, len(ids)).split(max(1, _CELLS // self.vocabulary)):
            known = self._probabilities([one[places] for one in classes])
            targets = ids[places]
            loss -= float(known.gather(1, targets[:, None]).log().double().sum())
            right += int((known.argmax(1) == targets).sum())
        mean = loss / (len(ids) - 1)
        return {"loss": mean, "perplexity": math.exp(min(mean, 20.0)), "accuracy": right / (len(ids) - 1)}

    def _probabilities(self, classes: list[Tensor]) -> Tensor:
        """Of every token, ``[n, V]``, from the classes ``[n]`` of contexts of each length."""
        known = torch.full((len(classes[0]), self.vocabulary), 1 / self.vocabulary, dtype=torch.float64)
        for level, group in zip(self.levels, classes, strict=True):
            # A context that training never had, or never went on from, says nothing.
            rows = torch.nonzero(group >= 0)[:, 0]
            rows = rows[level.kinds[group[rows]] > 0]
            if not len(rows):
                break
            chosen = group[rows]
            kinds, whole = level.kinds[chosen], level.kinds[chosen] + level.totals[chosen]
            known[rows] *= (kinds / whole)[:, None]
            lengths = level.starts[chosen + 1] - level.starts[chosen]
            owner = torch.repeat_interleave(torch.arange(len(rows)), lengths)
            offsets = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
            pairs = level.starts[chosen][owner] + offsets
            known.index_put_(
                (rows[owner], level.codes[pairs] % self.vocabulary),
                level.counts[pairs] / whole[owner],
                accumulate=True,
            )
        return known


def _counts(codes: Tensor, counts: Tensor, vocabulary: int, size: int) -> Counts:
    """The counts of ``size`` contexts, of which the last may never have been followed by anything."""
    groups = codes // vocabulary
    totals, kinds = torch.zeros(2, size, dtype=torch.float64)
    totals.index_add_(0, groups, counts.double())
    kinds.index_add_(0, groups, torch.ones_like(counts, dtype=torch.float64))
    starts = torch.searchsorted(groups, torch.arange(size + 1))
    return Counts(codes, counts.double(), totals, kinds, starts)
