"""What goes over the wire: requests, checked, and the forms of answers.

The names are those of OpenAI's API. What this server cannot do and what would change the answer
has one neutral value, which clients send by default; what changes nothing is taken and ignored.
The OpenAPI description is made from the same classes (openapi.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from kvc.serve.errors import UNKNOWN


class _First(FailFast):
    """Of a list's wrong items only the first is told: it may have a million."""

    def __hash__(self) -> int:  # which typing's unions of Python 3.11 ask for
        return hash(self.fail_fast)


FIRST = _First()
Zero = Annotated[float, Field(ge=0, le=0, description="Only 0 is supported.")]
Nothing = Annotated[dict[str, Any], Field(max_length=0, description="Must be empty.")]
NoTools = Annotated[list[Any], Field(max_length=0, description="Tools are not supported.")]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class _Strict(BaseModel):
    # Forbidding would make an error of each unknown field, of which a body may have a million.
    model_config = ConfigDict(
        strict=True, extra="allow", json_schema_extra={"additionalProperties": False}
    )

    @model_validator(mode="after")
    def _has_no_more(self) -> Self:
        if self.model_extra:
            name = next(iter(self.model_extra))[:100]
            raise PydanticCustomError(UNKNOWN, "this server does not know it", {"name": name})
        return self


class StreamOptions(_Strict):
    """Of a stream."""

    include_usage: bool | None = Field(None, description="Send the usage in a last piece.")
    include_obfuscation: bool | None = Field(None, description="Ignored.")


class PlainText(_Strict):
    """The only form of an answer that is supported."""

    type: Literal["text"]


class Sampling(_Strict):
    """What both kinds of requests have."""

    model: str | None = Field(None, description="A name from /v1/models; this server's by default.")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="How many tokens to generate at most; the context may have room for less."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 takes the likeliest token. Default: 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Default: 1.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4), FIRST] | None = Field(
        None, description="Texts that end the answer and are left out of it."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Nothing | None = None
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored.")
    service_tier: str | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored: equal beginnings are found.")

    @property
    def texts_that_stop(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Sampling):
    """A text, or the tokens of one, to be continued."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), FIRST]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = Field(None, description="Not supported.")
    suffix: Annotated[str, Field(max_length=0)] | None = None


class TextPart(_Strict):
    """A part of a message; other kinds of parts are not supported."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1), FIRST]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(Sampling):
    """A conversation whose next message is wanted."""

    messages: Annotated[list[Message], Field(min_length=1), FIRST]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The newer name of max_tokens."
    )
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: PlainText | None = None
    tools: NoTools | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="Ignored: there are no tools.")
    modalities: (
        Annotated[list[Literal["text"]], Field(min_length=1, max_length=1), FIRST] | None
    ) = None


class CachedTokens(BaseModel):
    """Of a prompt's tokens, those whose cache was there already."""

    cached_tokens: int


class CacheBytes(BaseModel):
    """The bytes of a request's cache at its end, and those of a dense one."""

    cache_bytes: int
    dense_bytes: int


class Usage(BaseModel):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    kvc: CacheBytes


Finish = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """The text behind a prompt, or a piece of it."""

    index: Literal[0] = 0
    text: str
    logprobs: None = None
    finish_reason: Finish | None = None


class Completion(BaseModel):
    """The answer to a `CompletionRequest`, or a piece of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Answer(BaseModel):
    """A message of the model's."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The message behind a conversation."""

    index: Literal[0] = 0
    message: Answer
    logprobs: None = None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """The answer to a `ChatRequest`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The answer in which something is wrong."""

    error: ErrorDetail
