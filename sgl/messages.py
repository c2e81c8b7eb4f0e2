"""Every message between two processes. One union per ring; a reader's decoder is built from it.

    ingress ── Generate Embed Abort ────▶ scheduler ── StepPlan ──▶ worker (one ring per rank)
       ▲       Control Start-, StopProfile │   ▲  ▲    TokenMasks      │
       │       UpdateWeights GetWeight     │   │  │    Start-, StopProfile
       │                                   │   │  │    UpdateWeights GetWeight
       │                                   │   │  └── WorkerReady StepResult Reply (rank 0)
       │           OpenText NewTokens Reply│   │ Stop
       │                     EngineReady   ▼   │
       └── NewText Reply EngineReady ── detokenizer

    every actor ── ActorReady ActorFailed ──▶ supervisor ── Drain EngineDied ──▶ ingress

Token ids, rows, positions and pages travel as the bytes of little-endian int32 (`pack`, `unpack`),
log-probabilities and vectors as float32: a list of Python numbers costs fifty times as much to
decode.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec

from sgl.sampling_params import Grammar, SamplingParams

RequestId: TypeAlias = int
Int32Bytes: TypeAlias = bytes
Float32Bytes: TypeAlias = bytes


def pack(ids: Iterable[int]) -> Int32Bytes:
    """The int32 bytes of `ids`; raises OverflowError where one needs more than 32 bits."""
    return (ids if isinstance(ids, array) else array("i", ids)).tobytes()


def unpack(data: bytes) -> array[int]:
    """The ids whose int32 bytes `data` are."""
    ids = array("i")
    ids.frombytes(data)
    return ids


class LogprobOptions(msgspec.Struct, frozen=True, array_like=True):
    """Which log-probabilities a request wants back.

    start_len  first prompt position to report; -1 reports output tokens only
    top_num    how many of the likeliest alternatives to report at each position
    token_ids  ids whose log-probability is reported at each position, whatever it is
    """

    start_len: int = -1
    top_num: int = 0
    token_ids: Int32Bytes = b""


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities of K consecutive tokens, under the model's raw distribution.

    values        float32 [K]; NaN where there is none (the first token of a prompt)
    top_values    float32 [K, top_num], best first          top_ids    int32 [K, top_num]
    chosen_values float32 [K, len(LogprobOptions.token_ids)]
    """

    values: Float32Bytes = b""
    top_values: Float32Bytes = b""
    top_ids: Int32Bytes = b""
    chosen_values: Float32Bytes = b""

    def after_unknown(self, options: LogprobOptions) -> Logprobs:
        """These, with a token before them that has no log-probability: a prompt's first."""
        unknown = array("f", [math.nan]).tobytes()
        return Logprobs(
            unknown + self.values,
            unknown * options.top_num + self.top_values,
            pack([0] * options.top_num) + self.top_ids,
            unknown * (len(options.token_ids) // 4) + self.chosen_values,
        )


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Why a request ended.

    stop    `matched` is the stop token's id or the stop string
    length  `length` is the number of tokens it was allowed
    abort   `message` and the HTTP `status` say what happened; 499 means the client left or asked
    """

    kind: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int = 0
    message: str = ""
    status: int = 0


# ── ingress to scheduler ────────────────────────────────────────────────────────────────────────


class Generate(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Generate one continuation of one prompt. `sampling.n` is spread by the sender: it is 1 here.

    namespace       first part of the radix key: requests in different ones never share KV
    text_interval   send text every so many tokens; 0 sends all of it at the end
    grammar         what the answer must match
    kept_ids        special tokens that leave text even if the others do not
    """

    request_id: RequestId
    prompt_ids: Int32Bytes
    sampling: SamplingParams
    logprobs: LogprobOptions | None = None
    namespace: str = ""
    text_interval: int = 1
    grammar: Grammar | None = None
    kept_ids: tuple[int, ...] = ()


class Embed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Compute one prompt and answer with a vector of it; to a model that gives vectors only.

    namespace   as in `Generate`
    """

    request_id: RequestId
    prompt_ids: Int32Bytes
    namespace: str = ""


class Abort(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Forget a request, whatever state it is in. Unknown ids are ignored."""

    request_id: RequestId


class Control(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An operator's wish; answered by a `Reply` with the same `call_id`."""

    call_id: int
    action: Literal["flush_cache", "abort_all"]


class StartProfile(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Record what the workers do from the next step on; rank 0 answers with a `Reply`.

    stamp       tells the files of one profile, one a rank, from those of others
    folder      where the files go; None: where the worker's environment says
    num_steps   stop after so many; None: only on `StopProfile`
    activities  what to record; empty: all that this machine has
    """

    call_id: int
    stamp: str
    folder: str | None = None
    num_steps: int | None = None
    activities: tuple[Literal["CPU", "GPU"], ...] = ()


class StopProfile(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Write what was recorded; rank 0's `Reply` says where it is."""

    call_id: int


class UpdateWeights(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Load another checkpoint of the same model; rank 0 answers with a `Reply`.

    It reaches the workers once all requests that run have ended; others wait.
    """

    call_id: int
    path: str
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = "auto"


class GetWeight(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Show a weight, named as in its checkpoint; rank 0's `Reply` has the first rows as JSON."""

    call_id: int
    name: str
    max_rows: int


# ── scheduler to worker and back ────────────────────────────────────────────────────────────────


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a row of the worker's request table.

    pages       pages of the KV already in the cache, for the first `num_cached` tokens
    seed        of the row's random numbers; the k-th output token uses the k-th number
    prompt_ids, output_ids   what the penalties count; empty where no penalty is set
    num_output  tokens generated before (a request that was retracted comes back)
    eos_ids     ids masked until `min_new_tokens` are out
    """

    row: int
    num_cached: int
    pages: Int32Bytes
    sampling: SamplingParams
    seed: int
    num_output: int = 0
    eos_ids: Int32Bytes = b""
    prompt_ids: Int32Bytes = b""
    output_ids: Int32Bytes = b""
    logprobs: LogprobOptions | None = None


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """One piece of a row's prefill: `token_ids` go to positions start, start + 1, …

    pages           pages the row gains before this step
    is_last         whether a token is sampled after the piece, or a vector made
    logprob_start   first of these positions whose next token's log-probability is wanted; -1: none
    next_token_id   the prompt token after this piece, for its last log-probability; -1: none
    """

    row: int
    start: int
    token_ids: Int32Bytes
    pages: Int32Bytes
    is_last: bool
    logprob_start: int = -1
    next_token_id: int = -1


class StepPlan(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The next forward pass, told as changes to the worker's request table.

    In order: `released` rows are given up, `admitted` rows are taken, pages are appended, and the
    pass runs over the decode rows (one token each, taken from the table) and then the chunks.

    decode_rows   rows that decode; None means the same rows as in the step before
    page_ids      pages appended to the rows `page_rows`; without `page_rows`, one per decode row
    masked        tokens of the step, counted as in `StepResult.token_ids`, that are sampled under a
                  grammar: their masks follow as `TokenMasks`, once the tokens before are known
    """

    step: int
    released: Int32Bytes = b""
    admitted: list[NewRow] = []
    decode_rows: Int32Bytes | None = None
    page_rows: Int32Bytes = b""
    page_ids: Int32Bytes = b""
    chunks: list[Chunk] = []
    masked: Int32Bytes = b""


class TokenMasks(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Which ids may be sampled, for rank 0: a mask for each of the plan's `masked`.

    words  of the different masks, end to end, int32: a bit for each id, the lowest first
    which  of these masks, for each of `masked`: answers in like places have the same
    """

    step: int
    words: bytes
    which: Int32Bytes


class RowLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of one row: `index` counts the plan's decode rows, then its chunks."""

    index: int
    input: Logprobs | None = None
    output: Logprobs | None = None


class StepResult(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What one forward pass gave.

    token_ids   one per decode row, then one per chunk with `is_last`; -1 where the logits were NaN
    error       the pass failed and left no tokens; the worker is still able to work
    failed      where the pass failed for some rows only: their indices, counted as in `RowLogprobs`
    vectors     of a model that gives vectors: in place of the tokens; empty where one is NaN
    """

    step: int
    token_ids: Int32Bytes
    logprobs: list[RowLogprobs] = []
    error: str = ""
    failed: Int32Bytes = b""
    vectors: list[Float32Bytes] = []


class WorkerReady(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model is loaded; `num_pages` pages of KV can be used."""

    num_pages: int


# ── scheduler to detokenizer ────────────────────────────────────────────────────────────────────


class OpenText(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A request's tokens will follow; how to turn them into text."""

    request_id: RequestId
    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    interval: int = 1
    kept_ids: tuple[int, ...] = ()


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """Tokens one request gained in one step; `finish` is set exactly once, on the last.

    `vector` is the answer to an `Embed`, on the last one.
    """

    request_id: RequestId
    token_ids: Int32Bytes
    finish: Finish | None = None
    num_cached: int = 0
    input_logprobs: Logprobs | None = None
    output_logprobs: Logprobs | None = None
    vector: Float32Bytes = b""


class NewTokens(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What all requests of a step gained."""

    deltas: list[TokenDelta]


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Detokenizer to scheduler: a stop string was seen, the request needs no more tokens."""

    request_id: RequestId


# ── detokenizer to ingress ──────────────────────────────────────────────────────────────────────


class TextDelta(msgspec.Struct, frozen=True, array_like=True):
    """Text and tokens one request gained since the last one; `finish` is set on the last.

    `num_cached` is how many prompt tokens the radix cache held when the request first ran,
    `vector` the answer to an `Embed`, on the last one.
    """

    request_id: RequestId
    text: str
    token_ids: Int32Bytes
    finish: Finish | None = None
    num_cached: int = 0
    input_logprobs: list[Logprobs] = []
    output_logprobs: list[Logprobs] = []
    vector: Float32Bytes = b""


class NewText(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What clients may see now."""

    deltas: list[TextDelta]


class Reply(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Answer to a message that has a `call_id`, with the same one.

    It goes through the detokenizer so that it cannot overtake text.
    """

    call_id: int
    ok: bool
    text: str


class EngineReady(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All workers are ready; the limits the ingress checks requests against."""

    max_total_tokens: int
    max_request_tokens: int


# ── actors and supervisor ───────────────────────────────────────────────────────────────────────


class ActorReady(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The actor does its work from now on."""

    note: str = ""


class ActorFailed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The actor could not start. `is_config` tells the operator's mistakes from ours."""

    message: str
    is_config: bool


class Drain(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Go on for `delay_s`, then take no new requests, finish the running ones within `timeout_s`
    and end."""

    delay_s: float
    timeout_s: float


class EngineDied(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Another actor has ended: tell every client, then end."""

    message: str


Question: TypeAlias = Control | StartProfile | StopProfile | UpdateWeights | GetWeight
IngressToScheduler: TypeAlias = Generate | Embed | Abort | Question
SchedulerToWorker: TypeAlias = (
    StepPlan | TokenMasks | StartProfile | StopProfile | UpdateWeights | GetWeight
)
WorkerToScheduler: TypeAlias = WorkerReady | StepResult | Reply
SchedulerToDetokenizer: TypeAlias = OpenText | NewTokens | Reply | EngineReady
DetokenizerToScheduler: TypeAlias = Stop
DetokenizerToIngress: TypeAlias = NewText | Reply | EngineReady
ActorToSupervisor: TypeAlias = ActorReady | ActorFailed
SupervisorToIngress: TypeAlias = Drain | EngineDied
