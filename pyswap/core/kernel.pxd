"""Foreign calls: each returns 0 (or a count) or -errno.  Nothing here knows of frames or pages.

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
                             UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
    #define KERNEL_PAGE_BYTES ((uint64_t)sysconf(_SC_PAGESIZE))

    static inline int uffd_handshake(int fd) {
        struct uffdio_api api = { .api = UFFD_API, .features = PYSWAP_FEATURES };
        if (ioctl(fd, UFFDIO_API, &api) < 0) { int e = errno; close(fd); return -e; }
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
        if (ioctl(fd, UFFDIO_REGISTER, &r) < 0) return -errno;
        return 0;
    }
    /* Maps the resident bytes at [address, +length); what is mapped already is passed over and noted in
       *existed.  EAGAIN with progress means a short count, not a failure. */
    static inline int uffd_continue(int fd, uint64_t address, uint64_t length, int protect, int *existed) {
        uint64_t done = 0;
        int idle = 0;
        *existed = 0;
        while (done < length) {
            struct uffdio_continue c = { .range = { address + done, length - done },
                                         .mode = protect ? PYSWAP_CONTINUE_MODE_WP : 0 };
            if (ioctl(fd, UFFDIO_CONTINUE, &c) == 0) return 0;
            if (errno == EAGAIN && c.mapped > 0) { done += (uint64_t)c.mapped; idle = 0; continue; }
            if (errno == EEXIST) { *existed = 1; done += KERNEL_PAGE_BYTES; continue; }
            if (errno == EAGAIN && ++idle < 100) continue;
            return -errno;
        }
        return 0;
    }
    static inline int uffd_protect(int fd, uint64_t address, uint64_t length, int on) {
        struct uffdio_writeprotect p = { .range = { address, length },
                                         .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0 };
        int idle = 0;
        while (ioctl(fd, UFFDIO_WRITEPROTECT, &p) < 0) {
            if (errno == EAGAIN && ++idle < 100) continue;
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
        while (fallocate(fd, 0, (off_t)offset, (off_t)length) < 0) {
            if (errno == EINTR) continue;
            return -errno;
        }
        return 0;
    }
    static inline int file_punch(int fd, uint64_t offset, uint64_t length) {
        while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) < 0) {
            if (errno == EINTR) continue;
            return -errno;
        }
        return 0;
    }
    /* All of the vector, or -errno; a read that ends early is EIO: the slot should be there.  Consumes v. */
    static inline int file_transfer(int writing, int fd, struct iovec *v, int count, uint64_t offset) {
        while (count > 0) {
            ssize_t n = writing ? pwritev(fd, v, count, (off_t)offset) : preadv(fd, v, count, (off_t)offset);
            if (n < 0) { if (errno == EINTR) continue; return -errno; }
            if (n == 0) return -EIO;
            offset += (uint64_t)n;
            while (count > 0 && (size_t)n >= v->iov_len) { n -= (ssize_t)v->iov_len; v++; count--; }
            if (count > 0) { v->iov_base = (char *)v->iov_base + n; v->iov_len -= (size_t)n; }
        }
        return 0;
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
    int uffd_open(int *user_only) noexcept nogil
    int uffd_register(int fd, uint64_t address, uint64_t length) noexcept nogil
    int uffd_continue(int fd, uint64_t address, uint64_t length, bint protect, int *existed) noexcept nogil
    int uffd_protect(int fd, uint64_t address, uint64_t length, bint on) noexcept nogil
    int uffd_wake(int fd, uint64_t address, uint64_t length) noexcept nogil
    int uffd_read(int fd, uint64_t *address, uint64_t *flags) noexcept nogil
    int file_allocate(int fd, uint64_t offset, uint64_t length) noexcept nogil
    int file_punch(int fd, uint64_t offset, uint64_t length) noexcept nogil
    int file_transfer(bint writing, int fd, iovec *v, int count, uint64_t offset) noexcept nogil
    bint is_zero(const void *p, size_t n) noexcept nogil
    int poll_add(int ep, int fd, uint64_t data) noexcept nogil
    int poll_rearm(int ep, int fd, uint64_t data) noexcept nogil
    int poll_remove(int ep, int fd) noexcept nogil
    int poll_wait(int ep, uint64_t *data, int timeout_ms) noexcept nogil
