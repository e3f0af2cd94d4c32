"""The file behind an object, where there is one: its untouched pages are as they are there.

An EMPTY entry of such an object means "as in the file", not "zeros": a clean page goes without I/O and comes back from
the file, and a dirty one needs a slot though it be zero.  The file is never written.  It must stay what it was when it
was opened, by its inode, size and time of modification, which are looked at after each read: whoever changes a file
changes its time first.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from pyswap.core.context cimport count, pool_t
from pyswap.core.kernel cimport file_stamp, file_transfer, iovec
from pyswap.core.layout cimport C_FILE_READS, FILE_NONE, frame_id, object_id, object_t
from pyswap.core.lock cimport FP_FILE_READ, failpoint_visit

cdef extern from *:
    int EIO
    int ESTALE


cdef inline bint has_file(pool_t *pool, object_id o) noexcept nogil:
    return pool.objects[o].file != FILE_NONE


cdef inline int backing_read(
    pool_t *pool, object_id o, uint64_t index, uint32_t pages, uint8_t *buffer
) noexcept nogil:
    """Bytes of neighbouring pages, zeros behind the array's last.  -ESTALE: the file is not what it was."""
    cdef object_t *object = &pool.objects[o]
    cdef uint64_t at = index << pool.page_shift, wanted = <uint64_t>pages << pool.page_shift, now = 0
    cdef uint64_t left = object.size_bytes - at
    cdef iovec v
    cdef int rc = failpoint_visit(pool.header, FP_FILE_READ)
    if left > wanted:
        left = wanted
    memset(buffer + left, 0, wanted - left)
    v.iov_base = buffer
    v.iov_len = left
    if rc == 0:
        rc = file_transfer(False, pool.files[o], &v, 1, object.file_offset + at)
    if file_stamp(pool.files[o], &now) != 0 or now != object.file_stamp:
        return -ESTALE
    count(pool, C_FILE_READS, pages)
    return rc if rc == 0 else -EIO
