"""Numeric reports of context models: counts and percentages, of training and validation, no adjectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from newllm.evaluation.context_checks import PassConvergence

Figures = Mapping[str, Any]
_SETS = ("train", "validation")
_CONTEXT_HEAD = ("contexts", "set", "converged", "effective rank", "CVFP loss", "final diff", "horizon")
_TOKEN_HEAD = ("model", "set", "loss", "perplexity", "accuracy", "best epoch")
_SUMMED = ("l2", "cosine", "angle", "norm_once", "norm_fixed", "magnitude", "direction", "last_change")


def phase_report(results: Figures) -> str:
    """The documents' report of a run of both phases, each figure beside its control's.

    ``results`` is ``results.json`` of ``newllm train context``. 0.0 % converged means that the sweeps ran to
    their end, not that they failed.
    """
    lines = ["Phase 1"]
    for number, phase in enumerate(results["trained"]["phase_one"]):
        lines.append(
            f"  block {number}: iterations {phase['sweeps']}/{phase['most_sweeps']}, "
            f"stopped by {phase['stopped']}, {phase['seconds']:.1f} s, converged in training "
            f"{_share(phase['converged'], phase['positions'])}"
        )
    models = {"trained": results["trained"], "untrained": results["untrained_contexts"]}
    lines += ["", *_table(_CONTEXT_HEAD, list(_context_rows(models))), "", "Phase 2"]
    lines += _table(_TOKEN_HEAD, list(_token_rows(models, results["ngram"])))
    return "\n".join(lines) + "\n"


def _context_rows(models: Mapping[str, Figures]) -> Any:
    for name, figures in models.items():
        for which in _SETS:
            for rank, check in zip(figures[f"{which}_rank"], figures[f"{which}_check"], strict=True):
                yield (
                    name,
                    which,
                    _share(check["converged"], check["positions"]),
                    f"{rank['value']:.2f}/{rank['width']} ({100 * rank['share']:.1f} %, n {rank['rows']:,})",
                    f"{check['cvfp_loss']:.6f}",
                    f"{check['final_difference']:.6f}",
                    f"{check['horizon']}" if check["horizon"] else "none",
                )


def _token_rows(models: Mapping[str, Figures], ngram: Figures) -> Any:
    for name, figures in models.items():
        epochs = f"{figures['best_epoch']}/{figures['epochs']}"
        for which in _SETS:
            yield (f"{name} contexts", which, *_scores(figures[which]), epochs)
    for which in _SETS[1:]:
        yield (f"{ngram['order']}-gram", which, *_scores(ngram[which]), "-")


def _scores(figures: Figures) -> tuple[str, str, str]:
    accuracy = 100 * figures["accuracy"]
    return f"{figures['loss']:.4f}", f"{figures['perplexity']:.3f}", f"{accuracy:.2f} %"


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} % ({count:,}/{total:,})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def fixed_point_report(rows: Sequence[Figures], repetitions: int) -> str:
    """Markdown: means and spreads over the rows of ``attractor.fixed_points``, and shares of L2 squared."""
    lines = [
        "# One reading of a token beside its fixed point", "",
        f"{len(rows)} tokens, each read {repetitions} times.", "",
        "| | mean | least | most |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for name in _SUMMED:
        values = [row[name] for row in rows]
        mean = sum(values) / len(values)
        lines.append(f"| {name.replace('_', ' ')} | {mean:.6g} | {min(values):.6g} | {max(values):.6g} |")
    whole = sum(row["l2"] ** 2 for row in rows)
    arrived = [row["steps"] for row in rows if row["steps"] is not None]
    for name in ("direction", "magnitude"):
        part = 100 * sum(row[name] ** 2 for row in rows) / whole if whole else 0.0
        lines.append(f"| {name}'s share of L2 squared | {part:.2f} % | | |")
    lines.append("")
    if arrived:
        lines.append(
            f"Consecutive states come within a twentieth of their first distance after "
            f"{sum(arrived) / len(arrived):.1f} readings on average ({len(arrived)} of {len(rows)} tokens)."
        )
    else:
        lines.append(
            f"For none of {len(rows)} tokens do consecutive states come within a twentieth of their first "
            f"distance in {repetitions} readings."
        )
    return "\n".join(lines) + "\n"


def convergence_report(name: str, found: PassConvergence) -> str:
    """One recurrence's passes: what each changed, the verdict, the profile's ends, the horizon."""
    differences = ", ".join(f"{value:.3g}" for value in found.differences)
    first, last = found.profile[0], found.profile[-1]
    reach = f"{found.horizon} tokens" if found.horizon else f"more than {len(found.two_starts)} tokens"
    return (
        f"{name}: mean changes of passes 2 to {len(found.differences) + 1}: {differences} ({found.verdict}); "
        f"second pass at position 1 {first:.3g}, at position {len(found.profile)} {last:.3g}; "
        f"two starts agree to 0.001 after {reach}"
    )
