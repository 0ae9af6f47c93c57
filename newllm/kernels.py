"""The Triton kernels: ``kernels/`` beside this package in a checkout, inside it once installed."""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(next(p for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()))]

from newllm.kernels.compiler import choose_ptxas  # noqa: E402, found by the path above

choose_ptxas()
