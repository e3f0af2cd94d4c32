"""Foreign calls: each returns 0 (or a count) or -errno.  Nothing here knows of frames or pages.

In the debug build a test may have the n-th call of a kind fail, counted over all processes that it tells of a common
file: call_fails() is asked before each, and is no code at all in the release build.

The constants of userfaultfd newer than the build machine's headers are defined here; their values are the
kernel's ABI (include/uapi/linux/userfaultfd.h, Linux 6.4).
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <linux/userfaultfd.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/epoll.h>
    #include <sys/eventfd.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #ifndef UFFD_USER_MODE_ONLY
    #define UFFD_USER_MODE_ONLY 1
    #endif
    #ifndef USERFAULTFD_IOC_NEW
    #define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
    #endif
    #define PYSWAP_CONTINUE_MODE_WP ((uint64_t)1 << 1)
    #define PYSWAP_FEATURES (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM | \
                             UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | \
                             UFFD_FEATURE_EXACT_ADDRESS)
    #define KERNEL_PAGE_BYTES ((uint64_t)sysconf(_SC_PAGESIZE))

    /* In the order of CALL_NAMES in _fast_debug.pyx. */
    enum { CALL_PREAD, CALL_PWRITE, CALL_FALLOCATE, CALL_PUNCH, CALL_MMAP, CALL_REGISTER, CALL_CONTINUE, CALL_PROTECT,
           CALL_USERFAULTFD, CALL_COPY, CALLS };
    #ifdef PYSWAP_DEBUG
    struct failing_call { uint32_t first, last, error, passed, failed, pad[3]; };
    static struct failing_call *failing_calls;
    static inline uint32_t add32(uint32_t *p, uint32_t v);      /* of lock.pxd */
    static inline int call_fails(int kind) {
        struct failing_call *c = failing_calls ? &failing_calls[kind] : NULL;
        uint32_t n = c ? add32(&c->passed, 1) + 1 : 0;
        if (!c || n < c->first || n > c->last) return 0;
        add32(&c->failed, 1);
        errno = (int)c->error;
        return 1;
    }
    static inline int calls_join(int fd) {
        void *p = mmap(NULL, CALLS * sizeof(struct failing_call), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) return -errno;
        failing_calls = p;
        return 0;
    }
    #else
    #define call_fails(kind) 0
    #endif

    /* MAP_FAILED and errno, as mmap. */
    static inline void *map_memory(void *at, uint64_t bytes, int protection, int flags, int fd, uint64_t offset) {
        return call_fails(CALL_MMAP) ? MAP_FAILED : mmap(at, bytes, protection, flags, fd, (off_t)offset);
    }
    static inline int uffd_handshake(int fd) {
        struct uffdio_api api = { .api = UFFD_API, .features = PYSWAP_FEATURES };
        if (call_fails(CALL_USERFAULTFD) || ioctl(fd, UFFDIO_API, &api) < 0) { int e = errno; close(fd); return -e; }
        return fd;
    }
    /* Full userfaultfd where this user may, else user mode only; *user_only says which. */
    static inline int uffd_open(int *user_only) {
        int fd, dev;
        *user_only = 0;
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
        if (fd >= 0) return uffd_handshake(fd);
        dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (dev >= 0) {
            fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
            close(dev);
            if (fd >= 0) return uffd_handshake(fd);
        }
        *user_only = 1;
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
        if (fd >= 0) return uffd_handshake(fd);
        return -errno;
    }
    static inline int uffd_register(int fd, uint64_t address, uint64_t length) {
        struct uffdio_register r = { .range = { address, length },
            .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP };
        if (call_fails(CALL_REGISTER) || ioctl(fd, UFFDIO_REGISTER, &r) < 0) return -errno;
        return 0;
    }
    /* Maps the resident bytes at [address, +length); what is mapped already is passed over and noted in
       *existed.  EAGAIN with progress means a short count, not a failure; no memory for page tables may be
       had the next time. */
    static inline int uffd_continue(int fd, uint64_t address, uint64_t length, int protect, int *existed) {
        uint64_t done = 0;
        int idle = 0;
        *existed = 0;
        while (done < length) {
            struct uffdio_continue c = { .range = { address + done, length - done },
                                         .mode = protect ? PYSWAP_CONTINUE_MODE_WP : 0 };
            if (!call_fails(CALL_CONTINUE) && ioctl(fd, UFFDIO_CONTINUE, &c) == 0) return 0;
            if (errno == EAGAIN && c.mapped > 0) { done += (uint64_t)c.mapped; idle = 0; continue; }
            if (errno == EEXIST) { *existed = 1; done += KERNEL_PAGE_BYTES; continue; }
            if ((errno == EAGAIN || errno == ENOMEM) && ++idle < 100) continue;
            return -errno;
        }
        return 0;
    }
    /* Give the mapping of a file at [address, +length) to uffd_copy(); -errno where this process may not. */
    static inline int uffd_for_copies(void *address, uint64_t length) {
        struct uffdio_register r = { .range = { (uint64_t)address, length }, .mode = UFFDIO_REGISTER_MODE_MISSING };
        int user_only, fd = uffd_open(&user_only);
        if (fd >= 0 && ioctl(fd, UFFDIO_REGISTER, &r) < 0) { int e = errno; close(fd); return -e; }
        return fd;
    }
    /* Memory and bytes for a hole of the file, and its pages mapped there; what there was is -EEXIST. */
    static inline int uffd_copy(int fd, uint64_t address, const void *from, uint64_t length) {
        uint64_t done = 0;
        int idle = 0;
        while (done < length) {
            struct uffdio_copy c = { .dst = address + done, .src = (uint64_t)from + done, .len = length - done,
                                     .mode = UFFDIO_COPY_MODE_DONTWAKE };
            if (!call_fails(CALL_COPY) && ioctl(fd, UFFDIO_COPY, &c) == 0) return 0;
            if (errno == EAGAIN && c.copy > 0) { done += (uint64_t)c.copy; idle = 0; continue; }
            if (errno == EAGAIN && ++idle < 100) continue;
            return -errno;
        }
        return 0;
    }
    static inline int uffd_protect(int fd, uint64_t address, uint64_t length, int on) {
        struct uffdio_writeprotect p = { .range = { address, length },
                                         .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0 };
        int idle = 0;
        while (call_fails(CALL_PROTECT) || ioctl(fd, UFFDIO_WRITEPROTECT, &p) < 0) {
            if ((errno == EAGAIN || errno == ENOMEM) && ++idle < 100) continue;
            return -errno;
        }
        return 0;
    }
    static inline int uffd_wake(int fd, uint64_t address, uint64_t length) {
        struct uffdio_range r = { address, length };
        if (ioctl(fd, UFFDIO_WAKE, &r) < 0) return -errno;
        return 0;
    }
    /* One fault, without waiting: 1, 0 when there is none, or -errno. */
    static inline int uffd_read(int fd, uint64_t *address, uint64_t *flags) {
        struct uffd_msg m;
        ssize_t n = read(fd, &m, sizeof m);
        if (n == (ssize_t)sizeof m && m.event == UFFD_EVENT_PAGEFAULT) {
            *address = m.arg.pagefault.address;
            *flags = m.arg.pagefault.flags;
            return 1;
        }
        if (n < 0 && errno != EAGAIN) return -errno;
        return 0;
    }

    static inline int file_allocate(int fd, uint64_t offset, uint64_t length) {
        while (call_fails(CALL_FALLOCATE) || fallocate(fd, 0, (off_t)offset, (off_t)length) < 0) {
            if (errno == EINTR) continue;
            return -errno;
        }
        return 0;
    }
    static inline int file_punch(int fd, uint64_t offset, uint64_t length) {
        const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
        while (call_fails(CALL_PUNCH) || fallocate(fd, mode, (off_t)offset, (off_t)length) < 0) {
            if (errno == EINTR) continue;
            return -errno;
        }
        return 0;
    }
    static inline void mapping_forget(void *start, uint64_t length) {
        madvise(start, (size_t)length, MADV_DONTNEED);
    }
    static inline void memory_wants_huge(void *start, uint64_t length) {
        madvise(start, (size_t)length, MADV_HUGEPAGE);
    }
    /* All of the vector, or -errno; a read that ends early is EIO: the slot should be there.  Consumes v. */
    static inline int file_transfer(int writing, int fd, struct iovec *v, int count, uint64_t offset) {
        while (count > 0) {
            ssize_t n = -1;
            if (!call_fails(writing ? CALL_PWRITE : CALL_PREAD))
                n = writing ? pwritev(fd, v, count, (off_t)offset) : preadv(fd, v, count, (off_t)offset);
            if (n < 0) { if (errno == EINTR) continue; return -errno; }
            if (n == 0) return -EIO;
            offset += (uint64_t)n;
            while (count > 0 && (size_t)n >= v->iov_len) { n -= (ssize_t)v->iov_len; v++; count--; }
            if (count > 0) { v->iov_base = (char *)v->iov_base + n; v->iov_len -= (size_t)n; }
        }
        return 0;
    }
    /* What a file is, in one number: another one after any change of its bytes that moves its time. */
    static inline int file_stamp(int fd, uint64_t *stamp) {
        const uint64_t k = 0x9E3779B97F4A7C15u;
        struct stat s;
        if (fstat(fd, &s) < 0) return -errno;
        *stamp = (((uint64_t)s.st_ino * k ^ (uint64_t)s.st_size) * k ^ (uint64_t)s.st_mtim.tv_sec) * k ^
                 (uint64_t)s.st_mtim.tv_nsec;
        return 0;
    }
    /* Whether something was written there; a hole is not read, since that would fill it. */
    static inline int file_has_data(int fd, uint64_t offset) {
        return lseek(fd, (off_t)offset, SEEK_DATA) == (off_t)offset;
    }
    static inline int is_zero(const void *p, size_t n) {
        const uint64_t *w = (const uint64_t *)p;
        return w[0] == 0 && memcmp(w, w + 1, n - 8) == 0;
    }

    static inline int poll_add(int ep, int fd, uint64_t data) {
        struct epoll_event e = { .events = EPOLLIN | EPOLLONESHOT, .data = { .u64 = data } };
        return epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
    }
    static inline int poll_rearm(int ep, int fd, uint64_t data) {
        struct epoll_event e = { .events = EPOLLIN | EPOLLONESHOT, .data = { .u64 = data } };
        return epoll_ctl(ep, EPOLL_CTL_MOD, fd, &e) < 0 ? -errno : 0;
    }
    static inline int poll_remove(int ep, int fd) { return epoll_ctl(ep, EPOLL_CTL_DEL, fd, NULL) < 0 ? -errno : 0; }
    static inline int poll_wait(int ep, uint64_t *data, int timeout_ms) {
        struct epoll_event e;
        int n = epoll_wait(ep, &e, 1, timeout_ms);
        if (n > 0) *data = e.data.u64;
        return n < 0 ? -errno : n;
    }
    """
    struct iovec:
        void *iov_base
        size_t iov_len
    enum:
        UFFD_PAGEFAULT_FLAG_WRITE
        UFFD_PAGEFAULT_FLAG_WP
    int calls_join(int fd) noexcept nogil       # the debug build's only
    bint call_fails(int kind) noexcept nogil
    void memory_wants_huge(void *start, uint64_t length) noexcept nogil
    int uffd_open(int *user_only) noexcept nogil
    int uffd_register(int fd, uint64_t address, uint64_t length) noexcept nogil
    int uffd_continue(int fd, uint64_t address, uint64_t length, bint protect, int *existed) noexcept nogil
    int uffd_for_copies(void *address, uint64_t length) noexcept nogil
    int uffd_copy(int fd, uint64_t address, const void *source, uint64_t length) noexcept nogil
    int uffd_protect(int fd, uint64_t address, uint64_t length, bint on) noexcept nogil
    int uffd_wake(int fd, uint64_t address, uint64_t length) noexcept nogil
    int uffd_read(int fd, uint64_t *address, uint64_t *flags) noexcept nogil
    int file_allocate(int fd, uint64_t offset, uint64_t length) noexcept nogil
    int file_punch(int fd, uint64_t offset, uint64_t length) noexcept nogil
    void mapping_forget(void *start, uint64_t length) noexcept nogil
    int file_transfer(bint writing, int fd, iovec *v, int count, uint64_t offset) noexcept nogil
    int file_stamp(int fd, uint64_t *stamp) noexcept nogil
    bint file_has_data(int fd, uint64_t offset) noexcept nogil
    bint is_zero(const void *p, size_t n) noexcept nogil
    int poll_add(int ep, int fd, uint64_t data) noexcept nogil
    int poll_rearm(int ep, int fd, uint64_t data) noexcept nogil
    int poll_remove(int ep, int fd) noexcept nogil
    int poll_wait(int ep, uint64_t *data, int timeout_ms) noexcept nogil
