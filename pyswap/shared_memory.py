"""`SharedMemory` and `ShareableList`: those of `multiprocessing.shared_memory`, in a pool.

They may be swapped, and count against the default pool's budget. One difference: a block lives
until `unlink`, or until its pool ends, which is with the process that made the pool; the standard
ones outlive all processes. A file in this user's registry has its name and where it is.
"""

from __future__ import annotations

import errno
import operator
import os
import secrets
import types
from contextlib import suppress
from multiprocessing import shared_memory as standard
from typing import TYPE_CHECKING, Any

from . import registry
from .default import default_pool
from .errors import Error, GoneError, PoolClosedError
from .joining import attachment_for

if TYPE_CHECKING:
    from ._native import native
    from .worker import Attachment

__all__ = ["ShareableList", "SharedMemory"]

NAME_BYTES = 255
"""Of the longest name that shm_open() takes."""


class SharedMemory:
    """A block of shared memory in the default pool; as `multiprocessing.shared_memory` has it.

    Parameters
    ----------
    name : str, optional
        What processes of this user find it by; a new block's is made up where there is none.
    create : bool, optional
        Make a new block, rather than attach to one that is there.
    size : int, optional
        Bytes of a new block; of no meaning otherwise.
    track : bool, optional
        Of no meaning: no process but the one that calls `unlink` ever removes a block.

    Raises
    ------
    ValueError
        If `size` is negative, or 0 for a new block, or there is no name to attach to.
    FileExistsError
        If a new block's name is taken.
    FileNotFoundError
        If there is no block of that name, or its pool has ended.
    OSError
        If the name is empty, too long, or has a slash in it, but at its beginning.
    """

    _buf: memoryview | None = None
    _region: native.Region | None = None

    def __init__(
        self, name: str | None = None, create: bool = False, size: int = 0, *, track: bool = True
    ) -> None:
        if not size >= 0:
            raise ValueError("'size' must be a positive integer")
        if create:
            size = operator.index(size)
        if create and size == 0:
            raise ValueError("'size' must be a positive number different from zero")
        if name is None and not create:
            raise ValueError("'name' can only be None if create=True")
        if name is not None:
            _check_name(name, create)
        self._attachment: Attachment
        if create:
            self._create(name, size)
        else:
            assert name is not None
            self._attach(name)
        assert self._region is not None
        self._buf = memoryview(self._region)[: self._size]

    def _create(self, name: str | None, size: int) -> None:
        self._attachment = attachment = default_pool().attachment
        self._region = attachment.new_region(size, f"shared memory {name or ''}"[:48])
        number, generation, _, mapped = attachment.regions[self._region.address]
        self._key, self._size = (number, generation, mapped), size
        record = {"address": attachment.address, "key": self._key, "size": size}
        attachment.call("keep", object=number, generation=generation, kept=True)
        try:
            while True:
                self._name = name if name is not None else f"psm_{secrets.token_hex(8)}"
                try:
                    registry.claim(self._name, record)
                    return
                except FileExistsError:
                    if name is not None:
                        raise
        except BaseException:
            attachment.call("keep", object=number, generation=generation, kept=False)
            raise

    def _attach(self, name: str) -> None:
        record = registry.look_up(name)
        number, generation, mapped = record["key"]
        try:
            self._attachment = attachment_for(record["address"])
            self._region = self._attachment.object_region(number, generation, mapped)
        except (GoneError, PoolClosedError) as error:
            raise FileNotFoundError(f"the shared memory {name!r} is gone: {error}") from None
        self._name, self._key, self._size = name, (number, generation, mapped), record["size"]

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return self.__class__, (self.name, False, self.size)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.name!r}, size={self.size})"

    @property
    def buf(self) -> memoryview:
        """A view of the block's bytes; None after `close`, as the standard one's."""
        return self._buf  # type: ignore[return-value]

    @property
    def name(self) -> str:
        """What other processes attach by."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes of the block."""
        return self._size

    def close(self) -> None:
        """End the use of the block by this object.

        The memory is not pulled from under views of `buf`, as arrays over it are: it stays as
        long as they do. (The standard one raises BufferError, or leaves them to crash.)
        """
        self._buf = None
        self._region = None

    def unlink(self) -> None:
        """Give the name back; the memory goes with its last user.

        Raises
        ------
        FileNotFoundError
            If that was done already, or the name is another block's by now.
        """
        if tuple(registry.look_up(self._name)["key"]) != self._key:
            raise FileNotFoundError(f"the shared memory {self._name!r} has been unlinked before")
        registry.withdraw(self._name)
        number, generation, _ = self._key
        # With its pool it is gone anyway.
        with suppress(Error):
            self._attachment.call("keep", object=number, generation=generation, kept=False)


def _check_name(name: str, create: bool) -> None:
    """Refuse what shm_open() refuses, as it does: a name is the same with and without its slash."""
    if not isinstance(name, str):
        raise TypeError(f"'name' must be a str, not {type(name).__name__}")
    plain = name.lstrip("/")
    if create and plain in (".", ".."):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
    if plain in ("", ".", "..") or "/" in plain or len(plain.encode()) > NAME_BYTES:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)


def _with_ours(method: Any) -> Any:
    """A method of the standard library's, in which `SharedMemory` means this module's."""
    words = {**vars(standard), "SharedMemory": SharedMemory}
    made = types.FunctionType(
        method.__code__, words, method.__name__, method.__defaults__, method.__closure__
    )
    made.__kwdefaults__ = method.__kwdefaults__
    return made


class ShareableList(standard.ShareableList[Any]):
    """A list of simple values in a block of shared memory; as `multiprocessing.shared_memory`."""

    __init__ = _with_ours(standard.ShareableList.__init__)
