"""The JSON of every answer: what the replies make, and what the description of the API says.

Each event of a stream is one of the objects here, too.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

TokenRow = tuple[float | None, int, str | None]


class FinishReason(TypedDict):
    """Why an answer of `/generate` ended.

    matched      of stop: the stop string, or the id of the token; null: the model's own end
    length       of length: how many tokens were asked for
    message, status_code, err_type   of abort
    """

    type: Literal["stop", "length", "abort"]
    matched: NotRequired[int | str | None]
    length: NotRequired[int]
    message: NotRequired[str]
    status_code: NotRequired[int]
    err_type: NotRequired[str]


class MetaInfo(TypedDict):
    """What `/generate` tells beside the text.

    id                    the rid; with n above 1, a number is added
    finish_reason         null until the end
    cached_tokens         tokens of the prompt that were not computed again
    input_token_logprobs, output_token_logprobs   [log-probability, id, text] of each token, the
                          first of which is null for the very first token of a prompt
    input_top_logprobs, output_top_logprobs   such rows of the likeliest tokens, for each token
    input_token_ids_logprobs, output_token_ids_logprobs   and of the ids of token_ids_logprob
    prompt_token_ids      with return_token_ids: the prompt's
    text_token_ids        with return_token_ids: of output_ids, those that lie whole in the text
    text_token_chars      how many of its characters these are
    """

    id: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    input_token_logprobs: NotRequired[list[TokenRow]]
    output_token_logprobs: NotRequired[list[TokenRow]]
    input_top_logprobs: NotRequired[list[list[TokenRow] | None]]
    output_top_logprobs: NotRequired[list[list[TokenRow] | None]]
    input_token_ids_logprobs: NotRequired[list[list[TokenRow] | None]]
    output_token_ids_logprobs: NotRequired[list[list[TokenRow] | None]]
    prompt_token_ids: NotRequired[list[int]]
    text_token_ids: NotRequired[list[int]]
    text_token_chars: NotRequired[int]


class GeneratedText(TypedDict):
    """One answer of `/generate`.

    text        without the prompt; in a stream all so far, or with --stream-output what is new
    output_ids  in the same way
    index       in a stream with several answers, which one this is: prompt by prompt
    """

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: NotRequired[int]


class CachedTokens(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    """Token counts; a prompt counts once, however many answers were drawn.

    prompt_tokens_details   with --enable-cache-report
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None


class CompletionLogprobs(TypedDict):
    """Lists with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """An answer, or in a stream what is new of it.

    finish_reason   null until the end
    matched_stop    the stop string, or the id of the token, that ended it
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    matched_stop: int | str | None


class Completion(TypedDict):
    """The answer of `/v1/completions`; an event of its stream has the same form.

    usage   in a stream, null but in an event that stream_options asks for
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TokenLogprob(TypedDict):
    """A token that could have stood in this place."""

    token: str
    bytes: list[int]
    logprob: float | None


class ChatTokenLogprob(TypedDict):
    """A token of the answer."""

    token: str
    bytes: list[int]
    logprob: float | None
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]


class Called(TypedDict):
    """
    arguments   the text of a JSON object; in a stream the next piece of it
    """

    name: str
    arguments: str


class Call(TypedDict):
    """A function that the model asks to be called."""

    id: str
    type: Literal["function"]
    function: Called


class AnswerMessage(TypedDict):
    """
    content             null where there is nothing but calls or thoughts
    reasoning_content   what the model thought, with --reasoning-parser
    tool_calls          null where there are none
    """

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    tool_calls: list[Call] | None


ChatEnd = Literal["stop", "length", "abort", "tool_calls"]


class ChatChoice(TypedDict):
    """An answer.

    matched_stop    the stop string, or the id of the token, that ended it
    """

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd
    matched_stop: int | str | None


class ChatCompletion(TypedDict):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CalledDelta(TypedDict):
    """
    name        in the first delta of a call
    arguments   the next piece of the text of a JSON object
    """

    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    """
    index      which of the calls
    id, type   in the first delta of a call
    """

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledDelta


class Delta(TypedDict):
    """What is new of a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]


class ChunkChoice(TypedDict):
    """What is new of an answer.

    finish_reason   null until the end
    matched_stop    the stop string, or the id of the token, that ended it
    """

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd | None
    matched_stop: int | str | None


class ChatChunk(TypedDict):
    """An event of a stream of `/v1/chat/completions`.

    usage   null but in an event that stream_options asks for
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None


class VectorMeta(TypedDict):
    """What `/encode` and `/classify` tell beside a vector.

    id              the rid
    finish_reason   of length: it was computed; of abort: somebody ended it
    cached_tokens   tokens of the prompt that were not computed again
    """

    id: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int


class EncodedText(TypedDict):
    """One answer of `/encode` and `/classify`.

    embedding   the numbers of the vector, or scores; null if it was aborted by its rid
    """

    embedding: list[float] | None
    meta_info: VectorMeta


class Embedding(TypedDict):
    """
    index       which of the inputs
    embedding   the numbers of the vector, or base64 of them
    """

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """The answer of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class ChatFormat(TypedDict):
    """How the model's template writes a conversation.

    roles                  of each role, what stands before and after what is said
    default_system_prompt  what it says first where no message does
    opening                before the first role
    merges_system          the system's words stand in the user's first message, between these
    stops                  texts that end an answer
    """

    roles: dict[str, tuple[str, str]]
    default_system_prompt: str | None
    opening: str
    merges_system: tuple[str, str] | None
    stops: list[str]


class ModelInfo(TypedDict):
    """
    keeps_tokens   /generate knows prefix_ids and return_token_ids
    chat_format    null where the template writes roles in no fixed way, and where there is none
    """

    model_path: str
    tokenizer_path: str
    is_generation: bool
    keeps_tokens: bool
    chat_format: ChatFormat | None


class ServerInfo(TypedDict):
    """Administrators get all settings besides, without keys.

    max_total_num_tokens   that the KV cache holds
    max_req_input_len      tokens of the longest prompt; null while the model is loaded
    """

    version: str
    max_total_num_tokens: int
    max_req_input_len: int | None


class TokenizedText(TypedDict):
    """For a list of texts, lists."""

    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizedText(TypedDict):
    text: str


class FoundCall(TypedDict):
    """
    tool_index   the place of the function in tools
    parameters   the text of a JSON object
    """

    tool_index: int
    name: str
    parameters: str


class FoundCalls(TypedDict):
    """
    normal_text   what is left of the text
    """

    normal_text: str
    calls: list[FoundCall]


class FoundThoughts(TypedDict):
    """
    text   what is left
    """

    reasoning_text: str
    text: str


class WeightsUpdated(TypedDict):
    success: bool
    message: str


class LogSettings(TypedDict):
    log_requests: bool
    log_requests_level: int
    dump_requests_folder: str
    dump_requests_threshold: int


class Aborted(TypedDict):
    """
    success       there was such a request
    num_aborted   with abort_all
    """

    success: bool
    num_aborted: NotRequired[int]


class NativeMessage(TypedDict):
    message: str


class NativeError(TypedDict):
    """An error outside `/v1`; in a stream, the last event."""

    error: NativeMessage


class NativeUnauthorized(TypedDict):
    """The key is missing or wrong, outside `/v1`."""

    error: Literal["Unauthorized"]


class WeightsRefused(TypedDict):
    """All is as it was.

    success   false
    message   what is wrong with the weights
    error     what is wrong with the request, instead of the two others
    """

    success: NotRequired[bool]
    message: NotRequired[str]
    error: NotRequired[NativeMessage]


class OpenAiMessage(TypedDict):
    """
    param   the field that is wrong
    code    such as context_length_exceeded
    """

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAiError(TypedDict):
    """An error of `/v1`; in a stream, the last event."""

    error: OpenAiMessage
