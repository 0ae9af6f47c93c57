"""States of constant size inside an ordinary transformers ``Cache``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from newllm.types import ContextState, InfiniState


class InfiniCacheLayer(CacheLayerMixin):
    """Holds an ``InfiniState`` of constant size and moves it with every batch operation.

    ``static`` keeps the tensors' addresses, for compiled decoding and CUDA graphs. Under gradients any state
    is replaced rather than overwritten, so that backward still finds what forward used. ``counted`` is what
    transformers' own ``generate()`` asks for: tokens are counted, and Dynamo is told of the addresses; each
    count is a kernel, which others do without.
    """

    is_croppable = False
    # Neither True nor False: transformers then makes its masks for the model's other layers, if it has any.
    is_sliding = "neither"  # type: ignore[assignment]
    supports_early_init = False

    def __init__(self, static: bool = False, counted: bool = True) -> None:
        super().__init__()
        self.is_compileable, self._counted = static, counted
        self.state: InfiniState | None = None
        # Where a static layer that was reset will put its next state.
        self._home: InfiniState | None = None
        # A tensor when static: a Python number would recompile the graph at every token.
        self.cumulative_length: int | Tensor = torch.tensor(0) if static else 0

    def read(self, batch_size: int) -> InfiniState | None:
        """The state for a batch of ``batch_size`` rows; None before the first token.

        Raises ``ValueError`` for a cache of another batch size.
        """
        if self.state is not None and len(self.state.position) != batch_size:
            raise ValueError(
                f"past_key_values holds {len(self.state.position)} rows, the input has {batch_size}: "
                "pass a cache of the same batch size"
            )
        return self.state

    def write(self, state: InfiniState, tokens: int) -> None:
        """Keep ``state``, which is ``tokens`` tokens ahead of the one read."""
        if not self.is_compileable or torch.is_grad_enabled():
            self.state = state
        else:
            if self.state is None:
                fits = self._home is not None and self._home.position.shape == state.position.shape
                self.state, self._home = self._home if fits else self._allocated(state), None
            self._overwrite(state)
        if self._counted:
            self.cumulative_length += tokens
        self.is_initialized = True

    def _allocated(self, state: InfiniState) -> InfiniState:
        made = state.map(torch.empty_like)
        self.cumulative_length = self.cumulative_length.to(state.position.device)  # type: ignore[union-attr]
        if self._counted and not torch.compiler.is_compiling():
            for tensor in (*made, self.cumulative_length):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)
        return made

    def _overwrite(self, state: InfiniState) -> None:
        assert self.state is not None
        for old, new in zip(self.state, state, strict=True):
            # Decoding has already written in place: there the two are one tensor.
            if old is not None and new is not None and old is not new:
                old.copy_(new.detach())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are only asked about the new tokens: which of them are padding."""
        return query_length, self.get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.cumulative_length  # type: ignore[return-value] # a tensor when static, as in transformers

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first token."""
        return -1 if self.state is None else len(self.state.position)

    def reset(self) -> None:
        """Forget everything; a static layer keeps its addresses."""
        if self.is_compileable and self.state is not None:
            self._home = self.state
        self.state, self.is_initialized = None, False
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.zero_()
        else:
            self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams take their memory along."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._each(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """States are small and stay where they are."""

    def prefetch(self) -> None:
        """States are small and stay where they are."""

    def crop(self, tokens_to_remove: int) -> None:
        """A memory cannot forget its last tokens: raises ``RuntimeError`` unless there are none to remove."""
        if tokens_to_remove != 0:
            raise RuntimeError("a recurrent memory cannot be cropped: keep a snapshot and restore it")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the operator returns the first state."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Not a key/value cache: raises ``RuntimeError``."""
        raise RuntimeError(
            "this cache belongs to newllm's InfiniAttention; other attention cannot append to it"
        )

    def _each(self, move: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(move)


class ContextCacheLayer(InfiniCacheLayer):
    """The same for the ``ContextState`` of a whole model."""

    def read_context(self, batch_size: int, width: int) -> ContextState | None:
        """The state for a batch of ``batch_size`` rows and contexts of ``width`` numbers; None at the start.

        Raises ``ValueError`` for a cache of another batch size or model.
        """
        state: Any = self.read(batch_size)
        if state is not None and state.context.shape[-1] != width:
            raise ValueError(
                f"past_key_values holds contexts of width {state.context.shape[-1]}, the model's have "
                f"{width}: pass a cache of this model"
            )
        return state  # type: ignore[no-any-return]


def cache_layer(
    cache: Cache, index: int, kind: type[InfiniCacheLayer] = InfiniCacheLayer
) -> InfiniCacheLayer:
    """Layer ``index`` of ``cache``, put there in place of a fresh key/value layer.

    Raises ``ValueError`` for a cache that another kind of attention has written to.
    """
    while len(cache.layers) <= index:
        cache.layers.append(kind())
    layer = cache.layers[index]
    if type(layer) is not kind:
        if layer.is_initialized and int(layer.get_seq_length()) > 0:
            raise ValueError(
                f"past_key_values already holds {type(layer).__name__} content of another model in layer "
                f"{index}: pass a fresh cache"
            )
        layer = cache.layers[index] = kind(static=isinstance(layer, StaticLayer))
    return layer
