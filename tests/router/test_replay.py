"""Workers that die, leave or lie: no lost and no doubled token, one end for every request."""

import asyncio
import json
from typing import Any

import pytest

from common.config import Config, ServerConfig
from common.messages import Accepted, Failed
from common.states import WorkerState
from tests.fakes import (
    FIRST_TOKEN_ID,
    Cluster,
    FakeWorker,
    failed,
    finished,
    piece,
    running_cluster,
    wait_until,
    whole_text,
)
from tests.router.client import received, replace_worker


async def ask(cluster: Cluster, **body: Any) -> tuple[int, dict[str, Any]]:
    async with cluster.http.post("/generate", json={"prompt": "Hi", "max_tokens": 6} | body) as response:
        return response.status, await response.json()


def start(cluster: Cluster, **body: Any) -> "asyncio.Task[tuple[int, dict[str, Any]]]":
    return asyncio.create_task(ask(cluster, **body))


async def test_dead_workers_request_goes_on_after_its_last_token(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 3
    answer = start(cluster, seed=11)
    await wait_until(lambda: received(cluster) == 3)
    second = await replace_worker(cluster, "tiny#2")
    status, body = await answer
    assert (status, body["text"]) == (200, whole_text(6))
    (first_try,), (second_try,) = worker.generates, second.generates
    assert second_try.resume == tuple(FIRST_TOKEN_ID + position for position in range(3))
    assert second_try.sampling == first_try.sampling
    assert second_try.prompt == first_try.prompt
    assert len(cluster.backend.journal) == 0


async def test_streamed_text_after_a_death_has_no_lost_or_doubled_token(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 4
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "stream": True}
    async with cluster.http.post("/v1/chat/completions", json=body) as response:
        await wait_until(lambda: received(cluster) == 4)
        await replace_worker(cluster, "tiny#2")
        lines = [line[6:] for line in (await response.text()).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == whole_text(9)
    assert sum("role" in delta for delta in deltas) == 1


async def test_late_frames_of_a_dead_worker_are_ignored_and_counted(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 2
    answer = start(cluster)
    await wait_until(lambda: received(cluster) == 2)
    cluster.supervisor.set("tiny", WorkerState.BACKOFF)
    await wait_until(lambda: cluster.backend.count_waiting("tiny") == 1)
    await worker.finish(worker.generates[0])
    ignored = cluster.backend.observers.ignored_frames
    await wait_until(lambda: ignored["unknown_identity"] == 7)
    assert received(cluster) == 2
    await cluster.serve_model("tiny#2")
    assert (await answer)[1]["text"] == whole_text(6)


async def test_worker_with_a_wrong_token_gets_no_request_and_no_ear(cluster: Cluster) -> None:
    liar = await cluster.add_worker("tiny#1", is_greeted=False)
    cluster.supervisor.set("tiny", WorkerState.READY, liar)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    await liar.hello(token="guessed")
    ignored = cluster.backend.observers.ignored_frames
    await wait_until(lambda: ignored["bad_hello"] == 1)
    answer = start(cluster)
    await wait_until(lambda: cluster.backend.count_waiting("tiny") == 1)
    await liar.send(Accepted(request_id="x", prompt_tokens=1))
    await wait_until(lambda: ignored["unknown_identity"] == 1)
    assert liar.generates == []
    await liar.hello()
    assert (await answer)[0] == 200


async def test_worker_whose_hello_was_lost_is_asked_for_it(cluster: Cluster) -> None:
    worker = await cluster.add_worker("tiny#1", is_greeted=False)
    cluster.supervisor.set("tiny", WorkerState.READY, worker)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    await worker.send(Accepted(request_id="x", prompt_tokens=1))
    await wait_until(lambda: worker.asked_hellos == 1)
    await worker.hello()
    assert (await start(cluster))[0] == 200


@pytest.mark.parametrize("changes", [{"version": 99}, {"identity": "tiny#7"}])
async def test_hello_of_another_version_or_name_is_refused(cluster: Cluster, changes: dict[str, Any]) -> None:
    stranger = await cluster.add_worker("tiny#1", is_greeted=False)
    await stranger.hello(**changes)
    await wait_until(lambda: cluster.backend.observers.ignored_frames["bad_hello"] == 1)
    assert not cluster.is_usable(stranger)


async def test_hello_may_come_before_the_table_that_vouches_for_it(cluster: Cluster) -> None:
    early = await cluster.add_worker("tiny#1")
    cluster.supervisor.set("tiny", WorkerState.READY, early)
    await wait_until(lambda: cluster.is_usable(early))
    assert (await ask(cluster))[0] == 200


async def test_unreadable_frame_is_ignored_and_the_request_is_done_over(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 2
    answer = start(cluster)
    await wait_until(lambda: received(cluster) == 2)
    worker.hold_at = None
    await worker.send_frame(b"\xc1")
    assert (await answer)[1]["text"] == whole_text(6)
    first, second = worker.generates
    assert worker.cancels == [first.request_id]
    assert second.request_id != first.request_id
    assert len(second.resume) == 2


async def test_request_that_is_there_at_two_deaths_is_poison(cluster: Cluster, worker: FakeWorker) -> None:
    worker.is_silent = True
    answer = start(cluster)
    await wait_until(lambda: worker.generates)
    cluster.supervisor.set("tiny", WorkerState.BACKOFF)
    await wait_until(lambda: cluster.backend.count_waiting("tiny") == 1)
    second = await cluster.add_worker("tiny#2")
    second.is_silent = True
    cluster.supervisor.set("tiny", WorkerState.READY, second)
    await wait_until(lambda: second.generates)
    cluster.supervisor.set("tiny", WorkerState.BACKOFF)
    status, body = await answer
    assert (status, body["error"]["code"]) == (500, "poison_request")


async def test_poison_fails_alone(cluster: Cluster, worker: FakeWorker) -> None:
    """Innocent requests that shared its workers are answered; the culprit is found within three replays."""
    worker.is_silent = True
    innocent = [start(cluster) for _ in range(3)]
    await wait_until(lambda: len(worker.generates) == 3)
    poison = start(cluster, prompt="poison")
    await wait_until(lambda: len(worker.generates) == 4)
    generation = 1
    while True:
        cluster.supervisor.set("tiny", WorkerState.BACKOFF)
        await wait_until(lambda: all(request.worker is None for request in cluster.backend.journal))
        if poison.done() or generation == 4:
            break
        generation += 1
        await serve_until_poisoned(cluster, f"tiny#{generation}", is_silent=generation == 2)
    status, body = await poison
    assert (status, body["error"]["code"]) == (500, "poison_request")
    assert generation <= 4
    await cluster.serve_model(f"tiny#{generation + 1}")
    assert [(status, body["text"]) for status, body in await asyncio.gather(*innocent)] == [(200, whole_text(6))] * 3


async def serve_until_poisoned(cluster: Cluster, identity: str, *, is_silent: bool) -> None:
    """A new worker, up to the moment at which the poison reaches it."""
    worker = await cluster.add_worker(identity)
    worker.is_silent = is_silent
    worker.answer = silent_for_poison
    cluster.supervisor.set("tiny", WorkerState.READY, worker)
    await wait_until(lambda: any("poison" in str(generate.prompt) for generate in worker.generates))


def silent_for_poison(generate: Any) -> Any:
    is_poison = "poison" in str(generate.prompt)
    return Accepted(request_id=generate.request_id, prompt_tokens=1) if is_poison else None


async def test_failed_model_ends_what_waits_for_it_with_its_detail(cluster: Cluster, worker: FakeWorker) -> None:
    worker.is_silent = True
    answer = start(cluster)
    await wait_until(lambda: worker.generates)
    cluster.supervisor.set("tiny", WorkerState.FAILED, detail="out of memory: 9 GB of 8 GB")
    status, body = await answer
    assert (status, body["error"]["code"]) == (503, "model_unavailable")
    assert "9 GB of 8 GB" in body["error"]["message"]


async def test_unfinished_request_of_an_unloaded_model_ends_with_503(cluster: Cluster, worker: FakeWorker) -> None:
    worker.is_silent = True
    answer = start(cluster)
    await wait_until(lambda: worker.generates)
    draining = WorkerState.DRAINING
    worker.entry = type(worker.entry)(identity="tiny#1", token=worker.entry.token, state=draining, pid=1)
    cluster.supervisor.set("tiny", draining, worker)
    cluster.supervisor.set("tiny", WorkerState.STOPPED)
    status, body = await answer
    assert status == 503
    assert "unloaded" in body["error"]["message"]


async def test_unfinished_request_of_a_model_that_gives_way_goes_on_in_its_next_turn(
    cluster: Cluster, worker: FakeWorker
) -> None:
    worker.hold_at = 2
    answer = start(cluster)
    await wait_until(lambda: received(cluster) == 2)
    draining = WorkerState.DRAINING
    worker.entry = type(worker.entry)(identity="tiny#1", token=worker.entry.token, state=draining, pid=1)
    cluster.supervisor.set("tiny", draining, worker, gives_way=True)
    cluster.supervisor.set("tiny", WorkerState.STOPPED, gives_way=True)
    await wait_until(lambda: cluster.supervisor.ensured)
    second = await replace_worker(cluster, "tiny#2")
    assert await answer == (200, {**(await answer)[1], "text": whole_text(6)})
    assert len(second.generates[0].resume) == 2


async def test_draining_worker_finishes_its_request(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 2
    answer = start(cluster)
    await wait_until(lambda: received(cluster) == 2)
    draining = WorkerState.DRAINING
    worker.entry = type(worker.entry)(identity="tiny#1", token=worker.entry.token, state=draining, pid=1)
    cluster.supervisor.set("tiny", draining, worker)
    await worker.finish(worker.generates[0], start=2)
    assert (await answer)[1]["text"] == whole_text(6)


async def test_request_that_a_stopping_worker_hands_back_goes_to_another(cluster: Cluster, worker: FakeWorker) -> None:
    worker.answer = failed("model_unavailable", "draining")
    answer = start(cluster)
    await wait_until(lambda: cluster.backend.count_waiting("tiny") == 1)
    await cluster.serve_model("tiny#2")
    assert (await answer)[1]["text"] == whole_text(6)


async def test_unasked_cancelled_is_no_end_for_the_client(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 2
    answer = start(cluster)
    await wait_until(lambda: received(cluster) == 2)
    await worker.send(finished(worker.generates[0].request_id, 2, "cancelled"))
    await wait_until(lambda: cluster.backend.count_waiting("tiny") == 1)
    await cluster.serve_model("tiny#2")
    assert (await answer)[1]["text"] == whole_text(6)


async def test_two_ends_of_one_request_are_one_end(cluster: Cluster, worker: FakeWorker) -> None:
    worker.is_silent = True
    answer = start(cluster)
    await wait_until(lambda: worker.generates)
    request_id = worker.generates[0].request_id
    await worker.send(finished(request_id, 0))
    await worker.send(Failed(request_id=request_id, code="internal_error", message="too late"))
    assert (await answer)[0] == 200
    worker.is_silent = False
    assert (await ask(cluster))[1]["text"] == whole_text(6)


async def test_model_is_loaded_on_demand_and_asked_for_once(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.STOPPED)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    answers = [start(cluster) for _ in range(5)]
    await wait_until(lambda: cluster.supervisor.ensured)
    cluster.supervisor.set("tiny", WorkerState.LOADING)
    await wait_until(lambda: cluster.backend.count_waiting("tiny") == 5)
    await cluster.serve_model("tiny#1")
    assert [status for status, _ in await asyncio.gather(*answers)] == [200] * 5
    assert [call.name for call in cluster.supervisor.ensured] == ["tiny"]


async def test_refused_load_is_the_answer_of_all_waiters(cluster: Cluster) -> None:
    cluster.supervisor.on_ensure = lambda call: "model_unavailable"
    cluster.supervisor.set("tiny", WorkerState.STOPPED)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    answers = await asyncio.gather(*(start(cluster) for _ in range(3)))
    assert [status for status, _ in answers] == [503] * 3


async def test_long_backoff_is_said_with_retry_after(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.BACKOFF, retry_after_s=30.5, detail="exit 1")
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    async with cluster.http.post("/generate", json={"prompt": "Hi"}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "31"


async def test_model_that_is_not_ready_in_time_is_unavailable() -> None:
    async with running_cluster(Config(server=ServerConfig(load_timeout_s=0.1))) as cluster:
        cluster.supervisor.set("tiny", WorkerState.LOADING)
        await wait_until(lambda: cluster.backend.directory.find("tiny"))
        status, body = await ask(cluster)
        assert status == 503
        assert "0.1 s" in body["error"]["message"]


async def test_deadline_cancels_the_request() -> None:
    async with running_cluster(Config(server=ServerConfig(request_timeout_s=0.1))) as cluster:
        worker = await cluster.serve_model("tiny#1")
        worker.hold_at = 1
        status, body = await ask(cluster)
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        await wait_until(lambda: worker.cancels == [worker.generates[0].request_id])


async def test_requests_are_spread_over_the_ready_workers(cluster: Cluster, worker: FakeWorker) -> None:
    second = await cluster.add_worker("tiny#2")
    cluster.supervisor.set("tiny", WorkerState.READY, worker, second)
    await wait_until(lambda: cluster.is_usable(second))
    worker.hold_at = second.hold_at = 1
    answers = [start(cluster) for _ in range(4)]
    await wait_until(lambda: len(worker.generates) == len(second.generates) == 2)
    for each in (worker, second):
        for generate in each.generates:
            await each.finish(generate, start=1)
    assert [body["text"] for _, body in await asyncio.gather(*answers)] == [whole_text(6)] * 4
    assert piece(0) == "0 "


async def test_worker_that_babbles_does_not_keep_a_request_for_ever(cluster: Cluster, worker: FakeWorker) -> None:
    worker.is_silent = True
    answer = start(cluster)
    while not answer.done():
        tries = len(worker.generates)
        await worker.send_frame(b"\xc1")
        await wait_until(lambda tries=tries: answer.done() or len(worker.generates) > tries)  # type: ignore[misc]
    status, body = await answer
    assert (status, len(worker.generates)) == (503, 8)
    assert "8 attempts" in body["error"]["message"]


async def test_request_that_every_worker_hands_back_ends_with_503(cluster: Cluster, worker: FakeWorker) -> None:
    worker.answer = failed("model_unavailable", "draining")
    answer = start(cluster)
    while not answer.done():
        await wait_until(lambda: answer.done() or cluster.backend.count_waiting("tiny"))
        cluster.supervisor.publish()
        await asyncio.sleep(0.01)
    assert (await answer)[0] == 503
    assert len(worker.generates) == 4


async def test_stuck_worker_is_passed_over_and_tried_again_later(
    cluster: Cluster, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = cluster.backend._socket.send
    monkeypatch.setattr(cluster.backend._socket, "send", lambda identity, message: False)
    answer = start(cluster)
    await wait_until(lambda: cluster.backend._unreachable == {"tiny#1"})
    monkeypatch.setattr(cluster.backend._socket, "send", send)
    cluster.supervisor.publish()
    assert (await answer)[1]["text"] == whole_text(6)
