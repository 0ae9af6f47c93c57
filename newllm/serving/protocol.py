"""Requests and answers of the OpenAI interface, and what is ours in them.

Beyond that interface a request may say ``session``, the id under which the conversation is kept, ``top_k``
and ``repetition_penalty``; with a session ``messages`` are the new ones alone. Answers carry ``newllm``: the
length of the stream, the bytes of its state, the window.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from newllm.models.sampling import Sampling
from newllm.models.turns import Turn

# Fields that would change an answer and are not offered, with the values that ask for nothing.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "audio": (None,),
    "response_format": (None, {"type": "text"}),
}


class Refused(ValueError):
    """A request that cannot be answered; ``param`` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class StreamOptions(BaseModel):
    """``include_usage`` ends a stream with the counts of tokens."""

    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: list[str] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    session: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    def check(self) -> None:
        """Raise ``Refused`` for what is not offered."""
        for name, nothing in _NOT_OFFERED.items():
            value = (self.model_extra or {}).get(name)
            if value not in nothing:
                raise Refused(f"{name} is not offered, got {value!r}: leave it out", name)

    def sampling(self, default: Sampling) -> Sampling:
        """How tokens are chosen; ``default`` where the request does not say."""
        return Sampling(
            default.temperature if self.temperature is None else self.temperature,
            default.top_k if self.top_k is None else self.top_k,
            default.top_p if self.top_p is None else self.top_p,
            self.repetition_penalty,
        )

    def limit(self, default: int) -> int:
        """Tokens to write at most."""
        return default if self.max_tokens is None else self.max_tokens


class CompletionRequest(Request):
    """``POST /v1/completions``: one prompt, as text or token ids."""

    prompt: str | list[int] | list[str] = ""

    def text(self) -> str | list[int]:
        """The prompt. Raises ``Refused`` for several."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise Refused(f"prompt must be one text, got {len(prompt)}: send them one by one", "prompt")
            prompt = prompt[0]
        return prompt  # type: ignore[no-any-return]


class Part(BaseModel):
    """A piece of a message; only text is read."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def turn(self) -> Turn:
        """The message as text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Turn("system" if self.role == "developer" else self.role, text)


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)

    def limit(self, default: int) -> int:
        """Tokens to write at most."""
        return super().limit(default if self.max_completion_tokens is None else self.max_completion_tokens)


class Fork(BaseModel):
    """``POST /v1/sessions/{id}/fork``: the id of the new session."""

    to: str


def usage(read: int, written: int) -> dict[str, int]:
    """Counts of tokens as the interface has them."""
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def failure(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """An error as the interface has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
