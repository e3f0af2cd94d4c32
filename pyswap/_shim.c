/* Kernel I/O on arrays' memory for an ordinary user: calls of the C library go through a piece of plain memory.
 *
 * With user-mode-only userfaultfd the kernel cannot fault a page in: a system call whose buffer is not mapped gets
 * EFAULT, or does less than was asked, and a datagram is lost.  The functions here stand before those of the C
 * library.  Where a buffer lies in arrays' memory they have the kernel fill, or read, a piece of plain memory, and
 * copy between the two: the copy's faults are this program's own, which the swapper resolves.  So no call is short
 * that would not be so on plain memory, and no pin is needed, of which there are only so many.  All other calls go
 * straight on.
 *
 * Where the kernel may fault (full userfaultfd) only O_DIRECT needs this: it would go on writing to a page that
 * was evicted meanwhile.
 *
 * How to use it: preloaded (LD_PRELOAD), which covers every library; or loaded, and then pyswap_shim_hook(), which
 * covers the libraries that are loaded by then.  It does nothing until pyswap_shim_begin().
 *
 * What it cannot see: system calls that do not go through these functions (raw syscalls, io_uring, aio, vmsplice).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define PIECE_BYTES ((size_t)1 << 20)
#define MESSAGE_BYTES ((size_t)16 << 20) /* no datagram is longer */
#define ALIGN_BYTES 4096                 /* for O_DIRECT */
#define EXPORT __attribute__((visibility("default")))

typedef int (*owns_t)(uint64_t address, uint64_t bytes);

static owns_t owns;   /* whether a range overlaps arrays' memory; NULL: there is none yet */
static int user_only; /* the kernel cannot fault */

/* The functions behind ours. */

#define REAL(result, name, ...)                                                                                        \
    static result (*real_##name)(__VA_ARGS__);                                                                         \
    static inline result (*find_##name(void))(__VA_ARGS__) {                                                           \
        void *found = __atomic_load_n((void **)&real_##name, __ATOMIC_RELAXED);                                        \
        if (!found) {                                                                                                  \
            found = dlsym(RTLD_NEXT, #name);                                                                           \
            if (!found) abort();                                                                                       \
            __atomic_store_n((void **)&real_##name, found, __ATOMIC_RELAXED);                                          \
        }                                                                                                              \
        return real_##name;                                                                                            \
    }
#define CALL(name) find_##name()

REAL(ssize_t, read, int, void *, size_t)
REAL(ssize_t, write, int, const void *, size_t)
REAL(ssize_t, pread64, int, void *, size_t, off_t)
REAL(ssize_t, pwrite64, int, const void *, size_t, off_t)
REAL(ssize_t, readv, int, const struct iovec *, int)
REAL(ssize_t, writev, int, const struct iovec *, int)
REAL(ssize_t, preadv64, int, const struct iovec *, int, off_t)
REAL(ssize_t, pwritev64, int, const struct iovec *, int, off_t)
REAL(ssize_t, preadv64v2, int, const struct iovec *, int, off_t, int)
REAL(ssize_t, pwritev64v2, int, const struct iovec *, int, off_t, int)
REAL(ssize_t, recv, int, void *, size_t, int)
REAL(ssize_t, send, int, const void *, size_t, int)
REAL(ssize_t, recvfrom, int, void *, size_t, int, struct sockaddr *, socklen_t *)
REAL(ssize_t, sendto, int, const void *, size_t, int, const struct sockaddr *, socklen_t)
REAL(ssize_t, recvmsg, int, struct msghdr *, int)
REAL(ssize_t, sendmsg, int, const struct msghdr *, int)
REAL(size_t, fread, void *, size_t, size_t, FILE *)
REAL(size_t, fwrite, const void *, size_t, size_t, FILE *)

/* Whose memory. */

static int is_ours(const void *p, size_t n) {
    owns_t ask = __atomic_load_n(&owns, __ATOMIC_ACQUIRE);
    return ask && n && ask((uint64_t)p, n);
}

static int any_is_ours(const struct iovec *v, int n) {
    for (int i = 0; i < n; i++)
        if (is_ours(v[i].iov_base, v[i].iov_len)) return 1;
    return 0;
}

/* Whether a transfer of a descriptor is to go through plain memory. */
static int is_in_need(int fd, const struct iovec *v, int n) {
    int flags;
    if (!any_is_ours(v, n)) return 0;
    if (user_only) return 1;
    flags = fcntl(fd, F_GETFL);
    return flags >= 0 && (flags & O_DIRECT);
}

/* Copying between a vector and a piece, from a place in the vector on. */

static size_t total_of(const struct iovec *v, int n) {
    size_t total = 0;
    for (int i = 0; i < n; i++) total += v[i].iov_len;
    return total;
}

static void copy(const struct iovec *v, int n, size_t from, char *piece, size_t bytes, int out) {
    for (int i = 0; i < n && bytes; i++) {
        size_t here;
        if (from >= v[i].iov_len) {
            from -= v[i].iov_len;
            continue;
        }
        here = v[i].iov_len - from < bytes ? v[i].iov_len - from : bytes;
        if (out) memcpy((char *)v[i].iov_base + from, piece, here);
        else memcpy(piece, (char *)v[i].iov_base + from, here);
        piece += here;
        bytes -= here;
        from = 0;
    }
}

/* One transfer, whatever function asked for it. */

enum kind { KIND_FILE, KIND_STREAM, KIND_MESSAGES };

struct transfer {
    int fd;
    const struct iovec *v;
    int n;
    off_t offset; /* -1: at the position */
    int flags;    /* of preadv2 and recvmsg, and their like */
    struct msghdr *message; /* of recvmsg and sendmsg */
};

static enum kind kind_of(int fd) {
    struct stat s;
    int type = 0;
    socklen_t length = sizeof type;
    if (fstat(fd, &s) == 0 && (S_ISREG(s.st_mode) || S_ISBLK(s.st_mode))) return KIND_FILE;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) == 0 && type != SOCK_STREAM) return KIND_MESSAGES;
    return KIND_STREAM;
}

static ssize_t move_piece(struct transfer *t, int out, char *piece, size_t bytes, size_t done, enum kind kind) {
    struct iovec one = { piece, bytes };
    off_t at = t->offset < 0 ? -1 : t->offset + (off_t)done;
    struct msghdr m;
    ssize_t n;
    int flags = t->flags;
    if (out && done && kind == KIND_STREAM && !(t->message && flags & MSG_WAITALL)) {
        /* A call waits for its first bytes only; what else is there by then it takes. */
        flags |= t->message ? MSG_DONTWAIT : RWF_NOWAIT;
    }
    if (!t->message) {
        if (out && flags) return CALL(preadv64v2)(t->fd, &one, 1, at, flags);
        if (flags) return CALL(pwritev64v2)(t->fd, &one, 1, at, flags);
        if (at < 0) return out ? CALL(read)(t->fd, piece, bytes) : CALL(write)(t->fd, piece, bytes);
        return out ? CALL(pread64)(t->fd, piece, bytes, at) : CALL(pwrite64)(t->fd, piece, bytes, at);
    }
    m = *t->message;
    m.msg_iov = &one;
    m.msg_iovlen = 1;
    if (done) {
        /* The address and what came beside the bytes belong to the first piece. */
        m.msg_name = NULL;
        m.msg_control = NULL;
        m.msg_namelen = m.msg_controllen = 0;
    }
    if (!out) return CALL(sendmsg)(t->fd, &m, flags);
    n = CALL(recvmsg)(t->fd, &m, flags);
    if (n >= 0 && !done) {
        t->message->msg_namelen = m.msg_namelen;
        t->message->msg_controllen = m.msg_controllen;
        t->message->msg_flags = m.msg_flags;
    }
    return n;
}

/* Whether more is to be asked for after a full piece. */
static int goes_on(struct transfer *t, int out, enum kind kind) {
    if (kind == KIND_MESSAGES) return 0;
    if (!out || !t->message) return 1;
    if (t->flags & (MSG_PEEK | MSG_OOB | MSG_ERRQUEUE)) return 0;
    return t->flags & MSG_WAITALL || t->message->msg_controllen == 0;
}

/* All of a transfer through plain memory: what the call would have returned on such. */
static ssize_t transfer(struct transfer *t, int out) {
    size_t total = total_of(t->v, t->n), done = 0, want, most = PIECE_BYTES;
    enum kind kind = kind_of(t->fd);
    ssize_t n = 0;
    void *piece;
    int error;
    if (kind == KIND_MESSAGES) most = total < MESSAGE_BYTES ? total : MESSAGE_BYTES;
    if (most > total) most = total;
    if (posix_memalign(&piece, ALIGN_BYTES, most ? most : 1)) {
        errno = ENOMEM;
        return -1;
    }
    do {
        want = total - done < most ? total - done : most;
        if (!out) copy(t->v, t->n, done, piece, want, 0);
        n = move_piece(t, out, piece, want, done, kind);
        if (n <= 0) break;
        /* With MSG_TRUNC it tells of more than it gave. */
        if (out) copy(t->v, t->n, done, piece, (size_t)n < want ? (size_t)n : want, 1);
        done += (size_t)n;
    } while ((size_t)n == want && done < total && goes_on(t, out, kind));
    error = errno;
    free(piece);
    errno = error;
    return done ? (ssize_t)done : n;
}

static ssize_t simple(int fd, const void *p, size_t bytes, off_t offset, int out) {
    struct iovec one = { (void *)p, bytes };
    struct transfer t = { fd, &one, 1, offset, 0, NULL };
    return transfer(&t, out);
}

static int one_in_need(int fd, const void *p, size_t bytes) {
    struct iovec one = { (void *)p, bytes };
    return is_in_need(fd, &one, 1);
}

/* read, write and their kin. */

EXPORT ssize_t read(int fd, void *p, size_t n) {
    return one_in_need(fd, p, n) ? simple(fd, p, n, -1, 1) : CALL(read)(fd, p, n);
}
EXPORT ssize_t write(int fd, const void *p, size_t n) {
    return one_in_need(fd, p, n) ? simple(fd, p, n, -1, 0) : CALL(write)(fd, p, n);
}
EXPORT ssize_t pread64(int fd, void *p, size_t n, off_t at) {
    return at >= 0 && one_in_need(fd, p, n) ? simple(fd, p, n, at, 1) : CALL(pread64)(fd, p, n, at);
}
EXPORT ssize_t pwrite64(int fd, const void *p, size_t n, off_t at) {
    return at >= 0 && one_in_need(fd, p, n) ? simple(fd, p, n, at, 0) : CALL(pwrite64)(fd, p, n, at);
}
EXPORT ssize_t pread(int fd, void *p, size_t n, off_t at) { return pread64(fd, p, n, at); }
EXPORT ssize_t pwrite(int fd, const void *p, size_t n, off_t at) { return pwrite64(fd, p, n, at); }

EXPORT ssize_t readv(int fd, const struct iovec *v, int n) {
    struct transfer t = { fd, v, n, -1, 0, NULL };
    return is_in_need(fd, v, n) ? transfer(&t, 1) : CALL(readv)(fd, v, n);
}
EXPORT ssize_t writev(int fd, const struct iovec *v, int n) {
    struct transfer t = { fd, v, n, -1, 0, NULL };
    return is_in_need(fd, v, n) ? transfer(&t, 0) : CALL(writev)(fd, v, n);
}
EXPORT ssize_t preadv64(int fd, const struct iovec *v, int n, off_t at) {
    struct transfer t = { fd, v, n, at, 0, NULL };
    return at >= 0 && is_in_need(fd, v, n) ? transfer(&t, 1) : CALL(preadv64)(fd, v, n, at);
}
EXPORT ssize_t pwritev64(int fd, const struct iovec *v, int n, off_t at) {
    struct transfer t = { fd, v, n, at, 0, NULL };
    return at >= 0 && is_in_need(fd, v, n) ? transfer(&t, 0) : CALL(pwritev64)(fd, v, n, at);
}
EXPORT ssize_t preadv64v2(int fd, const struct iovec *v, int n, off_t at, int flags) {
    struct transfer t = { fd, v, n, at, flags, NULL };
    return is_in_need(fd, v, n) ? transfer(&t, 1) : CALL(preadv64v2)(fd, v, n, at, flags);
}
EXPORT ssize_t pwritev64v2(int fd, const struct iovec *v, int n, off_t at, int flags) {
    struct transfer t = { fd, v, n, at, flags, NULL };
    return is_in_need(fd, v, n) ? transfer(&t, 0) : CALL(pwritev64v2)(fd, v, n, at, flags);
}
EXPORT ssize_t preadv(int fd, const struct iovec *v, int n, off_t at) { return preadv64(fd, v, n, at); }
EXPORT ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at) { return pwritev64(fd, v, n, at); }
EXPORT ssize_t preadv2(int fd, const struct iovec *v, int n, off_t at, int f) { return preadv64v2(fd, v, n, at, f); }
EXPORT ssize_t pwritev2(int fd, const struct iovec *v, int n, off_t at, int f) { return pwritev64v2(fd, v, n, at, f); }

/* Sockets. */

static ssize_t message(int fd, const void *p, size_t n, int flags, struct sockaddr *name, socklen_t *length, int out) {
    struct iovec one = { (void *)p, n };
    struct msghdr m = { .msg_name = name, .msg_namelen = length ? *length : 0 };
    struct transfer t = { fd, &one, 1, -1, flags, &m };
    ssize_t done = transfer(&t, out);
    if (out && done >= 0 && length) *length = m.msg_namelen;
    return done;
}

EXPORT ssize_t recv(int fd, void *p, size_t n, int flags) {
    return one_in_need(fd, p, n) ? message(fd, p, n, flags, NULL, NULL, 1) : CALL(recv)(fd, p, n, flags);
}
EXPORT ssize_t send(int fd, const void *p, size_t n, int flags) {
    /* With MSG_ZEROCOPY the kernel would read the piece after its end. */
    if (flags & MSG_ZEROCOPY || !one_in_need(fd, p, n)) return CALL(send)(fd, p, n, flags);
    return message(fd, p, n, flags, NULL, NULL, 0);
}
EXPORT ssize_t recvfrom(int fd, void *p, size_t n, int flags, struct sockaddr *name, socklen_t *length) {
    if (!one_in_need(fd, p, n)) return CALL(recvfrom)(fd, p, n, flags, name, length);
    return message(fd, p, n, flags, name, length, 1);
}
EXPORT ssize_t sendto(int fd, const void *p, size_t n, int flags, const struct sockaddr *name, socklen_t length) {
    if (flags & MSG_ZEROCOPY || !one_in_need(fd, p, n)) return CALL(sendto)(fd, p, n, flags, name, length);
    return message(fd, p, n, flags, (struct sockaddr *)name, &length, 0);
}
EXPORT ssize_t recvmsg(int fd, struct msghdr *m, int flags) {
    struct transfer t = { fd, m->msg_iov, (int)m->msg_iovlen, -1, flags, m };
    return is_in_need(fd, t.v, t.n) ? transfer(&t, 1) : CALL(recvmsg)(fd, m, flags);
}
EXPORT ssize_t sendmsg(int fd, const struct msghdr *m, int flags) {
    struct transfer t = { fd, m->msg_iov, (int)m->msg_iovlen, -1, flags, (struct msghdr *)m };
    return !(flags & MSG_ZEROCOPY) && is_in_need(fd, t.v, t.n) ? transfer(&t, 0) : CALL(sendmsg)(fd, m, flags);
}

/* Streams of the C library, which reads and writes large pieces straight from and to the caller's memory. */

static size_t stdio(void *p, size_t size, size_t count, FILE *file, int out) {
    size_t total = size * count, done = 0, want, n;
    char *piece = malloc(total < PIECE_BYTES ? total : PIECE_BYTES);
    if (!piece) return 0;
    do {
        want = total - done < PIECE_BYTES ? total - done : PIECE_BYTES;
        if (!out) memcpy(piece, (char *)p + done, want);
        n = out ? CALL(fread)(piece, 1, want, file) : CALL(fwrite)(piece, 1, want, file);
        if (out) memcpy((char *)p + done, piece, n);
        done += n;
    } while (n == want && done < total);
    free(piece);
    return done / size;
}

static int stdio_in_need(const void *p, size_t size, size_t count, FILE *file) {
    return size && count && count <= SIZE_MAX / size && one_in_need(fileno(file), p, size * count);
}

EXPORT size_t fread(void *p, size_t size, size_t count, FILE *file) {
    return stdio_in_need(p, size, count, file) ? stdio(p, size, count, file, 1) : CALL(fread)(p, size, count, file);
}
EXPORT size_t fwrite(const void *p, size_t size, size_t count, FILE *file) {
    if (!stdio_in_need(p, size, count, file)) return CALL(fwrite)(p, size, count, file);
    return stdio((void *)p, size, count, file, 0);
}
#undef fread_unlocked
#undef fwrite_unlocked
EXPORT size_t fread_unlocked(void *p, size_t size, size_t count, FILE *file) { return fread(p, size, count, file); }
EXPORT size_t fwrite_unlocked(const void *p, size_t size, size_t count, FILE *file) {
    return fwrite(p, size, count, file);
}

/* What a compiler with _FORTIFY_SOURCE calls, where it knows how much room there is. */

static void check(size_t asked, size_t room) {
    if (asked > room) abort();
}
EXPORT ssize_t __read_chk(int fd, void *p, size_t n, size_t room) {
    check(n, room);
    return read(fd, p, n);
}
EXPORT ssize_t __pread64_chk(int fd, void *p, size_t n, off_t at, size_t room) {
    check(n, room);
    return pread64(fd, p, n, at);
}
EXPORT ssize_t __pread_chk(int fd, void *p, size_t n, off_t at, size_t room) {
    return __pread64_chk(fd, p, n, at, room);
}
EXPORT ssize_t __recv_chk(int fd, void *p, size_t n, size_t room, int flags) {
    check(n, room);
    return recv(fd, p, n, flags);
}
EXPORT ssize_t __recvfrom_chk(
    int fd, void *p, size_t n, size_t room, int flags, struct sockaddr *name, socklen_t *length
) {
    check(n, room);
    return recvfrom(fd, p, n, flags, name, length);
}
EXPORT size_t __fread_chk(void *p, size_t room, size_t size, size_t count, FILE *file) {
    check(size * count, room);
    return fread(p, size, count, file);
}

/* What pyswap calls. */

#define OURS(name) { #name, (void *)name }
static const struct { const char *name; void *function; } ours[] = {
    OURS(read), OURS(write), OURS(pread), OURS(pwrite), OURS(pread64), OURS(pwrite64), OURS(readv), OURS(writev),
    OURS(preadv), OURS(pwritev), OURS(preadv64), OURS(pwritev64), OURS(preadv2), OURS(pwritev2), OURS(preadv64v2),
    OURS(pwritev64v2), OURS(recv), OURS(send), OURS(recvfrom), OURS(sendto), OURS(recvmsg), OURS(sendmsg), OURS(fread),
    OURS(fwrite), OURS(fread_unlocked), OURS(fwrite_unlocked), OURS(__read_chk), OURS(__pread_chk), OURS(__pread64_chk),
    OURS(__recv_chk), OURS(__recvfrom_chk), OURS(__fread_chk),
};

EXPORT void pyswap_shim_begin(owns_t ask, int kernel_cannot) {
    user_only = kernel_cannot;
    __atomic_store_n(&owns, ask, __ATOMIC_RELEASE);
}

/* Whether every library calls us without more ado. */
EXPORT int pyswap_shim_is_preloaded(void) { return dlsym(RTLD_DEFAULT, "pread64") == (void *)pread64; }

#if defined(__x86_64__)
#define SLOT_TYPES(type) ((type) == R_X86_64_JUMP_SLOT || (type) == R_X86_64_GLOB_DAT)
#elif defined(__aarch64__)
#define SLOT_TYPES(type) ((type) == R_AARCH64_JUMP_SLOT || (type) == R_AARCH64_GLOB_DAT)
#else
#define SLOT_TYPES(type) 0
#endif

struct object {
    ElfW(Addr) base, relro, relro_end;
    const ElfW(Sym) *symbols;
    const char *strings;
};

static void slot_set(const struct object *o, void **slot, void *function) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)slot & ~(page - 1);
    int is_read_only = (uintptr_t)slot >= o->relro && (uintptr_t)slot < o->relro_end;
    if (__atomic_load_n(slot, __ATOMIC_RELAXED) == function) return;
    if (is_read_only && mprotect((void *)start, page, PROT_READ | PROT_WRITE) != 0) return;
    __atomic_store_n(slot, function, __ATOMIC_RELEASE);
    if (is_read_only) mprotect((void *)start, page, PROT_READ);
}

static void slots_hook(const struct object *o, const ElfW(Rela) *r, size_t bytes) {
    for (size_t i = 0; i < bytes / sizeof *r; i++) {
        const char *name = o->strings + o->symbols[ELF64_R_SYM(r[i].r_info)].st_name;
        if (!SLOT_TYPES(ELF64_R_TYPE(r[i].r_info))) continue;
        for (size_t k = 0; k < sizeof ours / sizeof *ours; k++)
            if (strcmp(name, ours[k].name) == 0) slot_set(o, (void **)(o->base + r[i].r_offset), ours[k].function);
    }
}

static int object_hook(struct dl_phdr_info *info, size_t size, void *self) {
    struct object o = { info->dlpi_addr, 0, 0, NULL, NULL };
    const ElfW(Dyn) *d = NULL;
    const ElfW(Rela) *jumps = NULL, *others = NULL;
    size_t jumps_bytes = 0, others_bytes = 0;
    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *h = &info->dlpi_phdr[i];
        uintptr_t start = o.base + h->p_vaddr;
        if (h->p_type == PT_LOAD && (uintptr_t)self >= start && (uintptr_t)self < start + h->p_memsz) return 0;
        if (h->p_type == PT_DYNAMIC) d = (const ElfW(Dyn) *)start;
        if (h->p_type == PT_GNU_RELRO) { o.relro = start; o.relro_end = start + h->p_memsz; }
    }
    /* The C library, its loader and the kernel's object are let be. */
    if (!d || strstr(info->dlpi_name, "/libc.so") || strstr(info->dlpi_name, "/ld-")) return 0;
    if (strstr(info->dlpi_name, "vdso")) return 0;
    for (; d->d_tag != DT_NULL; d++) {
        if (d->d_tag == DT_SYMTAB) o.symbols = (const ElfW(Sym) *)d->d_un.d_ptr;
        if (d->d_tag == DT_STRTAB) o.strings = (const char *)d->d_un.d_ptr;
        if (d->d_tag == DT_JMPREL) jumps = (const ElfW(Rela) *)d->d_un.d_ptr;
        if (d->d_tag == DT_PLTRELSZ) jumps_bytes = d->d_un.d_val;
        if (d->d_tag == DT_RELA) others = (const ElfW(Rela) *)d->d_un.d_ptr;
        if (d->d_tag == DT_RELASZ) others_bytes = d->d_un.d_val;
    }
    if (!o.symbols || !o.strings) return 0;
    if (jumps) slots_hook(&o, jumps, jumps_bytes);
    if (others) slots_hook(&o, others, others_bytes);
    return 0;
}

/* Have the libraries that are loaded now call ours. */
EXPORT void pyswap_shim_hook(void) { dl_iterate_phdr(object_hook, (void *)pyswap_shim_hook); }
