"""`Stats`: a pool's numbers at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """What a pool holds and has done, over all its processes, the dead included.

    Attributes
    ----------
    memory_bytes, metadata_bytes : int
        The budget; what the control segment takes beside it.
    page_size : int
        Bytes of a page; what follows counts pages unless it says otherwise.
    resident_pages, free_frames, offline_frames, dirty_pages, pinned_pages : int
        Pages in frames; frames that are free; frames the machine had no memory for; pages newer
        than their slot; pages that may not be evicted.
    swap_bytes, swap_used_bytes : int
        The swap area, and how much of it is in use.
    committed_bytes : int
        What arrays may come to need.
    in_transit_bytes : int
        Of arrays that a pickle on its way keeps alive; see `Pool.drop_transit`.
    minor_faults, major_faults, write_faults : int
        Faults on resident or untouched pages; faults that read a slot; first writes to pages that
        were mapped for reading.
    zero_fills, fill_waits, frame_waits : int
        Minor faults that made a page of zeros; faults that met a page another thread was
        filling or evicting; faults that had to wait for a free frame.
    slot_reads, slot_writes, read_calls, write_calls : int
        Pages read from and written to swap, without those that only lay between two in one read;
        and the system calls that took.
    clean_drops, zero_drops : int
        Pages evicted without I/O, since the slot was still right; pages evicted without a slot,
        since they were zero.
    write_ahead_pages : int
        Dirty pages cleaned before reclaim chose them.
    readahead_pages, readahead_hits : int
        Pages read before they were asked for, and those of them that were asked for.
    evictions, redirtied_pages, slot_steals : int
        Pages evicted; pages written to while they were being written out; slots taken back from
        resident pages because swap was full.
    read_errors, write_errors, poisoned_pages : int
        Failed transfers; pages answered with SIGBUS.
    cow_copies, cow_remaps : int
        Pages of private arrays copied because one of several sharers wrote to them; the runs of
        neighbours in which they were mapped.
    peak_resident_pages, peak_swap_used_bytes, peak_committed_bytes : int
        The most of them there was at once since the pool was made.
    checksum_errors : int
        Pages whose slot gave back other bytes than were written; read errors are counted with them.
    refaults, activations : int
        Pages that came back after an eviction; those that came back so soon that they are kept
        before others from then on.
    file_reads : int
        Pages read from files that arrays were opened on; see `Pool.open_npy`.
    workers : int
        Processes attached now.
    """

    memory_bytes: int
    metadata_bytes: int
    page_size: int
    resident_pages: int
    free_frames: int
    offline_frames: int
    dirty_pages: int
    pinned_pages: int
    swap_bytes: int
    swap_used_bytes: int
    committed_bytes: int
    in_transit_bytes: int
    minor_faults: int
    major_faults: int
    write_faults: int
    zero_fills: int
    fill_waits: int
    frame_waits: int
    slot_reads: int
    slot_writes: int
    read_calls: int
    write_calls: int
    clean_drops: int
    zero_drops: int
    write_ahead_pages: int
    readahead_pages: int
    readahead_hits: int
    evictions: int
    redirtied_pages: int
    slot_steals: int
    read_errors: int
    write_errors: int
    poisoned_pages: int
    cow_copies: int
    cow_remaps: int
    refaults: int
    activations: int
    file_reads: int
    checksum_errors: int
    peak_resident_pages: int
    peak_swap_used_bytes: int
    peak_committed_bytes: int
    workers: int

    @classmethod
    def of(cls, numbers: Mapping[str, int], metadata_bytes: int, workers: int) -> Stats:
        """Make them of the header's numbers, the control segment's size and the processes."""
        page = numbers["page_size"]
        taken = {each.name: numbers[each.name] for each in fields(cls) if each.name in numbers}
        return cls(
            **taken,
            memory_bytes=numbers["memory_pages"] * page,
            metadata_bytes=metadata_bytes,
            swap_bytes=numbers["slot_count"] * page,
            swap_used_bytes=numbers["slots_used"] * page,
            committed_bytes=numbers["committed_pages"] * page,
            peak_swap_used_bytes=numbers["peak_slots"] * page,
            peak_committed_bytes=numbers["peak_committed_pages"] * page,
            in_transit_bytes=numbers["in_transit_pages"] * page,
            workers=workers,
        )
