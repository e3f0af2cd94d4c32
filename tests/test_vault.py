"""Is what was put into the vault there for a swapper that comes after?"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from pyswap import config
from pyswap.vault import Vault

pytestmark = pytest.mark.core


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vault]:
    """A vault with little room, whose descriptors go with it."""
    monkeypatch.setattr(config, "VAULT_BYTES", 1 << 15)
    ends = [end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    vault = Vault(*ends)
    yield vault
    vault._reader.close()
    vault._writer.close()


def fill(vault: Vault) -> int:
    """Put a descriptor in under one number after the other, as long as there is room."""
    count, why = 0, ""
    with open(os.devnull, "rb") as null:
        while not why and count < 10_000:
            try:
                vault.put("file", count, 0, {}, (null.fileno(),))
                count += 1
            except BlockingIOError as error:
                why = str(error)
    assert "net.core.wmem_max" in why
    return count


def numbers_in(vault: Vault) -> list[int]:
    found = vault.look()
    for deposit in found:
        deposit.close()
    return sorted(deposit.number for deposit in found)


def test_says_a_full_vault_so_and_keeps_what_it_has(small: Vault) -> None:
    count = fill(small)
    assert 8 <= count == small.held
    assert numbers_in(small) == list(range(count))
    assert small.held == count


def test_may_who_is_in_a_full_vault_put_more(small: Vault) -> None:
    count = fill(small)
    with open(os.devnull, "rb") as null:
        small.put("file", 0, 0, {}, (null.fileno(), null.fileno()))
    assert small.held == count + 1
    assert numbers_in(small) == list(range(count))


def test_is_there_room_again_in_a_full_vault_that_was_left(small: Vault) -> None:
    """The eldest stays, so that it has to be put behind before the others are taken out."""
    count = fill(small)
    for number in range(1, count):
        small.forget("file", number, 0)
    with open(os.devnull, "rb") as null:
        for number in range(count, 2 * count - 2):
            small.put("file", number, 0, {}, (null.fileno(),))
    assert [n for n in numbers_in(small) if n == 0 or n >= count] == [
        0,
        *range(count, 2 * count - 2),
    ]
    assert small.held < 2 * count
