"""A page's checksum: XXH3 of its bytes (Y. Collet, xxhash.h, BSD licensed), over a seed that says whose they are."""
from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #define XXH_INLINE_ALL
    #define XXH_NO_STREAM
    #include "core/xxhash.h"
    static inline uint64_t checksum_of(const void *bytes, size_t n, uint64_t seed)
    { return XXH3_64bits_withSeed(bytes, n, seed); }
    """
    uint64_t checksum_of(const void *bytes, size_t n, uint64_t seed) noexcept nogil
