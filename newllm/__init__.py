"""Language models with a memory of constant size.

Public names are loaded when first touched, so that ``import newllm`` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newllm import ops as ops
    from newllm.backend import use_backend as use_backend
    from newllm.models import (
        ContextKVConfig as ContextKVConfig,
        ContextKVForCausalLM as ContextKVForCausalLM,
        ContextLMConfig as ContextLMConfig,
        ContextLMForCausalLM as ContextLMForCausalLM,
        SenriConfig as SenriConfig,
        SenriForCausalLM as SenriForCausalLM,
        SenriModel as SenriModel,
    )
    from newllm.models.convert import convert as convert
    from newllm.models.session import Session as Session
    from newllm.modules import (
        ContextBlock as ContextBlock,
        ContextKVAttention as ContextKVAttention,
        ContextLayer as ContextLayer,
        InfiniAttention as InfiniAttention,
        TensorMemory as TensorMemory,
        TokenBlock as TokenBlock,
    )
    from newllm.types import (
        ContextParams as ContextParams,
        ContextState as ContextState,
        FeatureMap as FeatureMap,
        GatedParams as GatedParams,
        InfiniState as InfiniState,
        MemoryState as MemoryState,
    )

    __version__: str

# Public name -> the module that defines it.
_PUBLIC = {
    "ContextBlock": "newllm.modules",
    "ContextKVAttention": "newllm.modules",
    "ContextKVConfig": "newllm.models",
    "ContextKVForCausalLM": "newllm.models",
    "ContextLMConfig": "newllm.models",
    "ContextLMForCausalLM": "newllm.models",
    "ContextLayer": "newllm.modules",
    "ContextParams": "newllm.types",
    "ContextState": "newllm.types",
    "FeatureMap": "newllm.types",
    "GatedParams": "newllm.types",
    "InfiniAttention": "newllm.modules",
    "InfiniState": "newllm.types",
    "MemoryState": "newllm.types",
    "SenriConfig": "newllm.models",
    "SenriForCausalLM": "newllm.models",
    "SenriModel": "newllm.models",
    "Session": "newllm.models.session",
    "TensorMemory": "newllm.modules",
    "TokenBlock": "newllm.modules",
    "convert": "newllm.models.convert",
    "ops": "newllm.ops",
    "use_backend": "newllm.backend",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _PUBLIC:
        module = import_module(_PUBLIC[name])
        value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, "__version__"})


def _version() -> str:
    """The version that pyproject.toml states, also in a checkout that was never installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("newllm")
    except PackageNotFoundError:
        import tomllib
        from pathlib import Path

        pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])
