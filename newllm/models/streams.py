"""Streams side by side in one model: their states at fixed addresses, read in chunks, continued by steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from newllm.models.context_kv.modeling import ContextKVForCausalLM
from newllm.models.context_lm.modeling import ContextLMForCausalLM
from newllm.models.layout import misfit
from newllm.models.sampling import RECENT_TOKENS, Chooser, Sampling, ends_of
from newllm.models.senri.modeling import SenriForCausalLM
from newllm.models.stepping import Replay, Step, Turn
from newllm.modules.cache import ContextCacheLayer, InfiniCacheLayer, cache_layer
from newllm.ops.checks import autocast_dtype
from newllm.types import ContextState, InfiniState

Model = SenriForCausalLM | ContextLMForCausalLM | ContextKVForCausalLM
State = InfiniState | ContextState
Compile = Literal["none", "graph", "full"]


class Snapshot(NamedTuple):
    """All that a session remembers; keep it as long as you like, restore it as often as you like.

    ``states`` per layer (one of a context model), ``hidden [B, hidden_size]`` after the last token (None
    before the first), ``pending [B]`` tokens that were sampled but not yet read (-1: none),
    ``recent [B, <= 50]`` tokens (-1: none).
    """

    states: tuple[State | None, ...]
    hidden: Tensor | None
    pending: Tensor
    recent: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Snapshot:
        """The snapshot with ``function`` applied to each tensor it has."""
        return Snapshot(
            tuple(None if state is None else state.map(function) for state in self.states),
            None if self.hidden is None else function(self.hidden),
            function(self.pending),
            function(self.recent),
        )

    def row(self, row: int) -> Snapshot:
        """Row ``row`` alone, copied."""
        return self.map(lambda tensor: tensor[row : row + 1].clone())

    def nbytes(self) -> int:
        """Bytes of the layers' states."""
        return sum(state.nbytes() for state in self.states if state is not None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it has, by names: those of layer 0 begin with ``0.``."""
        found = {"pending": self.pending, "recent": self.recent}
        if self.hidden is not None:
            found["hidden"] = self.hidden
        for layer, state in enumerate(self.states):
            parts = {} if state is None else state._asdict()
            found |= {f"{layer}.{name}": part for name, part in parts.items() if part is not None}
        return found


class _TurnGraph(NamedTuple):
    """A turn as a graph, which has one way of choosing."""

    sampling: Sampling
    replay: Replay


def check_model(model: object) -> None:
    """Raise ``TypeError`` unless ``model`` can be read as a stream."""
    if not isinstance(model, Model):
        kind = type(model).__name__
        raise TypeError(
            f"model must be a SenriForCausalLM (see newllm.convert) or a context model, got {kind}"
        )


class Streams:
    """``rows`` streams of ``model``; the tensors of their states stay where they are.

    Args:
        model: a Senri, Context LM or Context-KV model.
        rows: streams side by side.
        compile: ``none``; ``graph`` replays a step from a CUDA graph; ``full`` compiles it first (on a CPU
            it is compiled only).

    Raises:
        TypeError: for another kind of model. ValueError: for ``graph`` or ``full`` where they cannot be.
    """

    def __init__(self, model: Model, rows: int, *, compile: Compile = "none") -> None:
        check_model(model)
        if compile not in get_args(Compile):
            raise ValueError(f"compile must be one of {', '.join(get_args(Compile))}, got {compile!r}")
        if compile != "none" and isinstance(model, ContextKVForCausalLM):
            raise ValueError(f"compile must be 'none' for Context-KV, whose slots grow, got {compile!r}")
        if compile == "graph" and model.device.type != "cuda":
            raise ValueError(f"compile='graph' needs a CUDA device, got a model on {model.device}")
        self.model, self.rows, self.compile = model, rows, compile
        kind = InfiniCacheLayer if isinstance(model, SenriForCausalLM) else ContextCacheLayer
        layers = model.config.num_hidden_layers if kind is InfiniCacheLayer else 1
        static = not isinstance(model, ContextKVForCausalLM)
        self._kind = kind
        self._cache = Cache(layers=[kind(static=static, counted=False) for _ in range(layers)])
        head: Any = model.lm_head
        self.hidden = torch.zeros(rows, head.in_features, dtype=model.dtype, device=model.device)
        self.pending = torch.full((rows,), -1, dtype=torch.int64, device=model.device)
        self.recent = self.pending[:, None].repeat(1, RECENT_TOKENS)
        self.ends = ends_of(model)
        self._step: Step | None = None
        self._turn: _TurnGraph | None = None

    def reset(self) -> None:
        """Forget everything."""
        self._cache.reset()
        self.hidden.zero_()
        self.pending.fill_(-1)
        self.recent.fill_(-1)

    @property
    def states(self) -> tuple[State | None, ...]:
        """The states of all layers, not copied; None before the first token."""
        return tuple(layer.read(self.rows) for layer in self._layers)

    @property
    def started(self) -> bool:
        """Whether any row has read anything."""
        return self._layers[0].state is not None

    @property
    def _layers(self) -> list[InfiniCacheLayer]:
        return [cache_layer(self._cache, index, self._kind) for index in range(len(self._cache.layers))]

    def positions(self) -> list[int]:
        """Tokens read so far, per row."""
        state = self._layers[0].state
        return [0] * self.rows if state is None else list(state.position.tolist())

    @torch.no_grad()
    def read(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Read ``tokens [B, T]`` where they are ``real``; hidden states ``[B, T, hidden_size]``."""
        out = self.model.model(tokens, attention_mask=real, past_key_values=self._cache, use_cache=True)
        hidden: Tensor = out.last_hidden_state
        last = (real.sum(1) - 1).clamp(min=0)
        latest = hidden[torch.arange(len(last), device=last.device), last]
        self.hidden.copy_(torch.where(real.any(1)[:, None], latest, self.hidden))
        self.recent.copy_(_latest(self.recent, tokens, real))
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor | None = None) -> Tensor:
        """Logits ``[..., vocabulary]``, float32 or more, of ``hidden [..., hidden_size]`` (None: latest)."""
        logits: Tensor = self.model.lm_head(self.hidden if hidden is None else hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def step(self, tokens: Tensor, active: Tensor) -> Tensor:
        """Read one token ``[B]`` in the ``active [B]`` rows.

        Returns logits ``[B, vocabulary]``, valid until the next step. All rows must hold a state, see
        ``read`` and ``put``. Fewer than all rows are the first ones, the others are left alone; where
        ``whole_steps`` is set, there may not be fewer.
        """
        if self._step is None:
            self._step = Replay(self._compiled, (tokens, active)) if self._graphed else self._compiled
        return self._step(tokens, active)

    def first_turn(self, logits: Tensor, choose: Chooser) -> Turn:
        """What each row says after all that it has read."""
        everyone = torch.ones_like(self.pending, dtype=torch.bool)
        return Turn.of(choose(logits, self.recent, *choose.draw()), everyone, self.ends)

    def next_turn(self, turn: Turn, choose: Chooser) -> Turn:
        """Read what was said, and choose what is said then; ``turn`` may not be used any more."""
        drawn = choose.draw()
        if not self._graphed:
            return self._after(turn, self.step, choose, *drawn)
        if self._turn is None or self._turn.sampling != choose.sampling:
            replay = Replay(partial(self._next_in_place, choose), (*turn, *drawn))
            self._turn = _TurnGraph(choose.sampling, replay)
        self._turn.replay(*turn, *drawn)
        return Turn(*self._turn.replay.inputs[: len(turn)])

    def _next_in_place(self, choose: Chooser, *held: Tensor) -> None:
        """The next turn in the place of the last: nothing is left for the host to do."""
        parts = len(Turn._fields)
        made = self._after(Turn(*held[:parts]), self._compiled, choose, *held[parts:])
        # In this order, for who speaks now is who was going on before.
        for mine, given in zip(held[:parts], made, strict=True):
            mine.copy_(given)

    def _after(self, turn: Turn, step: Step, choose: Chooser, *drawn: Tensor) -> Turn:
        self.leave(turn)
        logits = step(turn.tokens, turn.going)
        self.pending.masked_fill_(turn.going, -1)
        return Turn.of(choose(logits, self.recent, *drawn), turn.going, self.ends)

    def leave(self, turn: Turn) -> None:
        """End with what was said, which is read when the streams go on."""
        self.pending.copy_(torch.where(turn.speaking, turn.tokens, self.pending))

    @property
    def whole_steps(self) -> bool:
        """Whether a step takes all rows: what is compiled has one shape, and what grows is no view."""
        return self.compile != "none" or isinstance(self.model, ContextKVForCausalLM)

    @property
    def _graphed(self) -> bool:
        return self.compile != "none" and self.model.device.type == "cuda"

    @cached_property
    def _compiled(self) -> Step:
        if self.compile != "full":
            return self._forward
        # One row times a matrix is a reduction, fused with the norm before it and the sum behind it, and
        # fast once its tiles are tuned.
        tuned: Any = {"coordinate_descent_tuning": True} if self.model.device.type == "cuda" else None
        step: Step = torch.compile(self._forward, fullgraph=True, dynamic=False, options=tuned)
        return step

    @torch.no_grad()
    def _forward(self, tokens: Tensor, active: Tensor) -> Tensor:
        rows = len(tokens)
        cache = self._cache if rows == self.rows else self._first(rows)
        hidden, recent = self.hidden[:rows], self.recent[:rows]
        out = self.model.model(
            tokens[:, None], attention_mask=active[:, None], past_key_values=cache, use_cache=True
        )
        latest = torch.where(active[:, None], out.last_hidden_state[:, 0], hidden)
        hidden.copy_(latest)
        moved = torch.cat([recent[:, 1:], tokens[:, None]], 1)
        recent.copy_(torch.where(active[:, None], moved, recent))
        return self.logits(latest)

    def _first(self, rows: int) -> Cache:
        """The states of the first ``rows`` rows: what is written to them is written to the whole."""
        layers = [self._kind(static=True, counted=False) for _ in self._layers]
        for layer, whole in zip(layers, self._layers, strict=True):
            assert whole.state is not None
            layer.state = whole.state.map(lambda tensor: tensor[:rows])
        return Cache(layers=layers)

    def snapshot(self) -> Snapshot:
        """A copy of all rows."""
        return self._view().map(torch.clone)

    def take(self, row: int) -> Snapshot:
        """A copy of one row."""
        return self._view().row(row)

    def nbytes(self) -> int:
        """Bytes of all rows' states; zero before the first token."""
        return self._view().nbytes()

    def _view(self) -> Snapshot:
        return Snapshot(self.states, self.hidden if self.started else None, self.pending, self.recent)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from ``snapshot``, copying it from whatever device.

        Raises ``ValueError`` where it does not fit, and goes on as before.
        """
        states = self._fitting(snapshot, self.rows)
        self.reset()
        with torch.no_grad():
            for layer, state in zip(self._layers, states, strict=True):
                if state is not None:
                    # Copied for the layers that would keep the very tensors.
                    layer.write(state.map(torch.clone), 0)  # type: ignore[arg-type]
            for mine, given in zip(self._view()[1:], snapshot[1:], strict=True):
                if mine is not None and given is not None:
                    mine.copy_(given)

    def put(self, row: int, snapshot: Snapshot) -> None:
        """Let row ``row`` go on from a ``snapshot`` of one row that has read something; others stay.

        Raises ``ValueError`` where it does not fit.
        """
        states = self._fitting(snapshot, 1)
        if snapshot.hidden is None:
            raise ValueError("snapshot must be of a session that has read a token, got an empty one")
        with torch.no_grad():
            for layer, state in zip(self._layers, states, strict=True):
                assert state is not None
                held: Any = layer.state
                if held is None:
                    held = state.map(lambda one: one.new_zeros(self.rows, *one.shape[1:]))
                layer.write(_with_row(held, row, state), 0)
            for mine, given in (
                (self.hidden, snapshot.hidden),
                (self.pending, snapshot.pending),
                (self.recent, snapshot.recent),
            ):
                mine[row] = given[0]

    def _fitting(self, snapshot: Snapshot, rows: int) -> tuple[State | None, ...]:
        """The states of ``snapshot`` on the devices where the model has its own."""
        made = made_by(self.model)
        if len(snapshot.states) != len(made.states):
            raise ValueError(f"snapshot must hold {len(made.states)} layers, got {len(snapshot.states)}")
        if len(snapshot.pending) != rows:
            raise ValueError(f"snapshot must hold {rows} rows, got {len(snapshot.pending)}")
        wrong = misfit(snapshot.tensors(), made.tensors(), rows)
        if wrong is not None:
            raise ValueError(f"snapshot must be of a model of this shape: {wrong}")
        pairs = zip(snapshot.states, made.states, strict=True)
        return tuple(None if state is None else _moved(state, like) for state, like in pairs)


# What a model makes, until its parameters are others or elsewhere: it takes a token to tell.
_MADE: WeakKeyDictionary[Model, tuple[Any, Snapshot]] = WeakKeyDictionary()


def made_by(model: Model) -> Snapshot:
    """What a session of one row holds after a token: names, shapes, dtypes and devices, without content."""
    autocast = autocast_dtype(model.device.type)
    unchanged = (autocast, [(weight.dtype, weight.device, weight.shape) for weight in model.parameters()])
    known = _MADE.get(model)
    if known is None or known[0] != unchanged:
        streams = Streams(model, 1)
        one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        streams.read(one, torch.ones_like(one, dtype=torch.bool))
        made = streams.take(0).map(lambda tensor: tensor.new_empty(()).expand(tensor.shape))
        known = _MADE[model] = (unchanged, made)
    return known[1]


def _moved(state: Any, like: Any) -> State:
    """``state`` on the devices of ``like``, which has the same parts."""
    pairs = zip(state, like, strict=True)
    moved: State = type(state)(*(None if part is None else part.to(one.device) for part, one in pairs))
    return moved


def _latest(recent: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """The last of ``recent`` and the real ones of ``tokens``, oldest first."""
    joined = torch.cat([recent, tokens.masked_fill(~real, -1)], 1)
    kept = torch.cat([torch.ones_like(recent, dtype=torch.bool), real], 1)
    order = kept.to(torch.int8).argsort(dim=1, stable=True)
    return joined.gather(1, order)[:, -recent.shape[1] :]


def _with_row(states: Any, row: int, state: State) -> Any:
    """``states`` with its row ``row`` from ``state`` of one row; in place where the sizes allow."""
    if isinstance(states, ContextState) and isinstance(state, ContextState) and states.slots is not None:
        assert state.slots is not None
        width = max(states.slots.shape[1], state.slots.shape[1])
        states, state = _widened(states, width), _widened(state, width)
    for held, given in zip(states, state, strict=True):
        if held is not None and given is not None:
            held[row] = given[0]
    return states


def _widened(state: ContextState, width: int) -> ContextState:
    """``state`` with empty slots before its own, ``width`` in all."""
    assert state.slots is not None and state.keys is not None and state.values is not None
    missing = width - state.slots.shape[1]
    pad = torch.nn.functional.pad
    return state._replace(
        slots=pad(state.slots, (missing, 0), value=-1),
        keys=pad(state.keys, (0, 0, missing, 0)),
        values=pad(state.values, (0, 0, missing, 0)),
    )
