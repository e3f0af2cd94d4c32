"""The page store's bytes: made while a frame is FILLING, gone before its page table entry changes (R5, R9).

Nothing else may make them: a touch of a hole through a mapping would fill it too, and a full tmpfs would answer
that with SIGBUS.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyswap.core.context cimport pool_t
from pyswap.core.kernel cimport file_allocate, file_punch, file_transfer, iovec, mapping_forget, uffd_copy
from pyswap.core.layout cimport page_id
from pyswap.core.lock cimport FP_FALLOCATE, failpoint_visit, panic

cdef enum:
    COPY_RUN = 8                # pages; to unmap fewer costs more than to wait for the file's lock


cdef inline int store_allocate(pool_t *pool, page_id page, uint32_t pages) noexcept nogil:
    """Memory for pages of zeros; -ENOSPC where the machine has none."""
    cdef int rc = failpoint_visit(pool.header, FP_FALLOCATE)
    if rc != 0:
        return rc
    return file_allocate(pool.store_fd, page << pool.page_shift, <uint64_t>pages << pool.page_shift)


cdef inline bint run_copied(pool_t *pool, page_id page, iovec *piece) noexcept nogil:
    """Memory for a long run of pages and their bytes, without the file's lock, which all writes and punches share.

    The pages are mapped in the alias by that, and are unmapped again, all at once: a punch would do so one by one.
    False: the run is short, or could not be copied.
    """
    cdef uint8_t *begin = pool.store + (page << pool.page_shift)
    cdef int rc
    if pool.store_uffd < 0 or piece.iov_len < <uint64_t>COPY_RUN << pool.page_shift:
        return False
    rc = uffd_copy(pool.store_uffd, <uint64_t>begin, piece.iov_base, piece.iov_len)
    mapping_forget(begin, piece.iov_len)
    return rc == 0


cdef inline int store_write_from(pool_t *pool, page_id page, iovec *pieces, int count) noexcept nogil:
    """Memory for pages and their bytes, and no page is zeroed first.  Consumes the pieces.

    What is there of them already, of a copy that ended early or of whatever else, is written over.
    """
    cdef int rc = failpoint_visit(pool.header, FP_FALLOCATE)
    if rc != 0:
        return rc
    # Of many pieces each would be a call of its own, and a write is one for all.
    if count == 1 and run_copied(pool, page, pieces):
        return 0
    return file_transfer(True, pool.store_fd, pieces, count, page << pool.page_shift)


cdef inline int store_write(pool_t *pool, page_id page, uint32_t pages, uint8_t *buffer) noexcept nogil:
    cdef iovec v
    v.iov_base = buffer
    v.iov_len = <uint64_t>pages << pool.page_shift
    return store_write_from(pool, page, &v, 1)


cdef inline void store_punch(pool_t *pool, page_id page, uint32_t pages) noexcept nogil:
    """Give the memory back, and unmap the pages from every process."""
    cdef int rc = file_punch(pool.store_fd, page << pool.page_shift, <uint64_t>pages << pool.page_shift)
    if rc != 0:
        panic("store_punch: the store keeps its bytes", page, pages, <uint64_t>-rc)


cdef inline void store_unmap(pool_t *pool, page_id page, uint64_t pages) noexcept nogil:
    """Unmap pages from the swapper itself, which reads them to write them out.

    All of a batch at once: one that a punch has to unmap costs an interrupt of the other processors, where threads of
    the swapper run.
    """
    mapping_forget(pool.store + (page << pool.page_shift), pages << pool.page_shift)
