"""Texts, tokenizers, cutting and needle tasks. Importing it needs no torch; names load when touched."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newllm.data.corpora import get as get, list_corpora as list_corpora
    from newllm.data.documents import Documents as Documents
    from newllm.data.packing import random_blocks as random_blocks
    from newllm.data.passkey import (
        PasskeyBatch as PasskeyBatch,
        PasskeyTask as PasskeyTask,
        byte_passkey as byte_passkey,
        text_passkey as text_passkey,
    )
    from newllm.data.sources import open_source as open_source
    from newllm.data.text import Text as Text, embedded_corpus as embedded_corpus, load_text as load_text
    from newllm.data.token_cache import Tokens as Tokens, cached_tokens as cached_tokens
    from newllm.data.tokenizer import byte_tokenizer as byte_tokenizer, encode as encode
    from newllm.data.vocabularies import open_tokenizer as open_tokenizer

# Public name -> the module that defines it.
_PUBLIC = {
    "Documents": "documents",
    "PasskeyBatch": "passkey",
    "PasskeyTask": "passkey",
    "Text": "text",
    "Tokens": "token_cache",
    "byte_passkey": "passkey",
    "byte_tokenizer": "tokenizer",
    "cached_tokens": "token_cache",
    "embedded_corpus": "text",
    "encode": "tokenizer",
    "get": "corpora",
    "list_corpora": "corpora",
    "load_text": "text",
    "open_source": "sources",
    "open_tokenizer": "vocabularies",
    "random_blocks": "packing",
    "text_passkey": "passkey",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
