"""What tests and benchmarks share: a case for every operator, and the rules by which results are judged.

Three judgements, none with a tolerance of its own: equality; :func:`assert_rounding`, for float64 against
an independent computation; :func:`assert_no_worse`, for any dtype against the reference in float64.
"""

from newllm.testing.cases import CASES
from newllm.testing.op_case import DRAWS, Draw, Inputs, OpCase, leaves, mapped
from newllm.testing.rule import assert_no_worse, assert_rounding, error_and_bar, largest

__all__ = [
    "CASES",
    "DRAWS",
    "Draw",
    "Inputs",
    "OpCase",
    "assert_no_worse",
    "assert_rounding",
    "error_and_bar",
    "largest",
    "leaves",
    "mapped",
]
