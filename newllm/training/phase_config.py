"""Options of the two phases, and of repetition training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from newllm.training.config import check_least


class FromBase:
    """Configurations made from another's fields."""

    @classmethod
    def from_base(cls, base: object, overrides: Mapping[str, Any] | None = None) -> Self:
        """The fields that ``base`` has too, with ``overrides`` on top.

        Raises ``ValueError`` for an override that is no field.
        """
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(overrides or {}) - names)
        if unknown:
            raise ValueError(f"overrides must be fields of {cls.__name__}, got {', '.join(unknown)}")
        taken = {name: getattr(base, name) for name in names if hasattr(base, name)}
        return cls(**{**taken, **(overrides or {})})


@dataclass
class Phase1Config(FromBase):
    """How contexts are trained, without targets.

    Args:
        max_iterations: most sweeps, the first of which only draws the contexts to begin with.
        min_iterations: sweeps before any rule may end the training.
        convergence_threshold: a context has converged when its mean squared change is below this.
        stop_rate: share of converged contexts that ends the training.
        improvement_from: share from which a standstill ends it too.
        min_improvement: gain of the share in a sweep that is no standstill.
        improvement_patience: sweeps of standstill.
        learning_rate: of Adam.
        batch_size: contexts whose mean and covariance a diversity loss sees.
        gradient_clip: largest norm of gradients.
        context_noise: standard deviation of noise on contexts, in training.
        diversity: oacd, mcdl, odcm, w_mse, sdl or nuc.
        dist_reg_weight: share of the diversity loss, the rest being the change of contexts (CVFP).
        start: context before the first token, zero, or wrap for the last one's.
        stop: by the rate, or by the effective rank of validation contexts.
        rank_every: sweeps between looks at that rank.
        rank_patience: looks without improvement.
        rank_rows: validation contexts that are looked at.
        seed: of the first contexts and the noise.
    """

    max_iterations: int = 60
    min_iterations: int = 5
    convergence_threshold: float = 0.03
    stop_rate: float = 0.9
    improvement_from: float = 0.5
    min_improvement: float = 0.01
    improvement_patience: int = 2
    learning_rate: float = 0.002
    batch_size: int = 5000
    gradient_clip: float = 2.0
    context_noise: float = 0.1
    diversity: str = "oacd"
    dist_reg_weight: float = 1.0
    start: Literal["zero", "wrap"] = "zero"
    stop: Literal["rate", "rank"] = "rate"
    rank_every: int = 5
    rank_patience: int = 1
    rank_rows: int = 10000
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for values out of range."""
        if not 0 <= self.dist_reg_weight <= 1:
            raise ValueError(f"dist_reg_weight must be between 0 and 1, got {self.dist_reg_weight}")
        at_least = {"batch_size": 2, "max_iterations": 2, "context_noise": 0, "gradient_clip": 0}
        at_least |= {"improvement_patience": 1, "rank_every": 1, "rank_patience": 1, "rank_rows": 2}
        check_least(self, "phase1", at_least)


@dataclass
class Phase2Config(FromBase):
    """How tokens are predicted from contexts that stay as they are.

    Args:
        epochs: most passes over the cache.
        patience: epochs without improvement that end the training.
        min_improvement: of the validation perplexity.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        gradient_clip: largest norm of gradients.
        batch_size: positions of a batch (null: what fits the device's free memory).
        freeze_embedding: the embedding, and by tying the head, stays as it is.
        seed: of the order of positions.
    """

    epochs: int = 40
    patience: int = 3
    min_improvement: float = 0.4
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    batch_size: int | None = 512
    freeze_embedding: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for values out of range."""
        check_least(self, "phase2", {"epochs": 1, "patience": 1, "batch_size": 1, "gradient_clip": 0})


@dataclass
class CvfptConfig:
    """How repetitions are trained.

    Args:
        max_stage: stages, of as many words a phrase.
        epochs_per_stage: passes over a stage's phrases.
        repetitions: of a phrase in a sequence.
        max_length: tokens of a sequence at most.
        batch_size: sequences of a batch.
        learning_rate: of Adam.
        convergence_weight: of the distance of contexts one cycle apart.
        token_weight: of the next token's loss. At 0 a context that never moves is a solution.
        gradient_clip: largest norm of gradients.
        seed: of weights and order.
    """

    max_stage: int = 3
    epochs_per_stage: int = 10
    repetitions: int = 100
    max_length: int = 512
    batch_size: int = 8
    learning_rate: float = 1e-3
    convergence_weight: float = 1.0
    token_weight: float = 0.01
    gradient_clip: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for values out of range, and for a token weight that lets contexts die."""
        if self.token_weight <= 0:
            raise ValueError(
                f"token_weight must be above 0, got {self.token_weight}: without the next token's loss a "
                "context that never moves is a solution"
            )
        if self.repetitions < 2 or self.batch_size < 1 or self.max_stage < 1 or self.epochs_per_stage < 1:
            raise ValueError(
                "repetitions must be at least 2, batch_size, max_stage and epochs_per_stage at least 1"
            )
