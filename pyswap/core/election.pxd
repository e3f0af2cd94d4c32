"""What a worker does about a swapper that died, or is well no more: have another one started.

    1 one worker is elected: who binds the pool's abstract name, which the kernel gives back if it dies too
    2 it kills the old swapper for certain, and waits for its end
    3 it starts another, a child of nobody, which takes the vault's two ends and finds the rest there
    4 everybody goes on when the generation in the control segment has grown

Two swappers at once cannot be, whatever happens here: each takes a lock on the control segment that the kernel gives
back at its end only (`swapper.take_fence`).

A process id means nothing in another namespace of process ids than the swapper's.  A worker there goes by the
heartbeat alone, cannot kill, and stands for election last.

This runs in the attendant: no malloc, no Python, all signals blocked.
"""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.layout cimport header_t
from pyswap.core.lock cimport futex_wait, load32, load64, now_ns

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <sched.h>
    #include <signal.h>
    #include <stddef.h>
    #include <string.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/un.h>
    #include <sys/wait.h>
    #include <unistd.h>

    #ifndef __NR_close_range
    #define __NR_close_range 436
    #endif
    #ifndef __WCLONE
    #define __WCLONE 0x80000000
    #endif

    /* A descriptor, and the file that it was of: who makes a daemon of this process closes descriptors by
       number, and opens files of its own under these. */
    struct pyswap_fd { int fd; uint64_t device, inode; };
    static inline void fd_note(struct pyswap_fd *f, int fd) {
        struct stat s;
        f->fd = fd >= 0 && fstat(fd, &s) == 0 ? fd : -1;
        if (f->fd >= 0) { f->device = s.st_dev; f->inode = s.st_ino; }
    }
    /* Whether it is there still; forgotten where it is not. */
    static inline int fd_kept(struct pyswap_fd *f) {
        struct stat s;
        if (f->fd >= 0 && (fstat(f->fd, &s) < 0 || s.st_dev != f->device || s.st_ino != f->inode)) f->fd = -1;
        return f->fd >= 0;
    }
    static inline void fd_close(struct pyswap_fd *f) {
        if (fd_kept(f)) close(f->fd);
        f->fd = -1;
    }

    /* What it takes to start a swapper, and how the first one was; made while there is a malloc. */
    struct pyswap_heir {
        char **argv, **environment;
        const uint64_t *limits, *processors;
        struct pyswap_fd reader, writer, control;
        int nice;
        uint32_t mask, name_length;
        char *name;
    };
    static inline int heir_whole(struct pyswap_heir *heir) {
        return fd_kept(&heir->reader) && fd_kept(&heir->writer) && fd_kept(&heir->control);
    }
    struct pyswap_start { struct pyswap_heir *heir; pid_t pid; int error; };

    /* The stacks of two processes that share our memory until one has ended and one is another program. */
    static char pyswap_stacks[2][32768] __attribute__((aligned(64)));
    static uint32_t pyswap_stacks_taken;

    static inline int pid_open(pid_t pid) {
        int fd = (int)syscall(SYS_pidfd_open, pid, 0);
        return fd < 0 ? -errno : fd;
    }
    static inline void pid_kill(int pidfd) { syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0); }
    static inline void close_fd(int fd) { if (fd >= 0) close(fd); }

    /* In the swapper to be: it is no child of this program, which may be nice, bounded, or of few processors.
       What a process has given up for good it cannot have back: then as much of it as there is. */
    static inline void born_again(const struct pyswap_heir *heir) {
        struct rlimit most, now;
        int i;
        for (i = 0; i < (int)RLIM_NLIMITS && i < 16; i++) {
            most.rlim_cur = heir->limits[2 * i];
            most.rlim_max = heir->limits[2 * i + 1];
            if (setrlimit(i, &most) == 0 || getrlimit(i, &now) < 0) continue;
            if (most.rlim_max > now.rlim_max) most.rlim_max = now.rlim_max;
            if (most.rlim_cur > most.rlim_max) most.rlim_cur = most.rlim_max;
            setrlimit(i, &most);
        }
        syscall(SYS_sched_setaffinity, 0, 16 * sizeof(uint64_t), heir->processors);
        setpriority(PRIO_PROCESS, 0, heir->nice);
        umask((mode_t)heir->mask);
    }
    /* In the swapper to be: the vault's ends and the control segment become descriptors 3 to 5, no others
       are left. */
    static inline int start_program(void *argument) {
        struct pyswap_start *s = argument;
        int null = open("/dev/null", O_RDWR), reader, writer, control;
        if (null < 0) { s->error = errno; _exit(127); }
        born_again(s->heir);
        reader = fcntl(s->heir->reader.fd, F_DUPFD, 10);
        writer = fcntl(s->heir->writer.fd, F_DUPFD, 10);
        control = fcntl(s->heir->control.fd, F_DUPFD, 10);
        if (reader < 0 || writer < 0 || control < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 ||
            dup2(reader, 3) < 0 || dup2(writer, 4) < 0 || dup2(control, 5) < 0 ||
            setsid() < 0 || chdir("/") < 0) { s->error = errno; _exit(127); }
        syscall(__NR_close_range, 6, ~0U, 0);
        execve(s->heir->argv[0], s->heir->argv, s->heir->environment);
        s->error = errno;
        _exit(127);
        return 0;
    }
    /* In between: so that nobody waits for the swapper, and os.wait() in this process never sees it. */
    static inline int start_middle(void *argument) {
        struct pyswap_start *s = argument;
        s->pid = clone(start_program, pyswap_stacks[1] + sizeof pyswap_stacks[1], CLONE_VM | CLONE_VFORK | SIGCHLD, s);
        if (s->pid < 0) s->error = errno;
        _exit(0);
        return 0;
    }
    /* 0 and a pidfd of the new swapper (-1: it has ended already), or -errno. */
    static inline int heir_start(struct pyswap_heir *heir, int *pidfd) {
        struct pyswap_start s = { heir, -1, 0 };
        pid_t pid;
        int status;
        *pidfd = -1;
        while (swap32(&pyswap_stacks_taken, 1)) usleep(1000);
        /* Without a signal at its end it is nobody's to wait for but ours. */
        pid = clone(start_middle, pyswap_stacks[0] + sizeof pyswap_stacks[0], CLONE_VM | CLONE_VFORK, &s);
        if (pid < 0) s.error = errno;
        else while (waitpid(pid, &status, __WCLONE) < 0 && errno == EINTR) { /* again */ }
        store32(&pyswap_stacks_taken, 0);
        if (s.error == 0) *pidfd = pid_open(s.pid);
        return -s.error;
    }
    /* The elected's mark, or -errno: EADDRINUSE where another was. */
    static inline int name_bind(const char *name, uint32_t length) {
        struct sockaddr_un a = { .sun_family = AF_UNIX };
        int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), error;
        if (fd < 0) return -errno;
        memcpy(a.sun_path + 1, name, length);
        if (bind(fd, (struct sockaddr *)&a, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length)) == 0)
            return fd;
        error = errno;
        close(fd);
        return -error;
    }
    /* Waits for either to be readable, or to have ended: bit 0 and bit 1; 0 after the time. */
    static inline int wait_either(int first, int second, int timeout_ms) {
        struct pollfd p[2] = { { .fd = first, .events = POLLIN }, { .fd = second, .events = POLLIN } };
        if (poll(p, 2, timeout_ms) <= 0) return 0;
        return (p[0].revents != 0) | (p[1].revents != 0) << 1;
    }
    static inline void heir_forget(void) { pyswap_stacks_taken = 0; }
    """
    struct pyswap_fd:
        int fd
    void fd_note(pyswap_fd *f, int fd) noexcept nogil
    bint fd_kept(pyswap_fd *f) noexcept nogil
    void fd_close(pyswap_fd *f) noexcept nogil
    struct pyswap_heir:
        char **argv
        char **environment
        const uint64_t *limits
        const uint64_t *processors
        int nice
        uint32_t mask
        pyswap_fd reader
        pyswap_fd writer
        pyswap_fd control
        char *name
        uint32_t name_length
    bint heir_whole(pyswap_heir *heir) noexcept nogil
    int heir_start(pyswap_heir *heir, int *pidfd) noexcept nogil
    void heir_forget() noexcept nogil
    int name_bind(const char *name, uint32_t length) noexcept nogil
    int pid_open(int pid) noexcept nogil
    void pid_kill(int pidfd) noexcept nogil
    void close_fd(int fd) noexcept nogil
    int wait_either(int first, int second, int timeout_ms) noexcept nogil
    int ESRCH
    int EXDEV

cdef enum:
    LOOK_MS = 1000              # how often a heartbeat is looked at
    SILENT_LOOKS = 6            # so many looks without one: the swapper is stopped, or stuck
    START_TRIES = 3
    START_MS = 10_000           # a new swapper that has not begun after so long is given up
    ELECTION_MS = 40_000        # and so is waiting for another worker's
    STEP_MS = 5
    RENEWALS = 40               # swappers that died one after the other before their first heartbeat

cdef enum seen:
    SEEN_NOTHING = 0
    SEEN_ORDER = 1              # there is something on the channel, or its end
    SEEN_END = 2                # the swapper has ended, or is not well

cdef struct watch_t:            # what one attendant knows of the swapper
    int pidfd                   # or -errno
    pyswap_fd opened            # it, to be known again
    uint64_t pid_namespace      # this process's; 0: not known
    int mark                    # as long as this worker is the elected one
    uint32_t generation
    uint64_t heartbeat          # when it was elected for last
    uint64_t seen
    uint32_t silent
    uint32_t renewals


cdef inline int swapper_open(watch_t *w, header_t *header) noexcept nogil:
    """A pidfd of the swapper, or -errno: -EXDEV where its process id is another process's here, or nobody's."""
    if w.pid_namespace == 0 or load64(&header.swapper_namespace) != w.pid_namespace:
        return -EXDEV
    return pid_open(<int>load32(&header.swapper_pid))


cdef inline void watch_follow(watch_t *w, header_t *header) noexcept nogil:
    """Look at the swapper that there is now; at none where it has ended already."""
    fd_close(&w.opened)
    w.silent = 0
    while True:
        w.generation = load32(&header.swapper_generation)
        w.pidfd = swapper_open(w, header)
        if load32(&header.swapper_generation) == w.generation:
            fd_note(&w.opened, w.pidfd)
            return
        close_fd(w.pidfd)


cdef inline seen watch_look(watch_t *w, header_t *header, int channel) noexcept nogil:
    """Wait for an order, for the swapper's end, or until it is time to look again."""
    cdef int found
    cdef uint64_t beat
    if w.pidfd == -ESRCH:
        return SEEN_END
    # Without a descriptor of it, as where there are too many, the heartbeat alone tells.
    found = wait_either(channel, w.pidfd, LOOK_MS)
    if found & 1:
        return SEEN_ORDER
    if found & 2:
        return SEEN_END
    beat = load64(&header.heartbeat) + load64(&header.progress)
    w.silent = w.silent + 1 if beat == w.seen else 0
    w.seen = beat
    return SEEN_END if w.silent >= SILENT_LOOKS else SEEN_NOTHING


cdef inline bint successor_begins(watch_t *w, header_t *header, int pidfd) noexcept nogil:
    """Wait until a new swapper has raised the generation; False: it has ended, or takes too long."""
    cdef uint64_t deadline = now_ns() + <uint64_t>START_MS * 1_000_000
    while load32(&header.swapper_generation) == w.generation:
        if pidfd < 0 or now_ns() > deadline or wait_either(pidfd, -1, STEP_MS):
            return load32(&header.swapper_generation) != w.generation
    return True


cdef inline bint successor_start(watch_t *w, header_t *header, pyswap_heir *heir) noexcept nogil:
    """As the elected: the old one ends, a new one begins."""
    cdef int _, pidfd = -1
    cdef bint begun = False
    if w.pidfd >= 0:
        pid_kill(w.pidfd)
        if not wait_either(w.pidfd, -1, ELECTION_MS):
            return False
    for _ in range(START_TRIES):
        if load32(&header.swapper_generation) != w.generation:
            return True
        if heir_start(heir, &pidfd) != 0:
            continue
        begun = successor_begins(w, header, pidfd)
        close_fd(pidfd)
        if begun:
            return True
    return False


cdef inline bint swapper_renew(watch_t *w, header_t *header, pyswap_heir *heir) noexcept nogil:
    """Have another swapper, or find that there is one; False: there will be none.

    An elected worker that is stopped keeps the name: after half of the time the others go on without it, since the
    fence lets one swapper live whoever starts them.  Time is counted in steps, as this process may be stopped too.
    One whose descriptors were closed leaves it to others.
    """
    cdef uint32_t steps = 0
    cdef bint done = False, whole
    # One that has come to its first heartbeat was well.
    w.renewals = w.renewals + 1 if load64(&header.heartbeat) == w.heartbeat else 0
    w.heartbeat = load64(&header.heartbeat)
    while w.renewals < RENEWALS and not done and steps < ELECTION_MS // STEP_MS:
        if load32(&header.swapper_generation) != w.generation:
            break
        whole = heir_whole(heir)
        # Who cannot kill the old one leaves it to those that can.
        if whole and (w.pidfd != -EXDEV or steps >= ELECTION_MS // STEP_MS // 2):
            w.mark = name_bind(heir.name, heir.name_length)
        if not whole or w.mark < 0 and steps < ELECTION_MS // STEP_MS // 2:
            futex_wait(&header.swapper_generation, w.generation, STEP_MS * 1_000_000)
            steps += 1
            continue
        done = successor_start(w, header, heir)
        close_fd(w.mark)
        w.mark = -1
        if not done:
            break
    if load32(&header.swapper_generation) == w.generation:
        return False
    watch_follow(w, header)
    return True
