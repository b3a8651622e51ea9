"""Sizes, counts and ages as people read them."""

import pytest

from router.units import age, in_binary_units, in_units, in_words


@pytest.mark.parametrize(
    ("size", "decimal", "binary"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1000, "1.0 kB", "1.0 KiB"),
        (5 << 20, "5.2 MB", "5.0 MiB"),
        (1500 << 20, "1.6 GB", "1.5 GiB"),
        (512 << 30, "550 GB", "512 GiB"),
        (5000 << 40, "5498 TB", "5000 TiB"),
    ],
)
def test_sizes(size: int, decimal: str, binary: str) -> None:
    assert (in_units(size), in_binary_units(size)) == (decimal, binary)


def test_counts() -> None:
    assert [in_words(n) for n in (7, 132_928, 134_515_008, 8.03e9)] == [
        "7",
        "133 thousand",
        "135 million",
        "8.0 billion",
    ]


def test_ages() -> None:
    assert [age(s) for s in (-1, 59, 61, 3700, 90000)] == ["0s", "59s", "1m01s", "1h01m", "1d01h"]
