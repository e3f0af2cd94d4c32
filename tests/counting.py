"""Programs that count what they ask of the kernel, their children and their swapper with them."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

COUNT_CALLS = r"""
/* Counts calls into the kernel in a file that every process maps. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static long *counter;

__attribute__((constructor)) static void begin(void) {
    int fd = open(getenv("CALLS_FILE"), O_RDWR | O_CLOEXEC);
    if (fd < 0) abort();
    counter = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (counter == MAP_FAILED) abort();
    close(fd);
}

#define COUNTED(type, name, parameters, arguments)                       \
    type name parameters {                                               \
        static type (*next) parameters;                                  \
        if (!next) next = (type (*) parameters)dlsym(RTLD_NEXT, #name);  \
        if (counter) __atomic_fetch_add(counter, 1, __ATOMIC_SEQ_CST);   \
        return next arguments;                                           \
    }

COUNTED(void *, mmap, (void *a, size_t n, int p, int f, int d, off_t o), (a, n, p, f, d, o))
COUNTED(void *, mmap64, (void *a, size_t n, int p, int f, int d, off_t o), (a, n, p, f, d, o))
COUNTED(int, munmap, (void *a, size_t n), (a, n))
COUNTED(int, mprotect, (void *a, size_t n, int p), (a, n, p))
COUNTED(int, madvise, (void *a, size_t n, int b), (a, n, b))
COUNTED(int, fallocate, (int d, int m, off_t o, off_t n), (d, m, o, n))
COUNTED(int, fallocate64, (int d, int m, off_t o, off_t n), (d, m, o, n))
COUNTED(ssize_t, preadv, (int d, const struct iovec *v, int n, off_t o), (d, v, n, o))
COUNTED(ssize_t, pwritev, (int d, const struct iovec *v, int n, off_t o), (d, v, n, o))
COUNTED(ssize_t, sendmsg, (int d, const struct msghdr *m, int f), (d, m, f))
COUNTED(ssize_t, recvmsg, (int d, struct msghdr *m, int f), (d, m, f))
COUNTED(ssize_t, sendto, (int d, const void *b, size_t n, int f, const struct sockaddr *a,
                          socklen_t l), (d, b, n, f, a, l))
COUNTED(ssize_t, recvfrom, (int d, void *b, size_t n, int f, struct sockaddr *a, socklen_t *l),
        (d, b, n, f, a, l))

int ioctl(int fd, unsigned long request, ...) {
    static int (*next)(int, unsigned long, void *);
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (!next) next = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
    if (counter) __atomic_fetch_add(counter, 1, __ATOMIC_SEQ_CST);
    return next(fd, request, argument);
}
"""


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose programs count what they ask of the kernel."""
    folder = tmp_path_factory.mktemp("calls")
    source, library = folder / "calls.c", folder / "calls.so"
    source.write_text(COUNT_CALLS)
    compiler = shutil.which(os.environ.get("CC", "cc")) or "gcc"
    flags = ["-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"]
    subprocess.run([compiler, *flags, "-o", library, source, "-ldl"], check=True)
    (folder / "count").write_bytes(bytes(4096))
    return os.environ | {"LD_PRELOAD": str(library), "CALLS_FILE": str(folder / "count")}
