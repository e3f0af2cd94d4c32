/* What the kernel does, one step a system call: mappings, faults, userfaultfd, the store, the end of a process.

   A page's bytes are FRESH (those that were last written) or STALE; so there may be any number of writes.  What
   is taken for a slot while somebody writes is stale: that is the worst that a write can be.
*/
byte mem[PAGES];                    /* the page store */
bit  filled_in[PAGES];              /* the page was written, and not with zeros */
byte mapping[ADDRESSES];            /* of an address in a worker: the page table entry's state */
byte vma[ADDRESSES] = NONE;         /* the page id that its mapping leads to */
bit  unregistered[WORKERS];         /* while the attendant remaps it */

bit  born[WORKERS];                 /* there is such a process */
bit  dead[WORKERS];                 /* and it is dead: its memory is gone */
byte blocked[WORKERS];              /* the index of its fault, plus 1 */
bit  message[WORKERS];              /* the fault is yet to be read */
bit  fault_write[WORKERS];
bit  fault_protected[WORKERS];
byte attendant_at[WORKERS];         /* how far it has come with its order */
bit  quiet;                         /* nobody begins anything any more */

/* UFFDIO_WAKE: a thread that waits at an address goes on; it may fault again. */
inline wake(w, i) {
    if
    :: blocked[w] == (i) + 1 -> blocked[w] = 0; message[w] = 0; fault_write[w] = 0; fault_protected[w] = 0
    :: else
    fi
}

/* uffd_continue(), and where it was mapped before uffd_protect(off): map_run(). */
inline ioctl_map(w, i, p, writable, write) {
    if
    :: ALIVE(w) ->
        MUST(L_ADDRESS, vma[AT(w, i)] == p && mem[p] != HOLE);
        if
        :: mapping[AT(w, i)] == UNMAPPED -> mapping[AT(w, i)] = (writable -> WRITABLE : PROTECTED)
        :: mapping[AT(w, i)] != UNMAPPED && write -> mapping[AT(w, i)] = WRITABLE
        :: else
        fi;
        wake(w, i)
    :: else
    fi
}

/* uffd_protect(off), as engine_unprotect(): what is not mapped stays so, and its thread faults again. */
inline ioctl_unprotect(w, i, p) {
    if
    :: ALIVE(w) ->
        MUST(L_ADDRESS, vma[AT(w, i)] == p);
        if
        :: mapping[AT(w, i)] == PROTECTED -> mapping[AT(w, i)] = WRITABLE
        :: else
        fi;
        wake(w, i)
    :: else
    fi
}

/* uffd_protect(on) of one page, as engine_protect(): ENOENT and ESRCH mean that there is no mapping. */
inline ioctl_protect(w, i) {
    if
    :: mapping[AT(w, i)] == WRITABLE && !unregistered[w] -> mapping[AT(w, i)] = PROTECTED
    :: else
    fi
}

/* store_punch(): the bytes go, and every mapping of them. */
inline punch(p) {
    mem[p] = HOLE;
    for (k : 0 .. ADDRESSES - 1) {
        if
        :: vma[k] == p -> mapping[k] = UNMAPPED
        :: else
        fi
    }
    k = 0
}

/* The end of a process at any instant. */
inline kill_worker(w) {
    dead[w] = 1; blocked[w] = 0; message[w] = 0; fault_write[w] = 0; fault_protected[w] = 0;
    for (k : 0 .. INDICES - 1) {
        mapping[AT(w, k)] = UNMAPPED; vma[AT(w, k)] = NONE
    }
    k = 0; unregistered[w] = 0; attendant_at[w] = 0
}

/* Bytes are written: no slot and no other copy of the page has them.  Nobody else may see it of a private page. */
inline write_bytes(w, i, nonzero) {
    k = vma[AT(w, i)];
    MUST(L_PRIVATE, !FORKS || (map[AT(w, i)] == k && !(SNAPSHOT && k == 0)));
    MUST(L_PRIVATE, !FORKS || !ALIVE(1 - w) || !region[1 - w] ||
        (map[AT(1 - w, i)] != k && (vma[AT(1 - w, i)] != k || mapping[AT(1 - w, i)] == UNMAPPED)));
    filled_in[k] = nonzero;
    if :: slot_state[2 * k] != S_FREE -> slot_bytes[2 * k] = STALE :: else fi;
    if :: slot_state[2 * k + 1] != S_FREE -> slot_bytes[2 * k + 1] = STALE :: else fi;
    k = 0
}

inline fault_at(w, i, write) {
    fault_write[w] = write;
    fault_protected[w] = mapping[AT(w, i)] == PROTECTED;
    blocked[w] = (i) + 1;
    message[w] = 1
}

#define MAY_FAULT(w) (!quiet && TOUCHED(w) && ALIVE(w) && blocked[w] == 0 && !unregistered[w])
#define TOUCHES(w, i) \
    :: d_step { mapping[AT(w, i)] == WRITABLE -> write_bytes(w, i, 1) } \
    :: d_step { ZEROS && mapping[AT(w, i)] == WRITABLE -> write_bytes(w, i, 0) } \
    :: d_step { MAY_FAULT(w) && mapping[AT(w, i)] == UNMAPPED -> fault_at(w, i, 0) } \
    :: d_step { MAY_FAULT(w) && mapping[AT(w, i)] != WRITABLE -> fault_at(w, i, 1) }

/* The threads of a worker: any may write what is mapped writable; one at a time faults, and waits. */
proctype threads(byte w) {
    byte k;
end:
    do
    TOUCHES(w, 0)
#if INDICES > 1
    TOUCHES(w, 1)
#endif
#if FORKS
    :: d_step { unregistered[w] && mapping[AT(w, 0)] == UNMAPPED ->
        /* The kernel maps by itself what is there; it would make a hole a page of zeros. */
        MUST(L_ADDRESS, mem[vma[AT(w, 0)]] != HOLE);
        mapping[AT(w, 0)] = WRITABLE }
#endif
#if TWINS
    /* A signal ends the wait for a fault that was read; the thread faults again. */
    :: d_step { !quiet && blocked[w] && !message[w] -> blocked[w] = 0 }
#endif
#if WORKER_DIES
    :: d_step { !quiet && ALIVE(w) -> kill_worker(w) }
#endif
    od
}

/* order_remap() in core/attendant: a copy is mapped over the old page and registered, in two steps between which
   others may touch it. */
proctype attendant(byte w) {
    byte name, p;
end:
    do
    :: d_step { attendant_at[w] == 0 && ALIVE(w) && nempty(orders[w]) ->
        orders[w] ? name, p;
        vma[AT(w, 0)] = p; mapping[AT(w, 0)] = UNMAPPED; unregistered[w] = 1; attendant_at[w] = 1 }
    /* An answer that is not sent yet is as good as one that is not read yet. */
    :: d_step { attendant_at[w] == 1 && nfull(answers[w]) ->
        unregistered[w] = 0; answers[w] ! name; attendant_at[w] = 0; name = 0; p = 0 }
    od
}
