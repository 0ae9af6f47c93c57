"""``newllm train cvfpt``: repetition training, with its validation suite beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from newllm.training.phase_config import CvfptConfig


@dataclass(kw_only=True)
class CvfptOptions:
    """Train contexts to repeat with repeated phrases, stage by stage, and judge them by four patterns.

    The suite trains fresh models of both updaters on a phrase of one, two and three ids, five seeds each, and
    reads a random sequence with them; medians count. Leaves last/, stage_1/ and so on, metrics.jsonl,
    results.json, suite.png, losses.png and, with top_k, cvfpt_performance_topk_fair.json (or _biased) and
    top_k.png.

    Args:
        data: text that a tokenizer is made from, where one is.
        offline: auto lets a stand-in take the place of a dataset out of reach, and says so; error does not.
        tokenizer: bytes, bpe:SIZE, words:SIZE, a folder or a hub id.
        phrases: phrases of token ids instead of the stages' words, one stage of them.
        cell: updater of the trained model.
        context_dim: numbers of a context.
        embed_dim: width of embeddings.
        hidden_dim: width of the layers.
        layers: of them.
        suite: measure the validation suite.
        top_k: single token ids that are measured from the first on (0: none).
        fair: one model for all of them, in turns; otherwise a new one for each.
        top_k_epochs: passes over each.
        out: folder of the run.
        overwrite: replace the model that lies there.
        cvfpt: how repetitions are trained.
    """

    data: str = "embedded"
    offline: Literal["auto", "error"] = "auto"
    tokenizer: str = "bpe:2048"
    phrases: list[list[int]] | None = None
    cell: Literal["gated", "simple"] = "gated"
    context_dim: int = 256
    embed_dim: int = 256
    hidden_dim: int = 512
    layers: int = 2
    suite: bool = True
    top_k: int = 0
    fair: bool = True
    top_k_epochs: int = 10
    out: str = "runs/cvfpt"
    overwrite: bool = False
    cvfpt: CvfptConfig = field(default_factory=CvfptConfig)


def run_cvfpt(options: CvfptOptions) -> int:
    """Train, judge, draw, print; 1 where the suite's verdicts are not those of the two updaters."""
    from newllm.cli.loading import quiet
    from newllm.models.files import check_free, save_model
    from newllm.runs import Run
    from newllm.training.cvfpt import train_repetition
    from newllm.training.cvfpt_checks import small_model

    quiet()
    last = Path(options.out) / "last"
    check_free(last, options.overwrite)
    tokenizer, stages = _stages(options)
    model = small_model(
        len(tokenizer), cell=options.cell, seed=options.cvfpt.seed, context_dim=options.context_dim,
        embed_dim=options.embed_dim, hidden_dim=options.hidden_dim, num_hidden_layers=options.layers,
    )  # fmt: skip
    run = Run(options.out, asdict(options), seed=options.cvfpt.seed)

    def log(row: dict[str, Any]) -> None:
        run.log(**row)
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))

    def keep(stage: int, _: list[Any]) -> None:
        save_model(model, tokenizer, run.out / f"stage_{stage}", overwrite=True)

    found = train_repetition(model, stages, options.cvfpt, log=log, after_stage=keep)
    save_model(model, tokenizer, last, overwrite=options.overwrite)
    results: dict[str, Any] = {"stages": [_stage(stages[n], rows) for n, rows in enumerate(found)]}
    for number, stage in enumerate(results["stages"], 1):
        print(
            f"stage {number}: {stage['converged']}/{len(stage['phrases'])} phrases below 0.01, "
            f"loss at most {stage['largest_loss']:.3g}"
        )
    right = _suite(options, run, results) if options.suite else True
    if options.top_k:
        _top_k(options, run, results, len(tokenizer))
    _losses(run)
    run.result("results.json", results)
    print(f"the model is in {last}; everything else in {run.out}")
    return 0 if right else 1


def _stages(options: CvfptOptions) -> tuple[Any, list[list[list[int]]]]:
    """The tokenizer and every stage's phrases of ids."""
    from newllm.training.assemble import chosen_tokenizer, read_corpus
    from newllm.training.config import SourceConfig
    from newllm.training.cvfpt import stage_phrases

    corpus = read_corpus(options.data, SourceConfig(), offline=options.offline)
    print(corpus.said())
    tokenizer = chosen_tokenizer(options.tokenizer, corpus)
    if options.phrases is None:
        return tokenizer, stage_phrases(tokenizer, options.cvfpt.max_stage)
    outside = [i for phrase in options.phrases for i in phrase if not 0 <= i < len(tokenizer)]
    if outside or not options.phrases:
        got = f"got {outside[0]}" if outside else "got no phrase"
        raise ValueError(f"phrases must hold ids from 0 to {len(tokenizer) - 1}, {got}")
    return tokenizer, [options.phrases]


def _stage(phrases: list[list[int]], rows: list[Any]) -> dict[str, Any]:
    return {
        "converged": sum(row.converged for row in rows),
        "largest_loss": max(row.loss for row in rows),
        "phrases": [
            {"ids": ids, **row._asdict(), "converged": row.converged}
            for ids, row in zip(phrases, rows, strict=True)
        ],
    }


def _suite(options: CvfptOptions, run: Any, results: dict[str, Any]) -> bool:
    """Both updaters on the four patterns: whether the gated one passes and the simple one fails."""
    from newllm.evaluation.context_plots import bars_figure
    from newllm.training.cvfpt_checks import validation_suite, verdict

    passed, table = {}, {}
    drawn: dict[str, dict[str, float]] = {}
    for cell in ("gated", "simple"):
        found = validation_suite(cell=cell, seed=options.cvfpt.seed)
        passed[cell] = verdict(found)
        table[cell] = {
            name: {"still": row.still._asdict(), "cycle": row.cycle._asdict(), "losses": row.losses}
            for name, row in found.items()
        }
        for name, row in found.items():
            drawn.setdefault(name, {})[cell] = row.still.loss
            print(
                f"{cell}, {name}: moves by {row.still.loss:.3g} a token "
                f"({'below' if row.still.converged else 'not below'} 0.01; "
                f"{row.losses[0]:.3g} to {row.losses[-1]:.3g} over {len(row.losses)} seeds), "
                f"{row.cycle.loss:.3g} from one phrase to the next"
            )
        print(f"{cell}: {'passes' if passed[cell] else 'fails'}")
    results["suite"] = {"passed": passed, "losses": table}
    label = "mean squared change of the context in a token"
    run.plot("suite.png", bars_figure(drawn, bound=0.01, label=label))
    return passed["gated"] and not passed["simple"]


def _top_k(options: CvfptOptions, run: Any, results: dict[str, Any], vocabulary: int) -> None:
    from newllm.evaluation.context_plots import lines_figure
    from newllm.training.cvfpt_checks import small_model, top_k

    if options.top_k > vocabulary:
        raise ValueError(f"top_k must be at most the vocabulary of {vocabulary}, got {options.top_k}")

    def make() -> Any:
        return small_model(vocabulary, cell=options.cell, seed=options.cvfpt.seed)

    found = top_k(make, range(options.top_k), options.cvfpt, epochs=options.top_k_epochs, fair=options.fair)
    run.result(f"cvfpt_performance_topk_{found['mode']}.json", found)
    results["top_k"] = {"mode": found["mode"], "converged": found["converged"], "tokens": options.top_k}
    print(f"top {options.top_k}, {found['mode']}: {found['converged']}/{options.top_k} below 0.01")
    lines = {f"token {row['token']}": list(enumerate(row["losses"])) for row in found["tokens"][:6]}
    run.plot("top_k.png", lines_figure(lines, x="epoch", y="convergence loss", log="y"))


def _losses(run: Any) -> None:
    from newllm.evaluation.context_plots import lines_figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for place, row in enumerate(run.rows(), 1):
        for name in ("convergence_loss", "token_loss"):
            lines.setdefault(f"stage {row['stage']}, {name.replace('_', ' ')}", []).append((place, row[name]))
    run.plot("losses.png", lines_figure(lines, x="epoch over all stages", y="loss", log="y", marker="."))
