"""The bodies that requests may have. Every number has its bounds here, and every list and text its longest length."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator

from lmdeploy.serve.openai.tool_protocol import FunctionCall, Functions, ResponseFormat, ToolChoice, Tools

MAX_PROMPTS = 1024
MAX_IDS = 1 << 21
MAX_TEXT = 8 << 20

TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS)]
Text = Annotated[StrictStr, Field(max_length=MAX_TEXT)]
Count = Annotated[StrictInt, Field(ge=1, le=1 << 31)]
SessionId = Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)]
StopWord = Annotated[StrictStr, Field(min_length=1, max_length=1024)]
TokenBias = Annotated[float, Field(ge=-100.0, le=100.0)]
Prompts = (
    Text
    | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS)]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: StrictBool = False


class Sampling(_Body):
    """How tokens are chosen; what is left out takes the model's own default."""

    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=1e-3, le=1e3)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    repetition_ngram_size: Annotated[StrictInt, Field(ge=0, le=1024)] | None = None
    repetition_ngram_threshold: Annotated[StrictInt, Field(ge=0, le=1 << 20)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(1 << 62), lt=1 << 62)] | None = None
    stop: StopWord | Annotated[list[StopWord], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    logit_bias: dict[TokenId, TokenBias] | None = Field(None, max_length=4096)
    min_new_tokens: Annotated[StrictInt, Field(ge=0, le=1 << 31)] | None = None
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    spaces_between_special_tokens: StrictBool = True
    include_stop_str_in_output: StrictBool = False

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _read_ids(cls, value: Any) -> Any:
        """JSON's keys are texts; one that is no id stays, and is refused as such."""
        if not isinstance(value, dict):
            return value
        return {int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key: bias
                for key, bias in value.items()}  # fmt: skip


class Streamed(Sampling):
    """What chat and completions share."""

    model: Annotated[StrictStr, Field(max_length=4096)]
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: Annotated[StrictStr, Field(max_length=1024)] | None = None
    session_id: SessionId | None = None
    max_completion_tokens: Count | None = None


class Message(_Body):
    """One turn. content: a text, or parts of which only those of type `text` are supported."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[StrictStr, Field(max_length=64)]
    content: Text | Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None


class ChatRequest(Streamed):
    messages: Text | Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    do_preprocess: StrictBool = True
    input_ids: TokenIds | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=32)
    enable_thinking: StrictBool | None = None
    reasoning_effort: Annotated[StrictStr, Field(max_length=16)] | None = None
    return_token_ids: StrictBool = False
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    functions: Functions | None = None
    function_call: FunctionCall | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Streamed):
    prompt: Prompts
    max_tokens: Annotated[StrictInt, Field(ge=0, le=1 << 31)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool = False
    suffix: Text | None = None
    best_of: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    response_format: ResponseFormat | None = None


class GenerateRequest(Sampling):
    """LMDeploy's own endpoint; with `request_output_len` the form that it had in version 0.1."""

    prompt: Text | Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    input_ids: TokenIds | None = None
    max_tokens: Count | None = None
    return_logprob: StrictBool = False
    stream: StrictBool = False
    session_id: SessionId | None = None
    image_data: Any = None
    stop: StrictBool | StopWord | Annotated[list[StopWord], Field(max_length=64)] | None = None  # type: ignore[assignment]
    request_output_len: Annotated[StrictInt, Field(ge=1, le=1 << 31)] | None = None


class EncodeRequest(_Body):
    input: Text | Annotated[list[Text], Field(max_length=MAX_PROMPTS)]
    do_preprocess: StrictBool = False
    add_bos: StrictBool = True


class TokenizeRequest(_Body):
    model: Annotated[StrictStr, Field(max_length=4096)] | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True
    return_token_strs: StrictBool = False


class DetokenizeRequest(_Body):
    model: Annotated[StrictStr, Field(max_length=4096)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS)]
    skip_special_tokens: StrictBool = False


class PerplexityRequest(_Body):
    input: Text | TokenIds


class EmbeddingRequest(_Body):
    """pooling: the last token's hidden state, or the mean of all. The vector has length 1."""

    model: Annotated[StrictStr, Field(max_length=4096)]
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["last", "mean"] = "last"
    dimensions: Count | None = None
    user: Annotated[StrictStr, Field(max_length=1024)] | None = None
