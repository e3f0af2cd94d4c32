"""Bounds of queues, batches, retries and waits, with their units."""

from __future__ import annotations

from dataclasses import dataclass

STORE_BYTES = 1 << 44
"""Length of the sparse page store: page ids for 16 TiB, which cost nothing until they are used."""

FAULT_THREADS = 4
"""Threads that resolve faults, and so reads of single pages in flight."""
STARVED_THREADS = 4
"""Threads that resolve the faults for which no frame was free, and wait for one."""
READAHEAD_THREADS = 4
"""Threads that read ahead, each with one request of up to CHUNK_BYTES in flight."""
SERVICE_THREADS = 2
"""Threads for what users ask for and wait for: pins, pageout."""

BATCH_BYTES = 8 << 20
BATCH_PAGES = 256
"""A reclaim batch: as many pages as make BATCH_BYTES, but no more than this."""
WINDOW_BYTES = 8 << 20
"""What readahead keeps ahead of one stream: a device wants 4 to 8 MiB in flight."""
CHUNK_BYTES = 1 << 20
"""One readahead request."""
AROUND_BYTES = 1 << 20
AROUND_PAGES = 64
"""One fault-around: neighbours that are mapped, or untouched ones that are zeroed, in one call."""

FRAME_WAIT_MS = 60_000
"""A fault that found no free frame for so long gives up, in milliseconds."""
START_TIMEOUT_S = 30.0
"""The swapper answers its first request within so many seconds, or `Pool()` fails."""
FORK_TIMEOUT_S = 5.0
"""fork() waits so long for the swapper's part, in seconds; then the child has no arrays."""
RETRY_S = 0.005
"""How soon the swapper looks again at what was busy: a dying process, a page of a freed array."""
CHECK_S = 2.0
"""How long a check waits for what is under way to end, in seconds."""
OFFLINE_RETRY_S = 1.0
"""How soon frames that found no memory are tried again, in seconds."""
MESSAGE_BYTES = 1 << 17
"""Longest message between a worker and its swapper."""
HELLO_REGIONS = 2048
"""Regions that a forked child tells of in one message."""
REQUEST_RANGES = 4096
"""Page ranges of one pin or advice; a view that needs more is taken as one range."""


@dataclass(frozen=True)
class Bounds:
    """Bounds that follow from the number of frames and the page size, in pages.

    Attributes
    ----------
    minimum_frames, low_frames, high_frames
        Free frames at which readahead stops, reclaim starts, and reclaim ends.
    batch_pages, window_pages, chunk_pages, around_pages
        See BATCH_BYTES, WINDOW_BYTES, CHUNK_BYTES, AROUND_BYTES.
    reserve_pages
        Frames that may never hold committed pages, so that pages can always be exchanged: a write
        batch, and one frame for every thread that may be filling.
    """

    minimum_frames: int
    low_frames: int
    high_frames: int
    batch_pages: int
    window_pages: int
    chunk_pages: int
    around_pages: int
    reserve_pages: int


def bounds(frame_count: int, page_bytes: int) -> Bounds:
    """Compute the bounds of a pool with `frame_count` frames of `page_bytes` bytes."""
    batch = max(8, min(BATCH_PAGES, BATCH_BYTES // page_bytes, frame_count // 8))
    window = max(8, min(WINDOW_BYTES // page_bytes, frame_count // 8))
    low = max(batch, min(2 * batch, frame_count // 8))
    return Bounds(
        minimum_frames=low // 4,
        low_frames=low,
        high_frames=low + batch,
        batch_pages=batch,
        window_pages=window,
        chunk_pages=max(4, min(BATCH_PAGES, CHUNK_BYTES // page_bytes, window // 2)),
        around_pages=max(4, min(AROUND_PAGES, AROUND_BYTES // page_bytes, frame_count // 16)),
        reserve_pages=batch + FAULT_THREADS + STARVED_THREADS + READAHEAD_THREADS + SERVICE_THREADS,
    )
