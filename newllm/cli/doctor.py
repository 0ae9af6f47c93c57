"""``newllm doctor``: what this installation and machine offer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Options:
    """Show versions, devices, the native extension, what each operator runs on and why, and fetched data."""


def run(options: Options) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    from newllm.backend import build_info, explain, unsupported
    from newllm.cli.data import corpora_table

    console = Console()
    versions = Table("part", "found", title="installation", title_justify="left")
    for name, value in build_info().items():
        versions.add_row(name, value)
    operators = Table("operator", "device", "backend", "why", title="operators", title_justify="left")
    for choice in explain():
        operators.add_row(choice.op, choice.device, choice.backend or "fails", choice.reason)
    for table in (versions, operators, corpora_table()):
        console.print(table)
    for outside in unsupported():
        console.print(f"not supported: {outside}")
