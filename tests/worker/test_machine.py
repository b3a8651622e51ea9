"""What MLX says of this machine, as the doctor reads it."""

from common.mlx_facts import MachineFacts, ask_worker


def test_doctor_understands_the_workers_facts() -> None:
    facts = ask_worker()
    assert isinstance(facts, MachineFacts), facts
    assert facts.computes
    assert facts.backend in ("cpu", "metal", "cuda")
    assert facts.backend in facts.description
