"""Every message of both planes: the data plane carries requests and tokens, the control plane workers and their states.

A worker's identity is `<model slug>#<generation>`, new for every spawn: a late frame of a dead one is recognised.
"""

import msgspec

from common.priority import Priority
from common.sampling import Sampling, Speculation
from common.states import Death, WorkerState

PROTOCOL_VERSION = 1


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all messages; on the wire the class name stands in the field `type`."""


# --- parts ---------------------------------------------------------------------------------------


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: str
    content: str


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A conversation for the model's chat template.

    With `plain_fallback` a model without template continues the last message's text; else it is refused.
    """

    messages: tuple[ChatMessage, ...]
    plain_fallback: bool = False


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Text that is continued as it is."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Token ids that are continued as they are."""

    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A token with its log-probability. `raw` are its bytes where they are no whole characters, as `text` has to be."""

    token_id: int
    text: str
    logprob: float
    raw: tuple[int, ...] = ()


class ChosenLogprob(TokenLogprob, frozen=True, kw_only=True, omit_defaults=True):
    """A token of an answer, how many characters came before it, and the likeliest tokens at its place, best first."""

    text_offset: int
    top: tuple[TokenLogprob, ...] = ()


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one request gained in one step.

    `text` may lag behind `token_ids`: a character, or a stop string, may be in the making. `logprobs` has one for each
    of `token_ids` if the request asked for them. The first `drafted_chars` of `text` are of accepted draft tokens.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str = ""
    drafted_chars: int = 0
    logprobs: tuple[ChosenLogprob, ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a finished request; `drafted` and `accepted` count draft tokens, `steps` its decode steps."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time went, in seconds, on the worker's clock.

    `plain_decode_s` is what the same tokens would have taken at the measured plain-step time of the same batches, and
    `measured_decode_s` what they took; both cover the same steps. None until a plain step has been measured.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    plain_decode_s: float | None = None
    measured_decode_s: float | None = None


# --- data plane: worker -> router -------------------------------------------------------------------


class WorkerHello(Message, frozen=True, kw_only=True):
    """First message of a worker on each connection of each plane. `token` proves that the supervisor spawned it."""

    version: int = PROTOCOL_VERSION
    identity: str
    token: str
    model: str
    pid: int


class Accepted(Message, frozen=True, kw_only=True):
    """The prompt was tokenized and fits; the request waits for or has a row."""

    request_id: str
    prompt_tokens: int


class Deltas(Message, frozen=True, kw_only=True):
    """All requests that gained tokens in one step."""

    step: int
    items: tuple[Delta, ...]


class Finished(Message, frozen=True, kw_only=True):
    """The last message of a request that ended well. `reason`: stop | length | cancelled."""

    request_id: str
    reason: str
    usage: Usage
    timings: Timings


class Failed(Message, frozen=True, kw_only=True):
    """The last message of a request that did not."""

    request_id: str
    code: str
    message: str
    param: str | None = None


class DrafterLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One drafter's counters; `judged` and `stood` count its tokens by position in the draft, the last: all beyond."""

    name: str
    drafted: int
    accepted: int
    judged: tuple[int, ...] = ()
    stood: tuple[int, ...] = ()


class Load(Message, frozen=True, kw_only=True):
    """How busy the worker is; sent about once a second and used for balancing and /stats.

    `prefix_*` are the prefix cache's: requests that asked and that found something, tokens found, spans dropped, size.
    `preempted` counts rows that lost their slot for want of memory; `parked` are rows that draft nothing at present,
    and `probes` counts how often such a row tried again.
    """

    running: int
    waiting: int
    outstanding_tokens: int
    kv_bytes: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    plain_step_ms: float | None = None
    speedup: float | None = None
    prefix_lookups: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    prefix_evictions: int = 0
    prefix_bytes: int = 0
    preempted: int = 0
    drafters: tuple[DrafterLoad, ...] = ()
    parked: int = 0
    probes: int = 0


# --- data plane: router -> worker -------------------------------------------------------------------


class Generate(Message, frozen=True, kw_only=True):
    """One completion to make. `resume` holds the token ids that were already sent before a crash.

    Requests of one `scope` (an API key) may draft from each other's outputs.


    `logprobs` is the number of alternatives to tell with each token's log-probability; None: tell none.
    """

    request_id: str
    prompt: Prompt
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    speculation: Speculation = Speculation()
    ignore_eos: bool = False
    scope: str = ""
    resume: tuple[int, ...] = ()
    logprobs: int | None = None
    priority: Priority = Priority.NORMAL


class Cancel(Message, frozen=True, kw_only=True):
    """Nobody waits for this request any more."""

    request_id: str


class AskHello(Message, frozen=True, kw_only=True):
    """Say hello again: frames of yours came, but your hello did not."""


# --- control plane: worker -> supervisor --------------------------------------------------------------


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker learned about its model by loading it. `kv_bits` 0: keys and values are kept as computed."""

    architecture: str
    context_tokens: int
    vocabulary: int
    weights_dtype: str
    weights_bytes: int
    kv_bytes_per_token: int
    backend: str
    has_chat_template: bool
    drafters: tuple[str, ...]
    load_s: float
    kv_bits: int = 0
    kv_bytes_per_row: int = 0  # recurrent states, whatever the row's length
    speculation: bool = True
    speculation_reason: str = ""  # why it is off


class StateChanged(Message, frozen=True, kw_only=True):
    """The worker reached LOADING, READY or DRAINING. `facts` come with READY."""

    state: WorkerState
    detail: str = ""
    facts: ModelFacts | None = None


class Heartbeat(Message, frozen=True, kw_only=True):
    """Sign of life with the loop's own counter: `loop_seq` stands still when the MLX thread hangs.

    `phase`: loading, compile (both may take long), step, orders or idle. `slowest_step_s` leaves compiling out.
    `kv_bytes` are slots and remembered prefixes, a part of `active_bytes`.
    """

    loop_seq: int
    phase: str
    running: int
    waiting: int
    finished: int
    active_bytes: int
    cache_bytes: int
    footprint_bytes: int
    kv_bytes: int = 0
    slowest_step_s: float = 0.0


# --- control plane: supervisor -> worker --------------------------------------------------------------


class SetLimits(Message, frozen=True, kw_only=True):
    """The worker's share of memory for its KV cache and MLX's buffer cache.

    `shrink`: the machine is short of memory, so give back at once what only makes later requests faster.
    """

    kv_bytes: int
    cache_bytes: int
    shrink: bool = False


class Drain(Message, frozen=True, kw_only=True):
    """Finish the live requests, take no new one, then exit."""


class Exit(Message, frozen=True, kw_only=True):
    """Free the model and exit now."""


# --- control plane: router or command line -> supervisor -----------------------------------------------


class Watch(Message, frozen=True, kw_only=True):
    """Send me the model table now and whenever it changes. Sent again as a sign of life."""

    client: str = "router"


class EnsureModel(Message, frozen=True, kw_only=True):
    """Have this model loaded; answered by `Reply` at once, progress is seen in the model table.

    `path` registers a new model (local folder or hub id) under `name`.
    """

    call_id: str
    name: str
    path: str | None = None


class Unload(Message, frozen=True, kw_only=True):
    """Drain and stop the workers of this model; answered when its process is gone."""

    call_id: str
    name: str


class Pin(Message, frozen=True, kw_only=True):
    """Never (or again) evict this model."""

    call_id: str
    name: str
    pinned: bool


class Reload(Message, frozen=True, kw_only=True):
    """Read the configuration again, as SIGHUP does; `Reply.message` says what changed, one thing a line."""

    call_id: str


class Status(Message, frozen=True, kw_only=True):
    """Look for models anew; answer with `Reply`, whose `message` tells of them all."""

    call_id: str


# --- control plane: supervisor -> router or command line -----------------------------------------------


class WorkerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One spawned worker in the model table. `footprint_bytes` is what it counts in the budget.

    `started_at` is seconds since the epoch, so that it does not change: whoever wants an age takes the difference.
    """

    identity: str
    token: str
    state: WorkerState
    pid: int
    footprint_bytes: int = 0
    running: int = 0
    waiting: int = 0
    generation: int = 0
    phase: str = ""
    loop_seq: int = 0
    finished: int = 0
    active_bytes: int = 0
    cache_bytes: int = 0
    kv_bytes: int = 0
    kv_limit_bytes: int = 0
    started_at: float = 0.0


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One known model. `state` is its best worker's; `detail` says why it failed or what it waits for.

    `need_bytes` is what one more worker of it is expected to take; 0: not known. `last_used_at` is seconds since the
    epoch; 0: never. It is unloaded when idle for `idle_unload_s`; 0: never. With `gives_way` its workers leave for a
    while only: what they do not finish goes on with their successors.
    """

    name: str
    path: str
    state: WorkerState
    detail: str = ""
    pinned: bool = False
    restarts: int = 0
    restarts_by_death: dict[Death, int] = {}
    retry_after_s: float | None = None
    facts: ModelFacts | None = None
    workers: tuple[WorkerEntry, ...] = ()
    preload: bool = False
    replicas: int = 1
    need_bytes: int = 0
    last_used_at: float = 0.0
    idle_unload_s: float = 0.0
    gives_way: bool = False


class ModelTable(Message, frozen=True, kw_only=True):
    """The whole truth about models, level-triggered: a receiver keeps the newest revision and forgets the rest.

    `memory_used_bytes` is what all workers count in the budget, `memory_pressure` what the system says of the whole
    machine: 1 normal, 2 short, 4 critical. `started_at` is the supervisor's, in seconds since the epoch.
    """

    revision: int
    default_model: str | None
    memory_budget_bytes: int
    models: tuple[ModelEntry, ...]
    memory_used_bytes: int = 0
    memory_pressure: int = 1
    started_at: float = 0.0


class Reply(Message, frozen=True, kw_only=True):
    """Answer to the call with this id. `code` is empty when it went well, else that of `common.errors`."""

    call_id: str
    code: str = ""
    message: str = ""


FromWorkerData = WorkerHello | Accepted | Deltas | Finished | Failed | Load
ToWorkerData = Generate | Cancel | AskHello
FromWorkerControl = WorkerHello | StateChanged | Heartbeat
ToWorkerControl = SetLimits | Drain | Exit
FromClientControl = Watch | EnsureModel | Unload | Pin | Reload | Status
ToClientControl = ModelTable | Reply
ToSupervisor = FromWorkerControl | FromClientControl
