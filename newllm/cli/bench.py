"""``newllm bench``: times of the operators beside what could be used instead."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from newllm.cli import Command
from newllm.measuring import SUITES

if TYPE_CHECKING:
    from newllm.measuring.rows import Row


# Suites that have a picture.
DRAWN = ("layer", "sweep")


@dataclass
class SuiteOptions:
    """Options of every suite.

    Args:
        peers: all, none, or names with commas: flex, fa4, sdpa, fla-linear, fla-delta, loop, compiled-loop,
            eager-loop, hoisted-loop, graph-loop, lstm, gru, hf-llama.
        shapes: only these of the suite's shapes, beside what is recorded of others (empty: all).
        variants: only these of newllm's own variants (empty: all).
        out: folder of the rows (null: benchmarks/results on a GPU, runs/bench on a CPU).
        device: cpu or cuda (null: the first accelerator, or else the CPU).
        seconds: time for the turns of each group (null: the suite's own).
        base: measure newllm's own rows at this git revision too, and show both.
        profile: time nothing; show each computation's kernels and the functions that call them.
        picture: where the picture of layer and sweep goes (null: beside the rows).
    """

    peers: str = "all"
    shapes: list[str] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)
    out: str | None = None
    device: str | None = None
    seconds: float | None = None
    base: str | None = None
    profile: bool = False
    picture: str | None = None


@dataclass
class ReportOptions:
    """Write the times that are on record into the README, and draw them.

    Args:
        results: folder of the rows.
        readme: file that holds the two markers.
        pictures: folder of the pictures.
    """

    results: str = "benchmarks/results"
    readme: str = "README.md"
    pictures: str = "docs"


def run_suite(suite: str, options: SuiteOptions) -> None:
    """Measure, write, draw and print; a red gate is a RuntimeError, before any number."""
    from rich.console import Console

    from newllm.measuring import run
    from newllm.measuring.profiling import profiles
    from newllm.measuring.revisions import comparison, rows_at
    from newllm.measuring.tables import grids, notes

    console = Console()
    if options.profile:
        for grid in profiles(
            suite,
            peers=options.peers,
            shapes=options.shapes,
            variants=options.variants,
            device=options.device,
        ):
            console.print(grid.rich())
        return
    report = run(
        suite,
        peers=options.peers,
        shapes=options.shapes,
        variants=options.variants,
        out=options.out,
        device=options.device,
        seconds=options.seconds,
        say=partial(console.print, highlight=False, markup=False, style="dim"),
    )
    for line in notes(report):
        console.print(line, highlight=False, markup=False)
    for grid in grids(report):
        console.print(grid.rich())
    if suite in DRAWN:
        picture = Path(options.picture or report.path.with_suffix(".png"))
        _draw(suite, picture, report.rows)
        console.print(f"{report.path} and {picture}", highlight=False)
    if options.base is not None:
        base = rows_at(options.base, suite, _words(options))
        console.print(comparison(report.rows, base, options.base).rich())


def _words(options: SuiteOptions) -> list[str]:
    """The options that another revision has to share, as words of its command line."""
    lists = {"--shapes": options.shapes, "--variants": options.variants}
    single = {"--device": options.device, "--seconds": options.seconds}
    return [
        *(f"{flag}={value}" for flag, values in lists.items() for value in values),
        *(f"{flag}={value}" for flag, value in single.items() if value is not None),
    ]


def run_report(options: ReportOptions) -> None:
    """Rewrite the README's block, and the pictures of the suites that have rows."""
    from newllm.measuring.report import update
    from newllm.measuring.rows import read_rows

    results = Path(options.results)
    update(Path(options.readme), results)
    print(options.readme)
    for suite in DRAWN:
        if (results / f"{suite}.jsonl").is_file():
            picture = Path(options.pictures) / f"bench-{suite}.png"
            _draw(suite, picture, read_rows(results / f"{suite}.jsonl"))
            print(picture)


def _draw(suite: str, path: Path, rows: list[Row]) -> None:
    from newllm.files import replace_file
    from newllm.measuring.pictures import layer_figure
    from newllm.measuring.sweep_pictures import sweep_figure

    figure = {"layer": layer_figure, "sweep": sweep_figure}[suite](rows)
    replace_file(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def _options(suite: str, what: str) -> type[SuiteOptions]:
    """The options under the suite's own description."""
    arguments = (SuiteOptions.__doc__ or "").partition("Args:")[2]
    text = f"Time {what}.\n\n    Args:{arguments}"
    return dataclass(type(f"{suite.title()}Options", (SuiteOptions,), {"__doc__": text}))


COMMANDS = {
    **{suite: Command(_options(suite, what), partial(run_suite, suite)) for suite, what in SUITES.items()},
    "report": Command(ReportOptions, run_report),
}
