"""The Triton kernels: ``kernels/`` beside this package in a checkout, inside it once installed."""

from importlib.util import find_spec
from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(next(p for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()))]

# Without Triton there is nothing to compile, and the package can still be imported.
if find_spec("triton"):
    from newllm.kernels.compiler import choose_ptxas  # found by the path above

    choose_ptxas()
