"""POST /generate and POST /batch_generate."""

import json
from typing import Any

import pytest

from common.messages import ChatPrompt, Failed, Finished, Generate, TextPrompt
from common.sampling import MAX_SEED
from common.states import WorkerState
from tests.fakes import PROMPT_TOKENS, Cluster, FakeWorker, finished, wait_until, whole_text


async def test_generate_answers_text_usage_performance_and_stats(cluster: Cluster, worker: FakeWorker) -> None:
    async with cluster.http.post("/generate", json={"prompt": "Hi", "max_tokens": 6}) as response:
        answer = await response.json()
    assert response.status == 200
    assert answer["text"] == whole_text(6)
    assert answer["model"] == "tiny"
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == PROMPT_TOKENS
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["total_tokens"] == PROMPT_TOKENS + 6
    performance = answer["performance"]
    assert performance["throughput"] > 0
    assert 0 < performance["time_to_first_token"] <= performance["elapsed_time"]
    assert (performance["queue_time"], performance["prefill_time"], performance["decode_time"]) == (
        0.001,
        0.002,
        0.003,
    )
    stats = answer["speculative_stats"]
    assert stats == {
        "enabled": True,
        "draft_tokens": 4,
        "accepted_tokens": 3,
        "steps": 3,
        "acceptance_rate": 0.75,
        "tokens_per_step": 2.0,
    }


async def test_speedup_appears_once_it_is_measured(cluster: Cluster, worker: FakeWorker) -> None:
    worker.answer = lambda g: finished(g.request_id, 0, "stop", plain_decode_s=3.0, measured_decode_s=2.0)
    async with cluster.http.post("/generate", json={"prompt": "Hi"}) as response:
        assert (await response.json())["speculative_stats"]["speedup"] == 1.5


async def test_prompt_goes_through_the_template_unless_raw(cluster: Cluster, worker: FakeWorker) -> None:
    for raw in (False, True):
        async with cluster.http.post("/generate", json={"prompt": "Hi", "max_tokens": 1, "raw": raw}):
            pass
    chat, text = (generate.prompt for generate in worker.generates)
    assert isinstance(chat, ChatPrompt)
    assert chat.plain_fallback
    assert [(m.role, m.content) for m in chat.messages] == [("user", "Hi")]
    assert text == TextPrompt(text="Hi")


async def test_sampling_and_speculation_reach_the_worker(cluster: Cluster, worker: FakeWorker) -> None:
    body = {
        "prompt": "Hi",
        "model": "tiny",
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "seed": 5,
        "stop": ["a", "b"],
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {"0": 1, "48": -2.5},
        "speculative": {"drafter": "ngram", "max_draft_tokens": 4},
    }
    async with cluster.http.post("/generate", json=body) as response:
        assert response.status == 200
    (generate,) = worker.generates
    sampling = generate.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 20)
    assert (sampling.min_p, sampling.seed) == (0.1, 5)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -0.5)
    assert (sampling.frequency_penalty, sampling.logit_bias) == (0.25, ((0, 1.0), (48, -2.5)))
    assert generate.stop == ("a", "b")
    assert (generate.speculation.drafter, generate.speculation.max_draft_tokens) == ("ngram", 4)


async def test_unset_fields_come_from_the_configuration_with_a_random_seed(
    cluster: Cluster, worker: FakeWorker
) -> None:
    for _ in range(2):
        async with cluster.http.post("/generate", json={"prompt": "Hi"}):
            pass
    first, second = worker.generates
    assert first.sampling.temperature == cluster.config.generation.temperature
    assert first.max_tokens == cluster.config.generation.max_tokens
    assert first.speculation.drafter == "auto"
    assert 0 <= first.sampling.seed <= MAX_SEED
    assert first.sampling.seed != second.sampling.seed


async def test_speculative_false_switches_drafting_off(cluster: Cluster, worker: FakeWorker) -> None:
    body = {"prompt": "Hi", "max_tokens": 1, "speculative": False}
    async with cluster.http.post("/generate", json=body) as response:
        assert (await response.json())["speculative_stats"]["enabled"] is False
    assert worker.generates[0].speculation.drafter == "none"


async def test_stream_sends_pieces_then_everything_else_then_done(cluster: Cluster, worker: FakeWorker) -> None:
    body = {"prompt": "Hi", "max_tokens": 4, "stream": True}
    async with cluster.http.post("/generate", json=body) as response:
        assert response.content_type == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["X-Request-Id"]
        lines = [line[6:] for line in (await response.text()).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    *pieces, last = (json.loads(line) for line in lines)
    assert "".join(event["text"] for event in pieces) == whole_text(4)
    assert last["finish_reason"] == "length"
    assert {"usage", "performance", "speculative_stats"} <= last.keys()
    assert "text" not in last


async def test_batch_answers_every_prompt_in_order(cluster: Cluster, worker: FakeWorker) -> None:
    body = {"prompts": ["a", "b", "c"], "max_tokens": 2, "seed": 3}
    async with cluster.http.post("/batch_generate", json=body) as response:
        answer: dict[str, Any] = await response.json()
    assert [result["text"] for result in answer["results"]] == [whole_text(2)] * 3
    assert answer["performance"]["completion_tokens"] == 6
    assert answer["performance"]["prompt_tokens"] == 3 * PROMPT_TOKENS
    assert [g.sampling.seed for g in worker.generates] == [3, 3, 3]


async def test_a_failing_prompt_of_a_batch_fails_alone(cluster: Cluster, worker: FakeWorker) -> None:
    def answer(generate: Generate) -> Failed | Finished | None:
        prompt = generate.prompt
        assert isinstance(prompt, ChatPrompt)
        if prompt.messages[0].content == "long":
            return Failed(request_id=generate.request_id, code="context_length_exceeded", message="9 > 8")
        return None

    worker.answer = answer
    body = {"prompts": ["a", "long", "c"], "max_tokens": 2}
    async with cluster.http.post("/batch_generate", json=body) as response:
        assert response.status == 200
        first, second, third = (await response.json())["results"]
    assert first["text"] == third["text"] == whole_text(2)
    assert second["error"]["code"] == "context_length_exceeded"


async def test_stream_is_kept_alive_while_the_model_loads(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.sse.KEEP_ALIVE_S", 0.02)
    cluster.supervisor.set("tiny", WorkerState.LOADING)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    body = {"prompt": "Hi", "max_tokens": 2, "stream": True}
    async with cluster.http.post("/generate", json=body) as response:
        assert response.status == 200
        assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        await cluster.serve_model("tiny#1")
        lines = (await response.text()).split("\n\n")
    assert 'data: {"text":"1 "}' in lines
    assert "data: [DONE]" in lines
