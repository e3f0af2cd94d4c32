"""Bounds of queues, batches, retries and waits, with their units."""

from __future__ import annotations

from dataclasses import dataclass

STORE_BYTES = 1 << 44
"""Length of the sparse page store: page ids for 16 TiB, which cost nothing until they are used."""

FAULT_THREADS = 8
"""Threads that resolve faults, and so reads of single pages in flight. With four, four processes
that fault at random had 4 to 8 % less: who is done with one is not back at once for the next."""
STARVED_THREADS = 4
"""Threads that resolve the faults for which no frame was free, and wait for one."""
READAHEAD_THREADS = 4
"""Threads that read ahead, each with one request of up to CHUNK_BYTES in flight."""
SERVICE_THREADS = 64
"""Threads for what users ask for and wait for: pins, pageout. They start when they are needed: one
that waits for a process that is stopped must keep nobody else waiting."""
SERVICE_FILLS = 2
"""Frames of the reserve for these: what they fill they finish without another frame."""
WORKER_REQUESTS = 8
"""Such requests of one process at once: one is under way, others were interrupted."""

BATCH_BYTES = 4 << 20
BATCH_PAGES = 1024
FEW_BATCH_PAGES = 256
"""A reclaim batch: as many pages as make BATCH_BYTES, at most BATCH_PAGES; beyond FEW_BATCH_PAGES a
32nd of the frames."""
WINDOW_BYTES = 8 << 20
"""What readahead keeps ahead of one stream: a device wants 4 to 8 MiB in flight."""
CHUNK_BYTES = 1 << 20
"""One readahead request."""
AROUND_BYTES = 1 << 20
AROUND_PAGES = 256
"""One fault-around: neighbours that are mapped, or untouched ones that are zeroed, in one call."""

RETIRE_WAIT_S = 30.0
"""A resize that finds no frame to retire for so long is undone, in seconds."""
FRAME_WAIT_MS = 60_000
"""A fault that found no free frame for so long gives up, in milliseconds."""
START_TIMEOUT_S = 30.0
"""The swapper answers its first request within so many seconds, or `Pool()` fails."""
FORK_TIMEOUT_S = 5.0
"""fork() waits so long for the swapper's part, in seconds; then the child has no arrays."""
ATTACH_PENDING = 16
"""Processes that may be on their way into a pool at once."""
ATTACH_WAIT_S = 10.0
"""How long each end waits for the other while a process attaches, in seconds."""
PICKLE_BYTES = 64 << 20
"""Most bytes of a private array that a pickle holds."""
MAP_TRIES = 5
"""Tries of a mapping that takes an array's place, where the kernel has no memory for it."""
RETRY_S = 0.005
"""How soon the swapper looks again at what was busy: a dying process, a page of a freed array."""
CHECK_S = 2.0
"""How long a check waits for what is under way to end, in seconds."""
TELL_S = 10.0
"""How often the log is told of the same trouble: an area that fails, frames without memory."""
OFFLINE_RETRY_S = 1.0
"""How soon frames that found no memory are tried again, in seconds."""
PROCESS_DESCRIPTORS = 6
"""What a process costs the swapper of its limit on open files: four, and two on their way."""
OWN_DESCRIPTORS = 64
"""Descriptors that a swapper keeps for itself, and for what comes and goes."""
VAULT_BYTES = 1 << 20
"""Room that is asked for in the vault's socket: two messages a process, one an area."""
VAULT_SPARE_FDS = 32
"""Descriptors in flight that are left for those who are in the vault already."""
VAULT_SPARE_BYTES = 1 << 14
"""And bytes of its socket."""
VAULT_STALE = 32
"""Messages in the vault that count no more, before they are taken out."""
BEAT_MS = 250
"""How often the swapper tells its workers that it is well, in milliseconds."""
STUCK_MS = 120_000
"""A swapper that is at one fault for so long is replaced: twice what a fault may wait."""
FENCE_S = 5.0
"""How long a new swapper waits for the end of the one before it, in seconds."""
MESSAGE_BYTES = 1 << 17
"""Longest message between a worker and its swapper."""
HELLO_REGIONS = 2048
"""Regions that a forked child tells of in one message."""
DRAIN_PAGES = 256
"""Pages that leave a swap area between two reports of its progress."""
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


def own_descriptors(limit: int) -> int:
    """Compute what a swapper keeps of its limit on open files for itself; -1 is none."""
    return OWN_DESCRIPTORS if limit < 0 else min(OWN_DESCRIPTORS, limit // 4)


def chunk_limit(page_bytes: int) -> int:
    """Compute the most pages of a readahead request, whatever the number of frames."""
    return max(4, CHUNK_BYTES // page_bytes)


def bounds(frame_count: int, page_bytes: int) -> Bounds:
    """Compute the bounds of a pool with `frame_count` frames of `page_bytes` bytes."""
    # What a batch frees lies idle for a while: beyond a few pages it is a 32nd of all.
    share = max(FEW_BATCH_PAGES, frame_count // 32)
    batch = max(8, min(BATCH_PAGES, BATCH_BYTES // page_bytes, frame_count // 8, share))
    window = max(8, min(WINDOW_BYTES // page_bytes, frame_count // 8))
    low = max(8, min(batch, frame_count // 16))
    return Bounds(
        minimum_frames=low // 4,
        low_frames=low,
        high_frames=low + batch,
        batch_pages=batch,
        window_pages=window,
        chunk_pages=max(4, min(chunk_limit(page_bytes), window // 2)),
        around_pages=max(4, min(AROUND_PAGES, AROUND_BYTES // page_bytes, frame_count // 16)),
        reserve_pages=batch + FAULT_THREADS + STARVED_THREADS + READAHEAD_THREADS + SERVICE_FILLS,
    )
