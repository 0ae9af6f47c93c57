"""How fast the operators are beside what could be used instead: suites, gates, floors, rows, tables.

Behind ``newllm bench``, ``python -m newllm.measuring`` (the same without jsonargparse) and ``benchmarks/``.
Importing this module imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newllm.measuring.session import Report

# Suite -> what it measures.
SUITES = {
    "layer": "the whole Infini layer against attention alone, linear attention and the segment loop",
    "window": "sliding-window attention alone",
    "memory": "memory update, scan and retrieval against a copy of the same bytes",
    "decode": "one token of one layer, after 4K and after 1M tokens",
    "sweep": "context recurrences over whole sequences against loops, LSTM and GRU",
    "serve": "whole models: decoding, reading, keeping sessions, against a Llama with a static cache",
    "long": "a million tokens in one forward pass against full attention",
}


def run(suite: str, **options: Any) -> Report:
    """Measure ``suite``, write its rows and print its tables; see ``newllm.measuring.session.run``."""
    from newllm.measuring import session

    return session.run(suite, **options)
