"""An order from the swapper to a worker's attendant: one message on their channel, and the words it says."""
from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    struct pyswap_order { uint32_t kind, length; uint64_t address, bytes; char text[240]; };
    /* Never waits: -EAGAIN when the attendant has not kept up. */
    static inline int order_send(int fd, uint32_t kind, uint64_t address, uint64_t bytes, const char *text) {
        struct pyswap_order o = { .kind = kind, .address = address, .bytes = bytes };
        int n = snprintf(o.text, sizeof o.text, "%s", text);
        o.length = (uint32_t)(n < (int)sizeof o.text ? n : (int)sizeof o.text - 1);
        return send(fd, &o, sizeof o, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
    }
    /* Waits for the next; 0 when the channel has ended. */
    static inline int order_take(int fd, struct pyswap_order *o) {
        ssize_t n;
        do n = recv(fd, o, sizeof *o, 0); while (n < 0 && errno == EINTR);
        return n == (ssize_t)sizeof *o;
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
    """
    struct pyswap_order:
        uint32_t kind
        uint32_t length
        uint64_t address
        uint64_t bytes
        char *text
    int order_send(int fd, uint32_t kind, uint64_t address, uint64_t bytes, const char *text) noexcept nogil
    bint order_take(int fd, pyswap_order *o) noexcept nogil
    void poison_text(char *out, size_t size, const char *name, uint64_t page, const char *why, int error) noexcept nogil

cdef enum:
    ORDER_POISON = 1
