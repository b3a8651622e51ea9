"""What /metrics counts as requests go by, under vLLM's names where it has them."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from router.observer import EndRecord

MODEL = ["model_name"]
LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 40)
PHASE_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Meters:
    """An observer with its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._prompt_tokens = self._count("vllm:prompt_tokens", "Prompt tokens of finished requests")
        self._cached_tokens = self._count("vllm:prompt_tokens_cached", "Prompt tokens from the prefix cache")
        self._generation_tokens = self._count("vllm:generation_tokens", "Tokens received from workers")
        self._success = self._count("vllm:request_success", "Requests by how they finished", "finished_reason")
        self._drafted = self._count("vllm:spec_decode_num_draft_tokens", "Draft tokens of finished requests")
        self._accepted = self._count("vllm:spec_decode_num_accepted_tokens", "Accepted draft tokens")
        self._errors = self._count("mlxspec_request_errors", "Requests that failed, by error code", "code")
        self._replays = self._count("mlxspec_request_replays", "Replays, by how their requests ended", "outcome")
        self._first_token = self._spread("vllm:time_to_first_token_seconds", "Arrival to first token", LATENCY_S)
        self._gap = self._spread("vllm:inter_token_latency_seconds", "Time between steps of a request", GAP_S)
        self._whole = self._spread("vllm:e2e_request_latency_seconds", "Arrival to end", LATENCY_S)
        self._queue = self._spread("vllm:request_queue_time_seconds", "Time in the worker's queue", PHASE_S)
        self._prefill = self._spread("vllm:request_prefill_time_seconds", "Time in prefill", PHASE_S)
        self._decode = self._spread("vllm:request_decode_time_seconds", "Time in decode", PHASE_S)
        self._prompt_size = self._spread("vllm:request_prompt_tokens", "Prompt tokens of a request", TOKENS)
        self._answer_size = self._spread("vllm:request_generation_tokens", "Tokens of an answer", TOKENS)
        self._step_size = self._spread("vllm:iteration_tokens_total", "Tokens of a worker's step", STEP_TOKENS)

    def request_started(self, model: str) -> None:
        pass

    def tokens_received(self, model: str, tokens: int, gap_s: float | None) -> None:
        self._generation_tokens.labels(model).inc(tokens)
        if gap_s is not None:
            self._gap.labels(model).observe(gap_s)

    def step_received(self, model: str, tokens: int) -> None:
        self._step_size.labels(model).observe(tokens)

    def request_replayed(self, model: str, reason: str) -> None:
        pass

    def request_ended(self, record: EndRecord) -> None:
        model = record.model
        if record.replays:
            self._replays.labels(model, record.outcome).inc(record.replays)
        if record.first_token_s is not None:
            self._first_token.labels(model).observe(record.first_token_s)
        if record.is_error:
            self._errors.labels(model, record.outcome).inc()
            return
        self._success.labels(model, record.outcome).inc()
        self._whole.labels(model).observe(record.elapsed_s)
        if record.usage is not None:
            self._prompt_tokens.labels(model).inc(record.usage.prompt_tokens)
            self._cached_tokens.labels(model).inc(record.usage.cached_tokens)
            self._drafted.labels(model).inc(record.usage.drafted_tokens)
            self._accepted.labels(model).inc(record.usage.accepted_tokens)
            self._prompt_size.labels(model).observe(record.usage.prompt_tokens)
            self._answer_size.labels(model).observe(record.usage.completion_tokens)
        if record.timings is not None:
            self._queue.labels(model).observe(record.timings.queue_s)
            self._prefill.labels(model).observe(record.timings.prefill_s)
            self._decode.labels(model).observe(record.timings.decode_s)

    def _count(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, [*MODEL, *labels], registry=self.registry)

    def _spread(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, MODEL, registry=self.registry, buckets=buckets)
