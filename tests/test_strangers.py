"""Who attaches to a pool by its socket?  Processes of its user that know its secret.

A stranger is another user's Python, or one of this user's without the secret.
"""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import NOBODY_UID, SYSTEM_PYTHON
from workers import until

import pyswap
from pyswap import address as addresses
from pyswap import config, protocol
from pyswap.address import Address
from pyswap.joining import attachment_for

pytestmark = pytest.mark.core

WAIT_S = 30

LISTENER = r"""
import array, json, socket, sys
name = sys.argv[1]
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.bind("\0" + name)
sock.listen(5)
print("listening", flush=True)
sock.settimeout(30)
line, _ = sock.accept()
line.settimeout(30)
data, rights, _, _ = line.recvmsg(1 << 17, socket.CMSG_LEN(64))
print(json.dumps([len(data), len(rights)]), flush=True)
"""

CONNECTER = r"""
import hashlib, hmac, json, socket, sys
name, secret = sys.argv[1:]
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(30)
sock.connect("\0" + name)
told = []
def hear():
    data, rights, _, _ = sock.recvmsg(1 << 17, socket.CMSG_LEN(64))
    told.append([data.decode(), len(rights)])
    return json.loads(data) if data else {}
try:
    sock.send(json.dumps({"op": "attach", "seq": 1, "nonce": "mine"}).encode())
    theirs = hear().get("nonce", "")
    said = f"client mine {theirs}".encode()
    shown = hmac.new(bytes.fromhex(secret), said, "sha256").hexdigest()
    sock.send(json.dumps({"op": "attach", "seq": 2, "proof": shown}).encode())
    hear()
except (BrokenPipeError, ConnectionResetError):
    pass
print(json.dumps(told))
"""


@contextmanager
def running(text: str, *arguments: str, uid: int) -> Iterator[subprocess.Popen[str]]:
    """A user's Python, which is ended after the block."""
    process = subprocess.Popen(
        [SYSTEM_PYTHON, "-c", text, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        env={"PATH": os.defpath},
        # Only root may say who it is to be.
        **({} if uid == os.geteuid() else {"user": uid, "group": uid, "extra_groups": []}),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def address_of(pool: pyswap.Pool) -> Address:
    found = pool._attachment.address
    assert isinstance(found, Address)
    assert len(bytes.fromhex(found.secret)) * 8 >= 128
    return found


def elsewhere(pool: pyswap.Pool) -> Address:
    """The address of a pool whose name somebody else has bound."""
    return address_of(pool)._replace(socket=f"pyswap.test.{os.urandom(8).hex()}")


def test_gets_another_user_anything_who_binds_the_name_first(
    pool: pyswap.Pool, require: Callable[[str], None]
) -> None:
    require("user")
    there = elsewhere(pool)
    with running(LISTENER, there.socket, uid=NOBODY_UID) as stranger:
        assert line_of(stranger) == "listening\n"
        with pytest.raises(PermissionError, match=f"is of uid {NOBODY_UID}"):
            attachment_for(there)
        # The connection and its end: no byte, no descriptor.
        assert json.loads(line_of(stranger)) == [0, 0]


def test_gets_an_impostor_anything_that_lacks_the_secret(pool: pyswap.Pool) -> None:
    there = elsewhere(pool)
    got: list[Any] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(f"\0{there.socket}")
        sock.listen(5)
        pid = os.fork()
        if pid == 0:
            # It proves with a secret of its own.
            status = 1
            try:
                line, _ = sock.accept()
                message, fds = protocol.receive(line)
                assert not fds
                assert there.secret not in json.dumps(message)
                wrong = addresses.proof("00" * 16, addresses.SERVER, message["nonce"], "n")
                protocol.send(line, {"seq": 1, "nonce": "n", "proof": wrong})
                assert line.recv(1000) == b"", "something came after a wrong proof"
                status = 0
            finally:
                os._exit(status)
        with pytest.raises(PermissionError, match="does not know its secret"):
            attachment_for(there)
        assert os.waitpid(pid, 0)[1] == 0
    assert not got


@pytest.mark.parametrize("knows", [False, True], ids=["a wrong secret", "the secret"])
def test_is_another_user_let_in(
    pool: pyswap.Pool, knows: bool, require: Callable[[str], None]
) -> None:
    require("user")
    there = address_of(pool)
    secret = there.secret if knows else "00" * 16
    # Who knows the secret and is of this user is let in by the same words.
    with running(CONNECTER, there.socket, there.secret, uid=os.geteuid()) as friend:
        assert json.loads(line_of(friend))[1][1] == 1, "descriptors came"
    with running(CONNECTER, there.socket, secret, uid=NOBODY_UID) as stranger:
        told = json.loads(line_of(stranger))
    assert not any(rights for _, rights in told)
    assert all("error" in text for text, _ in told if text)
    until(lambda: pool.stats().workers == 1, "nobody came in")


def test_is_a_newcomer_let_in_that_lacks_the_secret(pool: pyswap.Pool) -> None:
    there = address_of(pool)
    last = there.secret[-1]
    for wrong in ("00" * 16, there.secret[:-1] + ("0" if last != "0" else "1"), there.secret[2:]):
        with running(CONNECTER, there.socket, wrong, uid=os.geteuid()) as newcomer:
            (_, greeted), (refusal, got) = json.loads(line_of(newcomer))
        assert not greeted
        assert not got
        assert json.loads(refusal)["errno"] == errno.EPERM
    with addresses.open_line_to(there) as line:
        # What the pool has shown is no proof of ours.
        protocol.send(line, {"op": "attach", "seq": 1, "nonce": "mine"})
        greeting, _ = protocol.receive(line)
        protocol.send(line, {"op": "attach", "seq": 2, "proof": greeting["proof"]})
        answer, fds = protocol.receive(line)
        assert not fds
        assert (answer["error"], answer["errno"]) == ("OSError", errno.EPERM)
        assert line.recv(1000) == b""
    until(lambda: pool.stats().workers == 1, "nobody came in")


def test_does_the_door_stand_rubbish(pool: pyswap.Pool, seed: int) -> None:
    rng = random.Random(seed)
    there = address_of(pool)
    a = pool.full(10_000, 7, np.int64)
    silent = [addresses.open_line_to(there) for _ in range(config.ATTACH_PENDING + 5)]
    try:
        for _ in range(500):
            with addresses.open_line_to(there) as line:
                right = json.dumps({"op": "attach", "seq": 1, "nonce": "mine"}).encode()
                packet = bytearray(rng.choice([right, b'{"seq": 1, "proof": "x"}', right[:9]]))
                packet[rng.randrange(len(packet))] = rng.randrange(256)
                line.send(bytes(packet))
                told, rights, _, _ = line.recvmsg(config.MESSAGE_BYTES, socket.CMSG_LEN(64))
                assert not rights
                if b"error" not in told and told:
                    line.send(rng.randbytes(rng.randrange(1, 100)))
                    told, rights, _, _ = line.recvmsg(config.MESSAGE_BYTES, socket.CMSG_LEN(64))
                    assert not rights
                    assert b"error" in told or not told
    finally:
        for line in silent:
            line.close()
    assert pool.stats().workers == 1
    pool.advise(a, "pageout")
    assert (a == 7).all()
