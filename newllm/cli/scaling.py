"""``newllm scaling``: the two-phase models over sizes of data, architectures and diversity losses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from newllm.cli import Command
from newllm.training.config import SourceConfig
from newllm.training.phase_config import Phase1Config, Phase2Config


@dataclass(kw_only=True)
class ScalingOptions:
    """What all comparisons are asked.

    Args:
        data: what to train on: a name (see newllm data sources), a file or a folder.
        offline: auto lets a stand-in take the place of a dataset out of reach, and says so; error does not.
        tokenizer: bytes, bpe:SIZE, words:SIZE, a folder or a hub id.
        validation_tokens: most validation tokens.
        embed_dim: width of embeddings.
        seeds: one run for each, of weights, noise and order.
        control: measure contexts without phase 1 too.
        output_dir: folder of the results.
        source: which documents are read.
        phase1: how contexts are trained.
        phase2: how tokens are predicted from them.
    """

    data: str = "embedded"
    offline: Literal["auto", "error"] = "auto"
    tokenizer: str = "bpe:1024"
    validation_tokens: int = 10000
    embed_dim: int = 768
    seeds: list[int] = field(default_factory=lambda: [42])
    control: bool = False
    output_dir: str
    source: SourceConfig = field(default_factory=SourceConfig)
    phase1: Phase1Config = field(default_factory=Phase1Config)
    phase2: Phase2Config = field(default_factory=Phase2Config)


@dataclass(kw_only=True)
class AlphaOptions(ScalingOptions):
    """The exponent of perplexity by tokens, in sliding windows over growing numbers of documents.

    Leaves alpha_progression.json, summary.json, detailed_results.json, metadata.json, a results.json for each
    architecture, and alpha.png.

    Args:
        num_layers: layers of both blocks.
        context_dim: numbers of a context (null: embed_dim).
        num_input_tokens: embeddings that a token brings.
        init_samples: documents of the smallest run.
        multiplier: of documents from run to run.
        window_size: runs that a fit takes.
        num_windows: fits.
    """

    num_layers: int = 1
    context_dim: int | None = None
    num_input_tokens: int = 1
    init_samples: int = 50
    multiplier: float = 2.0
    window_size: int = 4
    num_windows: int = 2
    output_dir: str = "runs/scaling-alpha"


@dataclass(kw_only=True)
class ArchitecturesOptions(ScalingOptions):
    """Architectures side by side, over numbers of documents: the documents' five, or a matrix.

    Leaves the files of alpha, with architectures.png.

    Args:
        names: of baseline, two_tokens, wide, deep and shallow_wide; their widths follow embed_dim.
        layers: numbers of layers of a matrix (empty: no matrix, the names above).
        context_dims: its context widths. input_tokens: its input tokens.
        samples: documents of each run.
    """

    names: list[str] = field(
        default_factory=lambda: ["baseline", "two_tokens", "wide", "deep", "shallow_wide"]
    )
    layers: list[int] = field(default_factory=list)
    context_dims: list[int] = field(default_factory=lambda: [768])
    input_tokens: list[int] = field(default_factory=lambda: [1, 2])
    samples: list[int] = field(default_factory=lambda: [50, 100, 200, 500])
    output_dir: str = "runs/scaling-architectures"


@dataclass(kw_only=True)
class DiversityOptions(ScalingOptions):
    """Diversity losses side by side at one batch size, by ranks of phase 1 and perplexities of phase 2.

    Leaves the files of alpha, with diversity.png.

    Args:
        losses: of oacd, mcdl, odcm, w_mse, sdl and nuc.
        context_dim: numbers of a context.
        samples: documents of each run.
    """

    losses: list[str] = field(default_factory=lambda: ["oacd", "mcdl", "odcm"])
    context_dim: int = 500
    samples: list[int] = field(default_factory=lambda: [50, 100, 200, 500])
    output_dir: str = "runs/scaling-diversity"


def run_alpha(options: AlphaOptions) -> None:
    """All sizes, then the windows."""
    from newllm.evaluation.scaling import sample_sizes
    from newllm.training.experiments import Architecture

    sizes = sample_sizes(options.init_samples, options.multiplier, options.window_size, options.num_windows)
    width = options.context_dim or options.embed_dim
    shape = Architecture(options.num_layers, width, options.num_input_tokens, options.embed_dim)
    _compare(options, {shape.name: (shape, {})}, sizes, options.window_size, "alpha.png")


def run_architectures(options: ArchitecturesOptions) -> None:
    """All architectures at all sizes."""
    from newllm.training.experiments import ARCHITECTURES, matrix, scaled

    unknown = [name for name in options.names if name not in ARCHITECTURES]
    if unknown and not options.layers:
        raise ValueError(f"names must be of {', '.join(ARCHITECTURES)}, got {unknown[0]!r}")
    chosen: dict[str, Any]
    if options.layers:
        made = matrix(options.layers, options.context_dims, options.input_tokens, options.embed_dim)
        chosen = {one.name: (one, {}) for one in made}
    else:
        chosen = {name: (scaled(ARCHITECTURES[name], options.embed_dim), {}) for name in options.names}
    _compare(options, chosen, options.samples, len(options.samples), "architectures.png")


def run_diversity(options: DiversityOptions) -> None:
    """All losses at all sizes, with what a loss costs."""
    from newllm.training.diversity import diversity_loss
    from newllm.training.experiments import Architecture

    for name in options.losses:
        diversity_loss(name)
    shape = Architecture(1, options.context_dim, 1, options.embed_dim)
    chosen = {name: (shape, {"diversity": name}) for name in options.losses}
    costs = {name: _cost(name, options.context_dim, options.phase1.batch_size) for name in options.losses}
    _compare(options, chosen, options.samples, len(options.samples), "diversity.png", {"loss_ms": costs})


def _cost(name: str, width: int, rows: int) -> float:
    """Milliseconds of a diversity loss and its gradient, the least of three."""
    import torch

    from newllm.backend import training_device
    from newllm.training.diversity import diversity_loss

    x = torch.randn(rows, width, device=training_device(), requires_grad=True)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        float(torch.autograd.grad(diversity_loss(name)(x), x)[0].sum())
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


def _compare(
    options: ScalingOptions,
    chosen: dict[str, Any],
    samples: Sequence[int],
    window_size: int,
    picture: str,
    facts: dict[str, Any] | None = None,
) -> None:
    """Run everything, and write, draw and print what came out."""
    from newllm.cli.loading import quiet
    from newllm.runs import Run, provenance
    from newllm.training.experiments import DataConfig, ExperimentRunner, calculate_params

    quiet()
    data = DataConfig.from_base(options)
    run = Run(options.output_dir, asdict(options), seed=options.seeds[0])
    runner = ExperimentRunner(
        data,
        Phase1Config.from_base(options.phase1),
        Phase2Config.from_base(options.phase2),
        control=options.control,
        log=lambda row: run.log(**row),
    )
    print(runner.corpus.said())
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, row in _runs(runner, chosen, samples, options.seeds):
        rows.setdefault(name, []).append(row)
        print(_told(name, row), flush=True)
    summaries = {name: _summary(name, group, window_size) for name, group in rows.items()}
    for name, group in rows.items():
        (run.out / name).mkdir(exist_ok=True)
        run.result(f"{name}/results.json", group)
    run.result("detailed_results.json", [row for group in rows.values() for row in group])
    run.result("alpha_progression.json", [one["progression"] for one in summaries.values()])
    run.result("summary.json", {name: one["summary"] for name, one in summaries.items()})
    sizes = {name: calculate_params(shape, len(runner.tokenizer)) for name, (shape, _) in chosen.items()}
    run.result(
        "metadata.json",
        {
            "samples": list(samples), "seeds": options.seeds, "window_size": window_size,
            "parameters": sizes, "data_read": runner.corpus.record(),
            **(facts or {}), "provenance": provenance(options.seeds[0]),
        },
    )  # fmt: skip
    _show(run, rows, summaries, picture)


def _runs(
    runner: Any, chosen: dict[str, Any], samples: Sequence[int], seeds: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each run's row; one that could not be carried out has its reason and no perplexity."""
    for name, (shape, phase1) in chosen.items():
        for count in samples:
            for seed in seeds:
                try:
                    row = runner.run(shape, count, phase1=phase1, seed=seed)
                except (RuntimeError, ValueError) as error:
                    said = " ".join(str(error).split())
                    row = {"num_samples": count, "seed": seed, **_nothing(shape), "failed": said}
                yield name, {**row, "name": name, **phase1}


def _nothing(shape: Any) -> dict[str, Any]:
    fields = {key: value for key, value in shape._asdict().items() if key != "embed_dim"}
    return {"config_name": shape.name, **fields, "train_tokens": None, "val_ppl": None}


def _summary(name: str, rows: list[dict[str, Any]], window_size: int) -> dict[str, Any]:
    """The windows of one architecture and what they come to; several seeds are averaged in ln PPL."""
    from newllm.evaluation.scaling import alpha_windows, power_law, saturation, trend

    means = _over_seeds(rows)
    windows = alpha_windows(means, window_size)
    points = [(row["train_tokens"], row["val_ppl"]) for row in means if row["val_ppl"] is not None]
    law, floor = power_law(points), saturation(points)
    shape = {key: rows[0][key] for key in ("num_input_tokens", "num_layers", "context_dim")}
    missing = [row["num_samples"] for row in means if row["val_ppl"] is None]
    return {
        "progression": {"config_name": name, **shape, "window_size": window_size, "windows": windows},
        "summary": {
            "runs": len(rows),
            "failed": [_failure(row) for row in rows if "failed" in row],
            "missing_samples": missing,
            "power_law": None if law is None else law._asdict(),
            "saturation": None if floor is None else floor._asdict(),
            "points": len(points),
            **trend(windows),
            "means": means,
        },
    }


def _over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each number of documents: means over seeds, and the spread of perplexity."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["num_samples"], []).append(row)
    made = []
    for samples, group in groups.items():
        good = [row for row in group if row["val_ppl"] is not None and math.isfinite(row["val_ppl"])]
        logs = [math.log(row["val_ppl"]) for row in good]
        made.append(
            {
                "num_samples": samples,
                "train_tokens": good[0]["train_tokens"] if good else None,
                "val_ppl": math.exp(sum(logs) / len(logs)) if good else None,
                "val_ppl_range": [min(map(math.exp, logs)), max(map(math.exp, logs))] if good else None,
                **_means(good),
                "seeds": len(good),
            }
        )
    return made


def _failure(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("num_samples", "seed", "failed")}


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("val_acc", "val_effective_rank", "untrained_val_ppl", "phase1_iterations")
    present = [key for key in keys if rows and key in rows[0]]
    return {key: sum(row[key] for row in rows) / len(rows) for key in present}


def _told(name: str, row: dict[str, Any]) -> str:
    head = f"{name}, {row['num_samples']} samples, seed {row['seed']}: "
    if "failed" in row:
        return f"{head}failed: {row['failed']}"
    other = f", untrained {row['untrained_val_ppl']:.3f}" if "untrained_val_ppl" in row else ""
    return (
        f"{head}{row['train_tokens']:,} tokens, validation perplexity {row['val_ppl']:.3f}{other}, accuracy "
        f"{100 * row['val_acc']:.2f} %, effective rank {100 * row['val_effective_rank']:.1f} %, "
        f"{row['phase1_iterations']} iterations ({row['phase1_stopped']}), best epoch {row['best_epoch']}"
    )


def _show(run: Any, rows: dict[str, Any], summaries: dict[str, Any], picture: str) -> None:
    from newllm.evaluation.context_plots import lines_figure

    lines = {}
    for name, one in summaries.items():
        for window in one["progression"]["windows"]:
            fit = window["note"] or (
                f"alpha {window['alpha']:.4f} +- {window['std_err']:.4f}, R2 {window['r_squared']:.4f}, "
                f"p {window['p_value']:.3g}"
            )
            print(f"{name}, window {window['window_index']}, samples {window['samples_in_window']}: {fit}")
        change = one["summary"]["change"]
        if change is not None:
            print(f"{name}: {one['summary']['trend']}, {change:+.4f} ({one['summary']['percent']:+.1f} %)")
        points = [
            (row["train_tokens"], row["val_ppl"])
            for row in one["summary"]["means"]
            if row["val_ppl"] is not None
        ]
        if points:
            lines[name] = points
    figure = lines_figure(lines, x="training tokens", y="validation perplexity", log="xy")
    print(f"{run.plot(picture, figure)} and everything else in {run.out}")


COMMANDS = {
    "alpha": Command(AlphaOptions, run_alpha),
    "architectures": Command(ArchitecturesOptions, run_architectures),
    "diversity": Command(DiversityOptions, run_diversity),
}
