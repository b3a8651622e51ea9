"""Who is loaded and who has to go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.supervisor import policy
from router.supervisor.policy import Admit, Candidate, Decision, Evict, Refuse, Resident, Wait

BUDGET = 100  # soft limit 85, hard limit 95


def new(need: int) -> Candidate:
    return Candidate(name="new", need_bytes=need)


def held(name: str, size: int, last_used: float = 0.0, **flags: bool) -> Resident:
    return Resident(name=name, charge_bytes=size, last_used=last_used, **flags)


@pytest.mark.parametrize(
    ("need", "residents", "kind", "names"),
    [
        pytest.param(85, [], Admit, (), id="alone within the soft limit"),
        pytest.param(95, [], Admit, (), id="alone within the hard limit"),
        pytest.param(96, [], Refuse, (), id="can never fit"),
        pytest.param(96, [held("a", 90)], Refuse, (), id="can never fit, so nobody goes for it"),
        pytest.param(45, [held("a", 40)], Admit, (), id="both fit"),
        pytest.param(46, [held("a", 40)], Evict, ("a",), id="over the soft limit the idle one goes"),
        pytest.param(40, [held("a", 40, 2), held("b", 40, 1)], Evict, ("b",), id="least recently used goes"),
        pytest.param(80, [held("a", 40, 2), held("b", 40, 1)], Evict, ("b", "a"), id="both must go"),
        pytest.param(40, [held("a", 10, 1), held("b", 60, 2)], Evict, ("b",), id="small old one is spared"),
        pytest.param(40, [held("a", 40, 1, is_busy=True), held("b", 40, 2)], Evict, ("b",), id="busy one stays"),
        pytest.param(40, [held("a", 40, 1, is_pinned=True), held("b", 40, 2)], Evict, ("b",), id="pinned stays"),
        pytest.param(40, [held("a", 40, 1, is_awaited=True), held("b", 40, 2)], Evict, ("b",), id="awaited one stays"),
        pytest.param(40, [held("a", 40, 1, is_ready=False), held("b", 40, 2)], Evict, ("b",), id="loading one stays"),
        pytest.param(60, [held("a", 60, is_busy=True)], Wait, (), id="busy one is waited for"),
        pytest.param(60, [held("a", 60, is_pinned=True)], Wait, (), id="pinned one is never evicted"),
        pytest.param(
            80,
            [held("a", 10, 1), held("b", 60, 2, is_busy=True)],
            Wait,
            (),
            id="no eviction that cannot help",
        ),
        pytest.param(
            40,
            [held("a", 40, 1, is_leaving=True), held("b", 40, 2)],
            Wait,
            (),
            id="leaving one is waited for",
        ),
        pytest.param(
            60,
            [held("a", 40, 1, is_leaving=True), held("b", 40, 2)],
            Evict,
            ("b",),
            id="leaving one is not enough",
        ),
        pytest.param(50, [held("a", 40, is_busy=True)], Admit, (), id="busy, but within the hard limit"),
    ],
)
def test_decision(need: int, residents: list[Resident], kind: type[Decision], names: tuple[str, ...]) -> None:
    decision = policy.decide(new(need), residents, BUDGET)
    assert type(decision) is kind
    if isinstance(decision, Evict):
        assert decision.names == names


def turn(name: str, size: int, since: float, **flags: bool) -> Resident:
    return Resident(name=name, charge_bytes=size, ready_since=since, is_busy=True, **({"has_had_turn": True} | flags))


@pytest.mark.parametrize(
    ("is_due", "residents", "names"),
    [
        pytest.param(True, [turn("a", 60, 1)], ("a",), id="its turn is over"),
        pytest.param(False, [turn("a", 60, 1)], None, id="nobody has waited for long"),
        pytest.param(True, [turn("a", 60, 1, has_had_turn=False)], None, id="its turn goes on"),
        pytest.param(True, [turn("a", 60, 1, is_pinned=True)], None, id="pinned stays"),
        pytest.param(True, [turn("a", 60, 1, is_awaited=True)], None, id="awaited stays"),
        pytest.param(True, [turn("a", 45, 2), turn("b", 45, 1)], ("b",), id="who is loaded for longest"),
        pytest.param(True, [turn("a", 45, 2), held("b", 45, 9)], ("b",), id="the idle before the busy"),
    ],
)
def test_busy_models_take_turns(is_due: bool, residents: list[Resident], names: tuple[str, ...] | None) -> None:
    decision = policy.decide(Candidate("new", 45, is_due=is_due), residents, BUDGET)
    assert decision == Evict(names) if names else isinstance(decision, Wait)


def test_refusal_says_need_limit_and_what_to_do() -> None:
    decision = policy.decide(new(3 * policy.GIB), [], 2 * policy.GIB)
    assert isinstance(decision, Refuse)
    for part in ("3.00 GB", "2.00 GB", "1.90 GB", "supervisor.memory_limit_gb"):
        assert part in decision.detail


def test_waiting_says_for_whom() -> None:
    busy = [held("b", 30, is_busy=True), held("a", 30, is_pinned=True), held("c", 30)]
    decision = policy.decide(new(50), busy, BUDGET)
    assert isinstance(decision, Wait)
    assert "busy or pinned: a, b" in decision.detail


def test_two_waiters_share_one_eviction() -> None:
    residents = [held("old", 60, 1), held("newer", 20, 2)]
    decision = policy.decide(new(25), residents, BUDGET)
    assert decision == Evict(("old",))
    leaving = [held("old", 60, 1, is_leaving=True), held("newer", 20, 2)]
    assert isinstance(policy.decide(new(25), leaving, BUDGET), Wait)
    second = [held("first", 25, is_ready=False), held("newer", 20, 2)]
    assert policy.decide(new(25), second, BUDGET) == Admit()


def test_queue_is_first_come_first_served_with_restarts_first() -> None:
    queue = [
        Candidate("late", 1, asked_at=3),
        Candidate("early", 1, asked_at=1),
        Candidate("crashed", 1, asked_at=9, is_restart=True),
    ]
    assert [c.name for c in policy.in_order(queue)] == ["crashed", "early", "late"]


def test_kv_share_is_equal_and_never_nothing() -> None:
    gib = policy.GIB
    assert policy.kv_share(100 * gib, 25 * gib, 2, 0) == 30 * gib
    assert policy.kv_share(100 * gib, 99 * gib, 2, 0) == policy.LEAST_KV_BYTES
    assert policy.kv_share(100 * gib, 25 * gib, 2, 1.5) == int(1.5 * gib)
    assert policy.cache_share(8 * gib) == gib
    assert policy.cache_share(800 * gib) == policy.MOST_CACHE_BYTES


residents = st.lists(
    st.builds(
        Resident,
        name=st.uuids().map(str),
        charge_bytes=st.integers(0, 100),
        last_used=st.floats(0, 100),
        is_ready=st.booleans(),
        is_busy=st.booleans(),
        is_pinned=st.booleans(),
        is_awaited=st.booleans(),
        is_leaving=st.booleans(),
        ready_since=st.floats(0, 100),
        has_had_turn=st.booleans(),
    ),
    max_size=8,
)


@given(residents, st.integers(0, 120), st.integers(1, 200), st.booleans())
def test_promises_hold_for_any_fleet(fleet: list[Resident], need: int, budget: int, is_due: bool) -> None:
    candidate = Candidate("new", need, is_due=is_due)
    used = sum(r.charge_bytes for r in fleet)
    hard = int(policy.HARD_SHARE * budget)
    match policy.decide(candidate, fleet, budget):
        case Admit():
            assert used + need <= hard
        case Evict(names):
            victims = [r for r in fleet if r.name in names]
            assert len(victims) == len(names) > 0
            assert all(v.may_go or (is_due and v.may_give_way) for v in victims)
            gone = sum(r.charge_bytes for r in fleet if r.is_leaving) + sum(v.charge_bytes for v in victims)
            assert used - gone + need <= hard
            after = [r for r in fleet if r not in victims and not r.is_leaving]
            assert policy.decide(candidate, after, budget) == Admit()
        case Wait():
            assert used + need > int(policy.SOFT_SHARE * budget)
            idle = sum(r.charge_bytes for r in fleet if r.may_go or r.is_leaving or (is_due and r.may_give_way))
            is_coming = any(r.is_leaving for r in fleet)
            assert is_coming or used - idle + need > hard
        case Refuse():
            assert need > hard
