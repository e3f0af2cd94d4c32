"""Do arrays go by reference, whoever started the process, and who is let in?"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NOBODY_UID
from workers import is_running, until

import pyswap
from pyswap import address as addresses
from pyswap import config, protocol, registry
from pyswap.address import Address
from pyswap.paged import PagedArray

METHODS = ("fork", "spawn", "forkserver")
JOIN_S = 60


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A pool with a name, in a registry of this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pyswap.Pool("8 MiB", "64 MiB", page_size=4096, name="named") as made:
        yield made


def regions(pool: Any) -> int:
    return len(pool.attachment.regions)


def in_another(function: Callable[..., Any], *args: Any, method: str = "spawn") -> Any:
    """Run a function in a process of its own, and wait for its end before the answer is read."""
    here: Connection[Any, Any]
    there: Connection[Any, Any]
    here, there = multiprocessing.Pipe()
    process: Any = multiprocessing.get_context(method).Process(
        target=_answer, args=(there, function, *args)
    )
    process.start()
    there.close()
    with here:
        data = here.recv_bytes() if here.poll(JOIN_S) else b""
        process.join(JOIN_S)
        assert process.exitcode == 0
        process.close()
        return pickle.loads(data)


def _answer(there: Connection[Any, Any], function: Callable[..., Any], *args: Any) -> None:
    there.send_bytes(ForkingPickler.dumps(function(*args)))
    there.close()


# By reference.


def touch(view: PagedArray) -> tuple[Any, ...]:
    told = type(view).__name__, view.shape, view.strides, view.dtype, view.flags.writeable
    if view.flags.writeable:
        view[...] = 7
    return told


VIEWS: dict[str, Callable[[Any], Any]] = {
    "all of it": lambda a: a,
    "a slice with steps": lambda a: a[3:50:5, 1::3],
    "backwards": lambda a: a[::-1, ::-2],
    "transposed": lambda a: a.T,
    "of another dtype": lambda a: a.view("2u2")[5:],
    "a column": lambda a: a[:, 7],
    "one item": lambda a: a[4:5, 5:6].reshape(()),
    "spread": lambda a: np.broadcast_to(a[2], (9, 60), subok=True),
}


def touch_all(views: list[Any]) -> list[Any]:
    return [touch(view) for view in views]


@pytest.mark.parametrize("method", METHODS)
def test_does_a_write_by_the_receiver_reach_the_sender(pool: Any, method: str) -> None:
    arrays = [pool.zeros((60, 60), np.int32, order) for order in "CF" for _ in VIEWS]
    views = [make(a) for a, make in zip(arrays, [*VIEWS.values()] * 2, strict=True)]
    expected = [np.zeros((60, 60), np.int32, "F" if a.flags.fnc else "C") for a in arrays]
    for plain, make in zip(expected, [*VIEWS.values()] * 2, strict=True):
        if make(plain).flags.writeable:
            make(plain)[...] = 7
    with multiprocessing.get_context(method).Pool(1) as processes:
        told = processes.apply(touch_all, (views,))
        processes.close()
        processes.join()
    for view, answer in zip(views, told, strict=True):
        assert answer == (
            "PagedArray", view.shape, view.strides, view.dtype, view.flags.writeable
        )  # fmt: skip
    for a, plain in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), plain)
    assert pool.stats().in_transit_bytes == 0
    until(lambda: pool.stats().workers == 1, "the processes leave")


def test_is_a_pickle_as_short_whatever_the_array() -> None:
    with pyswap.Pool("128 MiB", 0, page_size="1 MiB", overcommit=True) as pool:
        small, huge = pool.zeros(1 << 13), pool.zeros(1 << 37)
        assert (small.nbytes, huge.nbytes) == (64 << 10, 1 << 40)
        for version in range(pickle.HIGHEST_PROTOCOL + 1):
            sizes = [len(pickle.dumps(a, version)) for a in (small, huge)]
            assert abs(sizes[0] - sizes[1]) <= 64, sizes
        huge[1 << 36] = 5
        loaded = pickle.loads(pickle.dumps(huge))
        assert loaded[1 << 36] == 5
        assert np.shares_memory(loaded[:1], huge[:1])


def test_are_two_loads_the_same_memory_in_one_region(pool: Any) -> None:
    a = pool.zeros((100, 100))
    data = pickle.dumps(a[5:])
    one, two = pickle.loads(data), pickle.loads(data)
    assert one.ctypes.data == two.ctypes.data == a[5:].ctypes.data
    assert regions(pool) == 1
    address = a.ctypes.data
    kept = pickle.dumps(a)
    del a, one, two
    assert regions(pool) == 0
    again, more = pickle.loads(kept), pickle.loads(data)
    assert regions(pool) == 1
    assert more.ctypes.data == again.ctypes.data + 5 * 800
    assert type(again) is PagedArray
    assert address


def make_array(name: str, value: float) -> PagedArray:
    pool = pyswap.attach(name)
    assert isinstance(pool, pyswap.Pool)
    return pool.full(3000, value, name="fresh")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_does_a_fresh_array_outlive_the_process_that_made_it(named: Any, method: str) -> None:
    here: Connection[Any, Any]
    here, there = multiprocessing.Pipe()
    process: Any = multiprocessing.get_context(method).Process(
        target=_answer, args=(there, make_array, "named", 4.5)
    )
    process.start()
    there.close()
    assert here.poll(JOIN_S)
    process.join(JOIN_S)
    process.close()
    until(lambda: named.stats().workers == 1, "its process is gone")
    assert named.stats().in_transit_bytes == 24576
    a = pickle.loads(here.recv_bytes())
    here.close()
    assert (np.asarray(a) == 4.5).all()
    assert a.name == "fresh"
    assert named.stats().in_transit_bytes == 0
    del a
    until(lambda: named.stats().committed_bytes == 0, "nothing keeps it any more")


@pytest.mark.parametrize("loads", [0, 1, 3])
def test_what_if_a_pickle_is_loaded_so_often(pool: Any, loads: int) -> None:
    a = pool.full(1000, 3.0)
    data = pickle.dumps(a)
    assert pool.stats().in_transit_bytes == 8192
    del a
    for _ in range(loads):
        loaded = pickle.loads(data)
        assert loaded.sum() == 3000
        assert pool.stats().in_transit_bytes == 0
        if loads == 3:
            held = loaded
    loaded = held = None
    if loads == 0:
        assert pool.stats().committed_bytes == 8192
        assert pool.drop_transit(older_than_s=3600) == 0
        assert pool.drop_transit() == 1
        assert pool.stats().in_transit_bytes == 0
    until(lambda: pool.stats().committed_bytes == 0, "nothing keeps it any more")
    with pytest.raises(pyswap.GoneError, match="gone"):
        pickle.loads(data)
    # An array that has its number by now is another.
    other = pool.zeros(1000)
    with pytest.raises(pyswap.GoneError, match="gone"):
        pickle.loads(data)
    del other, held, loaded


def test_is_a_released_array_gone_for_its_pickles(pool: Any) -> None:
    a = pool.zeros(1000)
    data = pickle.dumps(a)
    pool.release(a)
    assert pool.stats().in_transit_bytes == 0
    with pytest.raises(pyswap.GoneError, match="gone"):
        pickle.loads(data)
    with pytest.raises(pyswap.GoneError, match="gone"):
        pickle.dumps(a)


def test_do_plain_views_and_private_arrays_pickle_by_value() -> None:
    with pyswap.Pool("8 MiB", "256 MiB", page_size=4096) as pool:
        a, mine = pool.ones(100), pool.ones(100, private=True)
        for by_value in (np.asarray(a), mine, mine[::2], copy.deepcopy(a)):
            loaded = pickle.loads(pickle.dumps(by_value))
            assert type(loaded) is np.ndarray
            assert not np.shares_memory(loaded, by_value)
        large = pool.zeros((64 << 20) + 1, np.uint8, private=True)
        with pytest.raises(TypeError, match=r"snapshot\(\).*shared array"):
            pickle.dumps(large)
        assert len(pickle.dumps(large[:100])) < 1000
        assert pool.stats().in_transit_bytes == 0


def test_does_a_file_s_array_stay_read_only_elsewhere(pool: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5000))
    a = pool.open_npy(tmp_path / "a.npy")
    data = pickle.dumps(a)
    assert in_another(total_of, data) == (np.arange(5000).sum(), False)
    assert pool.stats().in_transit_bytes == 0


def total_of(data: bytes) -> tuple[int, bool]:
    a = pickle.loads(data)
    with contextlib.suppress(ValueError):
        a.flags.writeable = True
    return int(a.sum()), a.flags.writeable


# The usual ways between processes.


def add_one(a: PagedArray) -> PagedArray:
    a += 1
    return a[:10]


def test_does_an_executor_hand_arrays_on(pool: Any) -> None:
    a = pool.zeros(1000)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        parts = list(executor.map(add_one, [a, a, a]))
    assert (np.asarray(a) == 3).all()
    assert all(part.ctypes.data == a.ctypes.data for part in parts)
    assert pool.stats().in_transit_bytes == 0


def serve(inbox: Any, outbox: Any) -> None:
    outbox.put(add_one(inbox.get(timeout=JOIN_S)))


def test_do_queues_hand_arrays_on(pool: Any) -> None:
    a = pool.zeros(1000)
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=serve, args=(inbox, outbox))
    process.start()
    inbox.put(a)
    part = outbox.get(timeout=JOIN_S)
    process.join(JOIN_S)
    process.close()
    assert part.ctypes.data == a.ctypes.data
    assert (np.asarray(a) == 1).all()
    for queue in (inbox, outbox):
        queue.close()
        queue.join_thread()


def test_do_joblib_and_cloudpickle_take_references(pool: Any) -> None:
    joblib = pytest.importorskip("joblib")
    cloudpickle = pytest.importorskip("cloudpickle")
    loky = pytest.importorskip("joblib.externals.loky")
    a, b = pool.ones(5000), pool.ones(5000)
    assert joblib.hash(a) == joblib.hash(b)
    b[3] = 2
    assert joblib.hash(a) != joblib.hash(b)
    assert pool.stats().in_transit_bytes == 0
    closure = pickle.loads(cloudpickle.dumps(lambda: a))
    assert closure().ctypes.data == a.ctypes.data
    try:
        parts = joblib.Parallel(n_jobs=2, backend="loky", max_nbytes=100)(
            joblib.delayed(add_one)(x) for x in (a, b)
        )
    finally:
        loky.get_reusable_executor().shutdown(wait=True)
    assert (np.asarray(a) == 2).all()
    assert [part.ctypes.data for part in parts] == [a.ctypes.data, b.ctypes.data]
    assert pool.stats().in_transit_bytes == 0
    # Its trackers of named resources would outlive the test.
    tracker = pytest.importorskip("joblib.externals.loky.backend.resource_tracker")
    tracker._resource_tracker._stop()


# By name.


def look(name: str) -> Any:
    a = pyswap.attach(name)
    assert isinstance(a, PagedArray)
    a[0] = 9
    return a.name, a.shape, a.strides, a.dtype


def test_is_an_array_found_by_its_name(named: Any) -> None:
    a = named.zeros((30, 40), "f4", name="grid")
    turned = named.asarray(np.ones((4, 5), order="F"), name="turned")
    assert a.name == a[3:].name == "grid"
    assert named.zeros(3).name is None
    assert in_another(look, "named/grid") == ("grid", a.shape, a.strides, a.dtype)
    assert (a[0] == 9).all()
    assert in_another(look, "named/turned")[1:3] == (turned.shape, turned.strides)
    assert pyswap.attach("named/grid").ctypes.data == a.ctypes.data  # type: ignore[union-attr]
    assert pyswap.attach("named") is named
    twin = named.zeros(3, name="grid")
    with pytest.raises(ValueError, match="several"):
        pyswap.attach("named/grid")
    del twin
    with pytest.raises(pyswap.GoneError, match="no array 'nothing'"):
        pyswap.attach("named/nothing")
    with pytest.raises(pyswap.PoolClosedError, match="no pool 'nowhere'"):
        pyswap.attach("nowhere")
    with pytest.raises(TypeError, match="must be a str"):
        pyswap.attach(3)  # type: ignore[arg-type]


def close_there(name: str) -> bool:
    pool = pyswap.attach(name)
    assert isinstance(pool, pyswap.Pool)
    a = pool.ones(10)
    pool.close()
    with pytest.raises(pyswap.PoolClosedError):
        pool.zeros(3)
    return float(a.sum()) == 10


def test_does_closing_an_attached_pool_end_that_process_s_use_only(named: Any) -> None:
    assert in_another(close_there, "named")
    assert named.zeros(3).sum() == 0
    assert pickle.loads(pickle.dumps(named)) is named


def test_are_two_pools_of_one_name_told_apart(named: Any) -> None:
    with (
        pyswap.Pool("8 MiB", "8 MiB", page_size=4096, name="named"),
        pytest.raises(pyswap.Error, match="2 pools are called"),
    ):
        pyswap.attach("named")
    until(lambda: len(os.listdir(registry.folder())) == 1, "the other's entry goes")
    assert pyswap.attach("named") is named


# Who is let in.


def test_is_a_closed_pool_told_from_a_pool_that_is_gone(named: Any) -> None:
    a, b = named.ones(10), named.ones(10)
    data = pickle.dumps(a)
    there = Address(*named.address())
    named.close()
    with pytest.raises(pyswap.PoolClosedError, match="closed"):
        pickle.dumps(a)
    # What this process has it may go on with.
    assert pickle.loads(data).ctypes.data == a.ctypes.data
    assert in_another(refusal, data) == ("PoolClosedError", "it was closed")
    del a, b
    until(lambda: addresses.is_gone(there), "the swapper ends")
    with pytest.raises(pyswap.PoolClosedError, match="has ended"):
        pickle.loads(data)
    with pytest.raises(pyswap.PoolClosedError, match="no pool 'named'"):
        pyswap.attach("named")
    assert os.listdir(registry.folder()) == []


def refusal(data: bytes) -> tuple[str, str]:
    try:
        pickle.loads(data)
    except Exception as error:  # noqa: BLE001 - which one is the question.
        return type(error).__name__, str(error).partition("since ")[2].partition(":")[0]
    return "none", ""


def test_is_another_host_named(pool: Any) -> None:
    there = Address(*pool.address())._replace(machine="another", host="elsewhere")
    with pytest.raises(pyswap.Error, match=r"on host 'elsewhere'.*do not leave their"):
        addresses.open_line_to(there)


def test_is_another_network_namespace_named(
    pool: Any, require: Callable[[str], None], tmp_path: Path
) -> None:
    require("root")
    (tmp_path / "a").write_bytes(pickle.dumps(pool.zeros(10)))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    told = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", code, str(tmp_path / "a")],
        capture_output=True, text=True, check=False, timeout=JOIN_S,
    )  # fmt: skip
    assert "pyswap.errors.Error" in told.stderr
    assert "is in another network namespace" in told.stderr


def as_nobody(function: Callable[[], str]) -> str:
    """What a function answers in a child of another uid."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(NOBODY_UID, NOBODY_UID, NOBODY_UID)
            os.write(writing, function().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf8") as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return said


def test_is_another_user_refused_by_both_ends(pool: Any, require: Callable[[str], None]) -> None:
    require("root")
    there = Address(*pool.address())

    def politely() -> str:
        try:
            addresses.open_line_to(there)
        except PermissionError as error:
            return str(error)
        return "let in"

    def rudely() -> str:
        """One that knows the secret, and does not look who answers."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(JOIN_S)
        sock.connect(f"\0{there.socket}")
        return str(protocol.receive(sock)[0])

    assert f"is of uid 0, and this process of uid {NOBODY_UID}" in as_nobody(politely)
    assert f"the pool is not of uid {NOBODY_UID}" in as_nobody(rudely)


def newcomer(there: Address) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(JOIN_S)
    addresses.connect_to(sock, there)
    return sock


def test_is_who_does_not_know_the_secret_kept_out(named: Any) -> None:
    there = Address(*named.address())
    with newcomer(there) as sock:
        protocol.send(sock, {"op": "attach", "seq": 1, "nonce": "a"})
        greeting, _ = protocol.receive(sock)
        # What the swapper has just shown is no proof of ours.
        protocol.send(sock, {"op": "attach", "seq": 2, "proof": greeting["proof"]})
        answer, fds = protocol.receive(sock)
        assert (answer["error"], fds) == ("OSError", [])
        with pytest.raises(ConnectionError):
            protocol.receive(sock)
    for rubbish in ({"seq": 1}, {"seq": 1, "nonce": ""}, {"seq": 1, "nonce": 7}):
        with newcomer(there) as sock:
            protocol.send(sock, rubbish)
            assert protocol.receive(sock)[0]["error"] == "ValueError"
    with newcomer(there) as sock:
        protocol.send(sock, {"op": "create", "seq": 1, "address": 1 << 30, "size": 1, "name": ""})
        assert "error" in protocol.receive(sock)[0]
    assert named.stats().workers == 1


def test_does_a_stranger_who_listens_in_its_place_learn_nothing(named: Any) -> None:
    sock, its = addresses.listen("named")
    sock.setblocking(True)
    there = its._replace(secret=Address(*named.address()).secret)
    heard: list[Any] = []
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            theirs, _ = sock.accept()
            message, _ = protocol.receive(theirs)
            forged = addresses.proof(its.secret, addresses.SERVER, message["nonce"], "b")
            protocol.send(theirs, {"seq": 1, "nonce": "b", "proof": forged})
            with contextlib.suppress(ConnectionError):
                heard.append(protocol.receive(theirs))
        os._exit(len(heard))
    sock.close()
    with pytest.raises(PermissionError, match="does not know its secret"):
        pickle.loads(pickle.dumps(LoadsAt(there)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class LoadsAt:
    """Pickles as an array of a pool somewhere."""

    def __init__(self, there: Address) -> None:
        self.there = there

    def __reduce__(self) -> Any:
        from pyswap.reference import load

        return load, (tuple(self.there), 0, 1, 4096, 0, (1,), (8,), np.dtype(float), True)


def test_do_newcomers_who_say_nothing_keep_nobody_out(named: Any) -> None:
    a = named.zeros(10)
    silent = [newcomer(Address(*named.address())) for _ in range(2 * config.ATTACH_PENDING)]
    # The eldest make room at once.
    silent[0].settimeout(config.ATTACH_WAIT_S / 2)
    assert silent[0].recv(1) == b""
    data = pickle.dumps(a)
    assert in_another(touch_pickled, data) == 10
    assert (np.asarray(a) == 7).all()
    # The others go when they have had their time.
    silent[-1].settimeout(4 * config.ATTACH_WAIT_S)
    assert silent[-1].recv(1) == b""
    for sock in silent:
        sock.close()
    until(lambda: named.stats().workers == 1, "its process is gone")


def touch_pickled(data: bytes) -> int:
    a = pickle.loads(data)
    a[...] = 7
    return len(a)


def test_is_a_full_pool_told_to_a_newcomer(pool: Any) -> None:
    with pyswap.Pool("512 KiB", "1 MiB", page_size=4096) as small:
        most = (128 - 32) // 4
        there = Address(*small.address())
        places = [admitted(there) for _ in range(most - 1)]
        with pytest.raises(pyswap.Error, match=f"has {most} processes"):
            admitted(there)
        for sock in places:
            sock.close()
        until(lambda: small.stats().workers == 1, "their places are free")
        admitted(there).close()


def admitted(there: Address) -> socket.socket:
    """One that proves itself, and is never heard of again."""
    sock = newcomer(there)
    try:
        protocol.send(sock, {"op": "attach", "seq": 1, "nonce": "a"})
        theirs = protocol.receive(sock)[0]["nonce"]
        shown = addresses.proof(there.secret, addresses.CLIENT, "a", theirs)
        protocol.send(sock, {"op": "attach", "seq": 2, "proof": shown})
        answer, fds = protocol.receive(sock)
        for fd in fds:
            os.close(fd)
        protocol.raise_reply(answer)
    except BaseException:
        sock.close()
        raise
    return sock


def test_can_what_attaches_not_write_the_tables(pool: Any) -> None:
    there = Address(*pool.address())
    with newcomer(there) as sock:
        protocol.send(sock, {"op": "attach", "seq": 1, "nonce": "a"})
        theirs = protocol.receive(sock)[0]["nonce"]
        shown = addresses.proof(there.secret, addresses.CLIENT, "a", theirs)
        protocol.send(sock, {"op": "attach", "seq": 2, "proof": shown})
        _, fds = protocol.receive(sock)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fds[0], b"x", 0)
        for fd in fds:
            os.close(fd)


# The registry.


def test_is_a_folder_that_others_may_use_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    for plant in (
        lambda path: path.symlink_to(elsewhere),
        lambda path: path.write_text("a file"),
        lambda path: (path.mkdir(), path.chmod(0o777)),
    ):
        path = tmp_path / "pyswap"
        plant(path)
        caplog.clear()
        with pyswap.Pool("8 MiB", "8 MiB", page_size=4096, name="shy") as pool:
            assert "cannot be attached by its name" in caplog.text
            a = pool.ones(3)
            assert in_another(touch_pickled, pickle.dumps(a)) == 3
            with pytest.raises(OSError, match=r"pyswap"):
                pyswap.attach("shy")
        assert list(elsewhere.iterdir()) == []
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_is_what_a_killed_pool_left_in_the_registry_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    code = """if True:
        import os, signal, pyswap
        pool = pyswap.Pool("8 MiB", "8 MiB", page_size=4096, name="killed")
        assert len(os.listdir(os.environ["XDG_RUNTIME_DIR"] + "/pyswap")) == 1
        # Were it killed here, this process might have another one started before its own end.
        os.kill(pool.swapper_pid, signal.SIGSTOP)
        print(pool.swapper_pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    told = subprocess.run(
        [sys.executable, "-c", code], check=False, timeout=JOIN_S, stdout=subprocess.PIPE, text=True
    )
    assert told.returncode == -9
    os.kill(int(told.stdout), signal.SIGKILL)
    until(lambda: not is_running(int(told.stdout)), "the swapper ends")
    left = [*registry.folder().iterdir()]
    assert [path.stat().st_mode & 0o777 for path in left] == [0o600]
    # What was on its way between the dead, the kernel closes when it comes to it.
    socket_name = f" @{left[0].name.removesuffix('.pool')}\n"
    until(lambda: socket_name not in Path("/proc/net/unix").read_text(), "nobody listens")
    with pytest.raises(pyswap.PoolClosedError, match="no pool 'killed'"):
        pyswap.attach("killed")
    assert [*registry.folder().iterdir()] == []


# A takeover.


def test_do_pickles_on_their_way_outlive_the_swapper(named: Any) -> None:
    a, b = named.full(1000, 3.0), named.full(1000, 4.0)
    data, other = pickle.dumps(a), pickle.dumps(b)
    del a
    before = named.swapper_pid
    os.kill(before, signal.SIGKILL)
    until(lambda: named.swapper_pid != before, "another swapper takes over")
    assert named.stats().in_transit_bytes == 16384
    loaded = pickle.loads(data)
    assert (np.asarray(loaded) == 3.0).all()
    # Newcomers find the socket where it was.
    assert in_another(touch_pickled, other) == 1000
    assert (np.asarray(b) == 7).all()
    assert named.stats().in_transit_bytes == 0
    del loaded, b
    until(lambda: named.stats().committed_bytes == 0, "nothing keeps them any more")
