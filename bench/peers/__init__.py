"""The peers, by name: what pyswap is compared with, and pyswap."""

from __future__ import annotations

from .base import Peer
from .kernel import KernelSwap
from .memmap import MemoryMapped
from .memopro import MemoPro
from .paged import Paged
from .plain import Plain

__all__ = ["PEERS", "Peer"]

_ALL: tuple[Peer, ...] = (
    Paged(),
    *(Paged(page_kib) for page_kib in (16, 64)),
    KernelSwap(3),
    KernelSwap(5),
    MemoryMapped(),
    MemoPro(),
    Plain(huge=False),
    Plain(huge=True),
)

PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
"""In the order of their runs within a round."""
