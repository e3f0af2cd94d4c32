"""The page store's bytes: made while a frame is FILLING, gone before its page table entry changes (R5, R9).

Nothing else may make them: a touch of a hole through a mapping would fill it too, and a full tmpfs would answer
that with SIGBUS.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyswap.core.context cimport pool_t
from pyswap.core.kernel cimport file_allocate, file_punch, file_transfer, iovec, mapping_forget
from pyswap.core.layout cimport page_id
from pyswap.core.lock cimport FP_FALLOCATE, failpoint_visit, panic


cdef inline int store_allocate(pool_t *pool, page_id page, uint32_t pages) noexcept nogil:
    """Memory for pages of zeros; -ENOSPC where the machine has none."""
    cdef int rc = failpoint_visit(pool.header, FP_FALLOCATE)
    if rc != 0:
        return rc
    return file_allocate(pool.store_fd, page << pool.page_shift, <uint64_t>pages << pool.page_shift)


cdef inline int store_write_from(pool_t *pool, page_id page, iovec *pieces, int count) noexcept nogil:
    """Memory for pages and their bytes in one call, and no page is zeroed first.  Consumes the pieces."""
    cdef int rc = failpoint_visit(pool.header, FP_FALLOCATE)
    if rc != 0:
        return rc
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
