"""Conversations with any causal model of transformers: it keeps its own cache, which may grow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from newllm.files import read_json, reading
from newllm.models.files import written_whole
from newllm.models.sampling import RECENT_TOKENS, Chooser, Sampling, ends_of
from newllm.models.session_input import token_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK, _TOKEN_BYTES = 1024, 8


class HistorySession:
    """One stream of a model, read and continued call after call; what ``Session`` is for Senri.

    Everything read stays in the model's cache, so the stream ends where the model's positions do. A model
    without such a cache reads everything again for each token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._cache = DynamicCache(config=self.model.config)
        self._ids: list[int] = []
        self._pending = -1
        self._logits: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        """Tokens read so far, of the one row."""
        return [len(self._ids)]

    @property
    def pending(self) -> list[int]:
        """The token that was generated last and is read by the next call; -1 where there is none."""
        return [self._pending]

    @property
    def state_bytes(self) -> int:
        """Bytes of the cache, which grows with what is read; of the tokens for a model that fills none."""
        kept = (x for layer in self._cache.layers for x in (layer.keys, layer.values))
        return sum(x.nbytes for x in kept if x is not None) or _TOKEN_BYTES * len(self._ids)

    def feed(self, text: str | Tensor) -> None:
        """Read ``text``: a string or token ids ``[T]``.

        Raises ``ValueError`` where the model has no positions left for it; nothing has been read then.
        """
        (ids,) = token_rows(text, self.tokenizer, 1, self.model.config.vocab_size)
        self._read([*self._behind(), *ids.tolist()])

    def stream(
        self,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Up to ``max_new_tokens`` new tokens ``[1]``, -1 at the end of the text; as ``Session.stream``.

        The text ends at the tokenizer's end-of-text token or one of the model's.
        """
        if self._pending >= 0:
            self._read(self._behind())
        if self._logits is None:
            raise ValueError("prompt must hold a token before anything can follow it, got none")
        ends = {self.tokenizer.eos_token_id, *ends_of(self.model).tolist()}
        choose = Chooser(sampling or Sampling(), 1, self._logits, generator)
        for step in range(max_new_tokens):
            recent = [-1] * RECENT_TOKENS + self._ids
            rows = torch.tensor([recent[-RECENT_TOKENS:]], device=self._logits.device)
            self._pending = int(choose(self._logits, rows, *choose.draw()))
            if self._pending in ends:
                yield torch.tensor([-1])
                return
            yield torch.tensor([self._pending])
            if step + 1 < max_new_tokens:
                self._read(self._behind())

    def save(self, path: str | Path) -> None:
        """Keep the conversation, as its tokens, in a JSON file."""
        with written_whole(Path(path)) as temporary:
            temporary.write_text(json.dumps({"read": self._ids, "pending": self._pending}), encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Take up a saved conversation by reading it again.

        Raises ``FileNotFoundError`` where there is none, ``ValueError`` for another kind of file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no session file {path}")
        with reading("the conversation", path):
            content = read_json(Path(path), "the conversation")
            read, pending = content["read"], content["pending"]
            self._check(read, pending)
        self.reset()
        if read:
            self._read(read)
        self._pending = pending

    def _check(self, read: list[int], pending: int) -> None:
        size = self.model.config.vocab_size
        for token in (*read, *([] if pending == -1 else [pending])):
            if type(token) is not int or not 0 <= token < size:
                raise ValueError(f"tokens must be from 0 to {size - 1}, got {ascii(token)[:40]}")
        self._check_length(len(read))

    def _check_length(self, total: int) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and total > most:
            raise ValueError(f"the conversation has {total} tokens, the model reads {most}: reset it")

    def _behind(self) -> list[int]:
        return [self._pending] if self._pending >= 0 else []

    @torch.no_grad()
    def _read(self, ids: list[int]) -> None:
        total = len(self._ids) + len(ids)
        self._check_length(total)
        for part in torch.tensor([ids], dtype=torch.int64, device=self.model.device).split(_CHUNK, 1):
            out = self.model(input_ids=part, past_key_values=self._cache, use_cache=True)
        self._ids += ids
        if self._cache.get_seq_length() != total:
            # It keeps no keys and values: it reads everything again.
            out = self.model(input_ids=torch.tensor([self._ids], device=self.model.device), use_cache=False)
        self._logits = out.logits[:, -1].float()
        self._pending = -1
