"""The router's pure decisions: balancing, verdicts, trust, nesting."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.messages import Generate, TextPrompt, WorkerEntry, WorkerHello
from common.sampling import Sampling
from common.states import WorkerState
from router import balancer, verdict
from router.body import is_deeper
from router.journal import Journal, LiveRequest
from router.roster import MAX_STRANGERS, Roster


def live(name: str = "r", tokens: int = 0) -> LiveRequest:
    generate = Generate(request_id=name, prompt=TextPrompt(text="x" * 40), sampling=Sampling(), max_tokens=100)
    return LiveRequest(
        generate=generate, model="m", deliver=lambda event: True, started_s=0.0, token_ids=list(range(tokens))
    )


def test_least_loaded_worker_is_picked() -> None:
    assert balancer.pick({}) is None
    assert balancer.pick({"a": 3, "b": 1, "c": 2}) == "b"
    assert balancer.pick({"b": 1, "a": 1}) == "a"


def test_known_beginning_outweighs_as_much_other_work() -> None:
    assert balancer.pick({"a": 100, "b": 0}, {"a": 128}) == "a"
    assert balancer.pick({"a": 200, "b": 0}, {"a": 128}) == "b"


def test_beginnings_of_prompts_are_remembered_for_their_last_reader() -> None:
    memory, block = balancer.PrefixMemory(), balancer.BLOCK_CHARS
    shared = "s" * (2 * block)
    memory.remember(TextPrompt(text=shared + "a" * block), "w#1")
    assert memory.known_tokens(TextPrompt(text=shared + "b" * block), ["w#1", "w#2"]) == {"w#1": 256}
    assert memory.known_tokens(TextPrompt(text=shared + "b" * block), ["w#2"]) == {}
    assert memory.known_tokens(TextPrompt(text="x" + shared), ["w#1"]) == {}
    assert memory.known_tokens(TextPrompt(text=shared[: block - 1]), ["w#1"]) == {}
    memory.remember(TextPrompt(text=shared[:block]), "w#2")
    assert memory.known_tokens(TextPrompt(text=shared), ["w#1", "w#2"]) == {"w#2": 128, "w#1": 256}


def test_memory_of_beginnings_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "MAX_REMEMBERED", 3)
    memory = balancer.PrefixMemory()
    for letter in "abcd":
        memory.remember(TextPrompt(text=letter * balancer.BLOCK_CHARS), "w#1")
    known = [bool(memory.known_tokens(TextPrompt(text=x * balancer.BLOCK_CHARS), ["w#1"])) for x in "abcd"]
    assert known == [False, True, True, True]


def test_outstanding_tokens_shrink_as_tokens_arrive() -> None:
    request = live()
    assert request.outstanding_tokens() == 110  # 40 characters count as 10 tokens
    request.prompt_tokens = 20
    assert request.outstanding_tokens() == 120
    request.token_ids.extend(range(30))
    assert request.outstanding_tokens() == 70


def test_one_death_condemns_nobody() -> None:
    assert verdict.judge([live("a"), live("b")]) == []


def test_second_death_condemns_a_request_that_was_alone() -> None:
    request = live()
    assert verdict.judge([request]) == []
    assert verdict.judge([request]) == [request]


def test_second_death_condemns_the_only_suspect_not_the_newcomer() -> None:
    old, new = live("old"), live("new")
    verdict.judge([old])
    assert verdict.judge([old, new]) == [old]
    assert (new.deaths, new.is_isolated) == (1, False)


def test_several_suspects_are_isolated_and_the_next_death_names_the_culprit() -> None:
    culprit, innocent = live("c"), live("i")
    verdict.judge([culprit, innocent])
    assert verdict.judge([culprit, innocent]) == []
    assert culprit.is_isolated
    assert innocent.is_isolated
    assert verdict.judge([culprit]) == [culprit]


def test_isolated_request_is_cleared_well_past_its_death() -> None:
    request = live(tokens=5)
    verdict.judge([request])
    request.token_ids.extend(range(verdict.TOKENS_TO_CLEAR - 1))
    assert not verdict.is_cleared(request)
    request.token_ids.append(1)
    assert verdict.is_cleared(request)


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=30))
@example([{0, 1, 2, 3, 4}, {2, 4}, {0, 1, 2}, {0, 1, 2, 4}, {1, 3}, {0, 3}, {0}])
def test_nobody_survives_more_than_the_allowed_deaths(crashes: list[set[int]]) -> None:
    requests = [live(str(number)) for number in range(5)]
    gone: set[int] = set()
    for crash in crashes:
        aboard = [requests[number] for number in crash - gone]
        gone |= {int(condemned.request_id) for condemned in verdict.judge(aboard)}
    assert all(request.deaths <= verdict.MAX_DEATHS for request in requests)


def test_attempts_have_ids_of_their_own_and_resume_what_was_received() -> None:
    request = live(tokens=2)
    first, second = request.next_attempt(), request.next_attempt()
    assert first.request_id == "r"
    assert second.request_id == "r~1"
    assert second.resume == (0, 1)


def test_journal_knows_a_request_only_by_its_present_attempt() -> None:
    journal, request = Journal(), live()
    journal.add(request)
    request.next_attempt()
    journal.attach(request, "w#1")
    assert journal.find("r", "w#1") is request
    assert journal.find("r", "w#2") is None
    journal.detach(request)
    request.next_attempt()
    journal.attach(request, "w#2")
    assert journal.find("r", "w#1") is None
    assert journal.find("r~1", "w#2") is request
    journal.remove(request)
    assert len(journal) == 0
    assert journal.find("r~1", "w#2") is None


def entry(identity: str, token: str) -> WorkerEntry:
    return WorkerEntry(identity=identity, token=token, state=WorkerState.READY, pid=1)


def hello(identity: str, token: str) -> WorkerHello:
    return WorkerHello(identity=identity, token=token, model="m", pid=1)


def test_trust_needs_a_hello_and_an_entry_with_the_same_token() -> None:
    roster, workers = Roster(), {"w#1": entry("w#1", "secret")}
    assert not roster.is_trusted("w#1", workers)
    assert not roster.greet("w#1", hello("w#1", "wrong"), workers)
    assert roster.greet("w#1", hello("w#1", "secret"), workers)
    assert roster.is_trusted("w#1", workers)
    assert not roster.greet("w#1", hello("w#1", "wrong"), workers)
    assert roster.is_trusted("w#1", workers)
    assert not roster.is_trusted("w#1", {})


def test_strangers_hellos_are_bounded() -> None:
    roster = Roster()
    for number in range(MAX_STRANGERS + 10):
        roster.greet(f"s#{number}", hello(f"s#{number}", "x"), {})
    assert not roster.is_trusted("s#0", {"s#0": entry("s#0", "x")})
    assert roster.is_trusted("s#20", {"s#20": entry("s#20", "x")})


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_nesting_is_counted_exactly(opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    for depth, is_too_deep in ((64, False), (65, True)):
        assert is_deeper((opening * depth + "1" + closing * depth).encode(), 64) is is_too_deep


JSON = st.recursive(st.text('[]{}"\\a', max_size=8), lambda inner: st.lists(inner, max_size=3), max_leaves=20)


@settings(deadline=None)
@given(JSON, st.integers(1, 5))
def test_nesting_agrees_with_a_walk_of_the_value(value: object, limit: int) -> None:
    def depth(value: object) -> int:
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    assert is_deeper(json.dumps(value).encode(), limit) == (depth(value) > limit)
