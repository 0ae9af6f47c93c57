"""The Triton kernels: ``kernels/`` beside this package in a checkout, inside it once installed."""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(next(p for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()))]

try:
    from newllm.kernels.compiler import choose_ptxas  # found by the path above
except ModuleNotFoundError as missing:
    # Without these nothing is compiled, and the package can still be imported.
    if missing.name not in ("torch", "triton"):
        raise
else:
    choose_ptxas()
