"""``newllm diagnose``: what the contexts of a model do, what a memory holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from newllm.cli import Command
from newllm.cli.diagnose_capacity import CapacityOptions, run as run_capacity
from newllm.data.sources import Offline

_FIRST_ID, _LAST_ID = 100, 5000


@dataclass
class AttractorOptions:
    """Do the contexts of repeated tokens stay apart, or do all end at one point?

    Without a model, two small ones are trained on ten tokens, with the gated and the simple updater, and
    asked about fifty others. Leaves results.json, points.npz and attractor.png.

    Args:
        model: folder of a context language model (null: train the pair).
        quick: train one pair of models instead of three.
        tokens: token ids that are repeated.
        repetitions: of each.
        seed: of the ids, and of the first pair.
        out: folder of the results.
    """

    model: str | None = None
    quick: bool = False
    tokens: int = 50
    repetitions: int = 10
    seed: int = 42
    out: str = "runs/diagnose-attractor"


@dataclass
class FixedPointOptions:
    """The context after one reading of a token beside that after many.

    Leaves results.json, report.md, contexts.npz, fixed_points.png and fixed_points_detail.png.

    Args:
        model: folder of a context language model.
        tokens: token ids that are repeated.
        repetitions: of each.
        seed: of the ids.
        out: folder of the results.
    """

    model: str
    tokens: int = 100
    repetitions: int = 50
    seed: int = 42
    out: str = "runs/diagnose-fixed-point"


@dataclass
class StreamOptions:
    """Options of the checks that read a text.

    Args:
        model: folder of a context_lm or context_kv model.
        data: what to read: a name (see newllm data sources), a file or a folder.
        offline: auto lets a stand-in take the place of a dataset out of reach, and says so; error does not.
        tokens: most tokens of each set.
        seed: of what is drawn.
        out: folder of the results (null: runs/diagnose-<check>).
    """

    model: str
    data: str = "embedded"
    offline: Offline = "auto"
    tokens: int = 10000
    seed: int = 42
    out: str | None = None


def run_attractor(options: AttractorOptions) -> None:
    """Train or load, measure, draw, print."""
    import numpy as np
    import torch

    from newllm.evaluation.attractor import global_attractor, repeated_contexts
    from newllm.evaluation.context_plots import attractor_figure
    from newllm.runs import Run
    from newllm.training.cvfpt_checks import updater_pair

    if options.model is None:
        seeds = range(options.seed, options.seed + (1 if options.quick else 3))
        models = {
            f"{cell}, seed {seed}": updater_pair(cell, seed=seed)
            for seed in seeds
            for cell in ("simple", "gated")
        }
    else:
        one = _load(options.model, recurrent=False)[0]
        models = {Path(options.model).name: (one, _drawn(one, options.tokens, options.seed))}
    run = Run(options.out, asdict(options), seed=options.seed)
    rows, points = [], {}
    for name, (model, ids) in models.items():
        chosen = ids[: options.tokens].tolist()
        found = global_attractor(model, chosen, repetitions=options.repetitions)
        points[name] = repeated_contexts(model, chosen, options.repetitions)[:, -1].double()
        rows.append({"model": name, "tokens": len(chosen), **found._asdict()})
        run.log(**rows[-1])
        print(
            f"{name}: pairwise L2 mean {found.mean:.6f}, std {found.std:.6f}, from {found.least:.6f} to "
            f"{found.most:.6f}; {found.dead}/{found.width} dimensions with a variance below 0.001: "
            f"{found.verdict}"
        )
    _save_arrays(run.out / "points.npz", {name: one.numpy() for name, one in points.items()})
    tables = {name: torch.cdist(one, one).numpy() for name, one in points.items()}
    drawn = {name: np.asarray(one) for name, one in points.items()}
    picture = run.plot("attractor.png", attractor_figure(tables, drawn))
    print(f"{run.result('results.json', rows)} and {picture}")


def run_fixed_point(options: FixedPointOptions) -> None:
    """Repeat, compare, draw, print."""
    from newllm.evaluation.attractor import fixed_points, repeated_contexts
    from newllm.evaluation.context_plots import fixed_point_detail, fixed_point_figure
    from newllm.evaluation.context_report import fixed_point_report
    from newllm.runs import Run

    model = _load(options.model, recurrent=False)[0]
    ids = _drawn(model, options.tokens, options.seed).tolist()
    rows = fixed_points(model, ids, repetitions=options.repetitions)
    paths = repeated_contexts(model, ids, options.repetitions).double().numpy()
    run = Run(options.out, asdict(options), seed=options.seed)
    run.result("results.json", rows)
    _save_arrays(run.out / "contexts.npz", {"tokens": ids, "contexts": paths})
    run.plot("fixed_points.png", fixed_point_figure(rows))
    run.plot("fixed_points_detail.png", fixed_point_detail(paths, rows))
    report = fixed_point_report(rows, options.repetitions)
    run.text("report.md", report)
    print(report)
    print(f"everything is in {run.out}")


def run_rank(options: StreamOptions) -> None:
    """Effective ranks of training and validation contexts, raw and centred."""
    import torch

    from newllm.evaluation.context_plots import rank_figure

    model, sets, run = _prepared(options, "rank")
    from newllm.modules.context_health import effective_rank

    rows, spectra = [], {}
    for which, contexts, _, one in _swept(model, sets):
        for centred in (False, True):
            shown = contexts - contexts.mean(0) if centred else contexts
            found = effective_rank(shown, seed=options.seed)
            rows.append({"set": which, "recurrence": one.name, "centred": centred, **found._asdict()})
            print(
                f"{which}, {one.name}{', centred' if centred else ''}: effective rank {found.value:.2f}/"
                f"{found.width} ({100 * found.share:.1f} %) of {found.rows:,} contexts, "
                f"{found.rank} singular values above 1e-6"
            )
        spectra[f"{which}, {one.name}"] = torch.linalg.svdvals(contexts[:10000].double()).numpy()
    picture = run.plot("rank.png", rank_figure(spectra))
    print(f"{run.result('results.json', rows)} and {picture}")


def run_identity(options: StreamOptions) -> int:
    """Both identity checks; 1 where one of them fires."""
    from newllm.evaluation.context_checks import context_identity, mapping_identity

    model, sets, run = _prepared(options, "identity")
    rows: list[dict[str, Any]] = []
    for which, contexts, x, one in _swept(model, sets):
        found = context_identity(contexts, x)
        rows.append({"check": "contexts", "set": which, "recurrence": one.name, **found._asdict()})
        similar = "not comparable" if found.embed_similarity is None else f"{found.embed_similarity:.4f}"
        print(
            f"{which}, {one.name}: mean norm {found.norm:.4f}, mean deviation {found.deviation:.4f}, cosine "
            f"with embeddings {similar}: {_fired(found.dead, 'dead')}, {_fired(found.copied, 'copied')}"
        )
        if which == "train":
            cosines = mapping_identity(one, seed=options.seed)
            rows.append({"check": "mapping", "recurrence": one.name, **cosines._asdict()})
            print(
                f"{one.name}: cosine of contexts before and after a token, mean {cosines.mean:.4f}, from "
                f"{cosines.least:.4f} to {cosines.most:.4f}, {cosines.above}/{cosines.pairs} above 0.95: "
                f"{_fired(cosines.identity, 'identity')}"
            )
    print(run.result("results.json", rows))
    return int(any(row.get("dead") or row.get("copied") or row.get("identity") for row in rows))


def run_convergence(options: StreamOptions) -> None:
    """Repeated passes with the state carried over, two starts, and the verdict by trend."""
    from newllm.evaluation.context_checks import pass_convergence, validation_trials
    from newllm.evaluation.context_plots import convergence_figure
    from newllm.evaluation.context_report import convergence_report

    model, sets, run = _prepared(options, "convergence")
    rows, drawn = [], {}
    for which, _, x, one in _swept(model, sets):
        name = f"{which}, {one.name}"
        found = pass_convergence(one, x, seed=options.seed)
        trials = validation_trials(one, x)
        drawn[name] = found
        rows.append({"set": which, "recurrence": one.name, **found._asdict(), "trials": trials._asdict()})
        print(convergence_report(name, found))
        reduced = "" if trials.reduction is None else f", reduced by {trials.reduction:.1f} %"
        print(
            f"{name}: losses of {len(trials.losses) + 1} trials from {trials.initial:.3g} to "
            f"{trials.final:.3g}{reduced}, slope {trials.slope:.3g}: {trials.verdict}"
        )
    picture = run.plot("convergence.png", convergence_figure(drawn))
    print(f"{run.result('results.json', rows)} and {picture}")


def _fired(fired: bool, name: str) -> str:
    return name if fired else f"not {name}"


def _load(path: str, *, recurrent: bool = True) -> tuple[Any, Any]:
    """A context model and its tokenizer; one with single contexts where ``recurrent`` is False."""
    from newllm.cli.loading import quiet
    from newllm.hub import model_folder
    from newllm.models.files import load_model, load_tokenizer

    quiet()
    folder = model_folder(path)
    model = load_model(folder).eval()
    kinds = ("context_lm", "context_kv")
    if model.config.model_type not in kinds:
        raise ValueError(f"model must be a context_lm or context_kv, got {model.config.model_type!r}")
    return model, load_tokenizer(folder) if recurrent else None


def _drawn(model: Any, count: int, seed: int) -> Any:
    """Random ids from 100 to 4999, or of all where the vocabulary is small: ``[n]``."""
    import torch

    size = model.config.vocab_size
    first = _FIRST_ID if size >= 2 * _FIRST_ID else 0
    last = min(size, _LAST_ID)
    generator = torch.Generator().manual_seed(seed)
    return first + torch.randperm(last - first, generator=generator)[:count]


def _prepared(options: StreamOptions, check: str) -> tuple[Any, dict[str, Any], Any]:
    """The model, ids ``[N]`` of both sets, and the run's folder."""
    import torch

    from newllm.data.token_cache import cached_tokens
    from newllm.runs import Run
    from newllm.training.assemble import read_corpus
    from newllm.training.config import SourceConfig

    model, tokenizer = _load(options.model)
    corpus = read_corpus(options.data, SourceConfig(), offline=options.offline)
    print(corpus.said())
    sets = {
        name: torch.from_numpy(cached_tokens(part, tokenizer).ids[: options.tokens].astype("int64"))
        for name, part in (("train", corpus.train), ("validation", corpus.validation))
    }
    out = options.out or f"runs/diagnose-{check}"
    return model, sets, Run(out, {**asdict(options), "data_read": corpus.record()}, seed=options.seed)


def _swept(model: Any, sets: dict[str, Any]) -> Any:
    """For both sets and every recurrence: the set's name, contexts ``[N, C]``, inputs ``[N, E]``, itself."""
    import torch

    from newllm.evaluation.context_checks import recurrences

    for which, ids in sets.items():
        for one in recurrences(model):
            with torch.no_grad():
                x = one.inputs(ids)
                yield which, one.sweep(x[None], None)[0][0], x, one


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    from newllm.files import replace_file

    def write(place: Path) -> None:
        with place.open("wb") as file:
            np.savez_compressed(file, **arrays)

    replace_file(path, write)


def _check(name: str, what: str) -> type[StreamOptions]:
    """The options under the check's own description."""
    arguments = (StreamOptions.__doc__ or "").partition("Args:")[2]
    kind = type(f"{name.title()}Options", (StreamOptions,), {"__doc__": f"{what}\n\n    Args:{arguments}"})
    return dataclass(kind)


COMMANDS = {
    "capacity": Command(CapacityOptions, run_capacity),
    "attractor": Command(AttractorOptions, run_attractor),
    "rank": Command(_check("rank", "How much of their space the contexts of a text use."), run_rank),
    "identity": Command(
        _check("identity", "Are the contexts of a text all alike, or copies of what went in?"), run_identity
    ),
    "convergence": Command(
        _check("convergence", "How fast contexts forget where they began, over passes of a text."),
        run_convergence,
    ),
    "fixed-point": Command(FixedPointOptions, run_fixed_point),
}
