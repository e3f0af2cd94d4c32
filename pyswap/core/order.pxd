"""An order from the swapper to a worker's attendant, one message on their channel; and the answer to a remap.

ORDER_POISON    say the words, and have touches of the range end in SIGBUS
ORDER_REMAP     map the store from `offset` on over the range, and answer; where that fails, as ORDER_POISON
"""
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from *:
    """
    struct pyswap_order { uint32_t kind, length; uint64_t address, bytes, offset, copy; char text[480]; };
    struct pyswap_answer { uint64_t copy; int32_t rc, pad; };
    /* Never waits: -EAGAIN when the attendant has not kept up. */
    static inline int order_send(int fd, uint32_t kind, uint64_t address, uint64_t bytes, uint64_t offset,
                                 uint64_t copy, const char *text) {
        struct pyswap_order o = { .kind = kind, .address = address, .bytes = bytes, .offset = offset,
                                  .copy = copy };
        int n = snprintf(o.text, sizeof o.text, "%s", text);
        o.length = (uint32_t)(n < (int)sizeof o.text ? n : (int)sizeof o.text - 1);
        return send(fd, &o, sizeof o, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
    }
    /* Waits for the next: 1, 0 when the channel has ended, or -errno. */
    static inline int order_take(int fd, struct pyswap_order *o) {
        ssize_t n;
        do n = recv(fd, o, sizeof *o, 0); while (n < 0 && errno == EINTR);
        if (n < 0) return -errno;
        return n == 0 ? 0 : n == (ssize_t)sizeof *o ? 1 : -EPROTO;
    }
    /* 0, or -EAGAIN: the swapper has to take some first. */
    static inline int answer_send(int fd, uint64_t copy, int rc) {
        struct pyswap_answer a = { .copy = copy, .rc = rc };
        return send(fd, &a, sizeof a, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
    }
    /* 1, 0 when there is none, or -errno: the channel has ended, or what came is no answer: who sends such
       a thing is not listened to any more. */
    static inline int answer_take(int fd, uint64_t *copy, int32_t *rc) {
        struct pyswap_answer a;
        ssize_t n = recv(fd, &a, sizeof a, MSG_DONTWAIT | MSG_TRUNC);
        if (n < 0) return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        if (n != (ssize_t)sizeof a) return n == 0 ? -EPIPE : -EPROTO;
        *copy = a.copy;
        *rc = a.rc;
        return 1;
    }
    static inline void poison_text(char *out, size_t size, const char *name, uint64_t page,
                                   const char *why, int error) {
        if (error)
            snprintf(out, size, "pyswap: %s, page %llu: %s: %s; the process that touched it gets SIGBUS\\n",
                     name, (unsigned long long)page, why, strerror(error));
        else
            snprintf(out, size, "pyswap: %s, page %llu: %s; the process that touched it gets SIGBUS\\n",
                     name, (unsigned long long)page, why);
    }
    static inline void unwritten_text(char *out, size_t size, const char *area) {
        snprintf(out, size, "no frame became free in time, since swap area %s could not be written", area);
    }
    /* Why a slot gave no page: where it is, and whether the bytes came at all. */
    static inline void unread_text(char *out, size_t size, const char *area, int error) {
        snprintf(out, size, error == EBADMSG ? "its slot in swap area %s holds other bytes than were written there"
                                             : "its slot in swap area %s could not be read", area);
    }
    """
    struct pyswap_order:
        uint32_t kind
        uint32_t length
        uint64_t address
        uint64_t bytes
        uint64_t offset
        uint64_t copy
        char *text
    int order_send(
        int fd, uint32_t kind, uint64_t address, uint64_t bytes, uint64_t offset, uint64_t copy, const char *text
    ) noexcept nogil
    int order_take(int fd, pyswap_order *o) noexcept nogil
    int answer_send(int fd, uint64_t copy, int rc) noexcept nogil
    int answer_take(int fd, uint64_t *copy, int32_t *rc) noexcept nogil
    void unwritten_text(char *out, size_t size, const char *area) noexcept nogil
    void unread_text(char *out, size_t size, const char *area, int error) noexcept nogil
    void poison_text(char *out, size_t size, const char *name, uint64_t page, const char *why, int error) noexcept nogil

cdef enum:
    ORDER_POISON = 1
    ORDER_REMAP = 2
