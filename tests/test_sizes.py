"""Sizes: what people may write, what it means, and what is refused in which words."""

from __future__ import annotations

import numpy as np
import pytest

from pyswap.sizes import ADDRESS_SPACE_BYTES, format_size, parse_size

# More digits than Python converts to text.
HUGE = pytest.param(10**5000, id="huge")
HUGE_NEGATIVE = pytest.param(-(10**5000), id="huge negative")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("256 MiB", 256 << 20),
        ("256mib", 256 << 20),
        ("  256   MIB ", 256 << 20),
        ("2G", 2 << 30),
        ("2 g", 2 << 30),
        ("2Gi", 2 << 30),
        ("2 GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("64k", 64 << 10),
        ("64 KB", 64_000),
        ("64 KiB", 64 << 10),
        ("3 MB", 3_000_000),
        ("3M", 3 << 20),
        ("1T", 1 << 40),
        ("1 TB", 10**12),
        ("0.0625 P", 1 << 46),
        ("0.01 PB", 10**13),
        ("1.5 GiB", 3 << 29),
        (".5k", 512),
        ("1.k", 1024),
        ("+1k", 1024),
        ("4096", 4096),
        ("4096 B", 4096),
        ("0", 0),
        ("-0 MiB", 0),
    ],
)
def test_does_a_size_with_a_unit_parse(text: str, size_bytes: int) -> None:
    assert parse_size(text, what="memory") == size_bytes


def test_is_a_decimal_fraction_exact() -> None:
    # As a float, 1.1 * 10^12 is one byte off.
    assert parse_size("1.100000000001 TB", what="swap") == 1_100_000_000_001


def test_is_a_fraction_of_a_byte_dropped() -> None:
    assert parse_size("0.1 MiB", what="memory") == 104_857
    assert parse_size("0.5", what="memory") == 0


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, np.uint64, np.array])
def test_is_an_integer_of_numpy_a_size(kind: type) -> None:
    size = parse_size(kind(100), what="memory")
    assert size == 100
    assert type(size) is int


@pytest.mark.parametrize(
    "value",
    [True, np.True_, 1.0, np.float64(4096), None, b"1k", [4096], 1j, np.array([1, 2])],
    ids=repr,
)
def test_is_another_type_refused_with_its_name(value: object) -> None:
    with pytest.raises(TypeError, match=r"^swap must be an int .* not ") as caught:
        parse_size(value, what="swap")  # type: ignore[arg-type]
    assert type(value).__name__ in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "MiB",
        "much",
        "nan",
        "inf",
        "1e9",
        "0x100",
        "1_000",
        "1,5 GiB",
        "1.2.3",
        "1 MiBs",
        "1 iB",
        "1 i",
        "1 EB",
        "1 M iB",
        "2 GB 3",
        "--1",
        "1\u2009MiB",
        "\u0661k",
        "1 \u212a",
        "50%",
    ],
)
def test_is_unreadable_text_refused_and_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"^memory must be a size such as") as caught:
        parse_size(text, what="memory")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("value", [-1, "-1", "-1 GiB", "-0.25", np.int8(-3), HUGE_NEGATIVE])
def test_is_a_negative_size_refused(value: int | str) -> None:
    with pytest.raises(ValueError, match=r"^swap must not be negative, but is "):
        parse_size(value, what="swap")


@pytest.mark.parametrize(
    "value", [ADDRESS_SPACE_BYTES, "128T", "1 PB", "99999999999 P", 1 << 64, HUGE]
)
def test_is_a_size_over_the_address_space_refused(value: int | str) -> None:
    with pytest.raises(ValueError, match=r"^memory of .* the address space of 128.0 TiB$"):
        parse_size(value, what="memory")


def test_is_the_largest_size_below_the_address_space_taken() -> None:
    assert parse_size(ADDRESS_SPACE_BYTES - 1, what="swap") == ADDRESS_SPACE_BYTES - 1


@pytest.mark.parametrize("value", ["9" * 5000, "x" * 5000, HUGE, HUGE_NEGATIVE])
def test_does_a_message_stay_short_whatever_the_value(value: int | str) -> None:
    with pytest.raises(ValueError, match="memory") as caught:
        parse_size(value, what="memory")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (256 << 20, "256.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (128 << 40, "128.0 TiB"),
        (1 << 50, "1.0 PiB"),
        (1 << 62, "4096.0 PiB"),
    ],
)
def test_is_a_size_written_in_the_largest_unit_that_fits(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize("power", range(47))
def test_does_a_written_size_read_back(power: int) -> None:
    assert parse_size(format_size(1 << power), what="memory") == 1 << power
