/* The control segment: frames, page table, slots, regions, copies; and the steps that change them.

   One step here is one compare-and-swap, one system call, or stores that only the lock's holder makes.
*/
/* The frame word: core/frame. */
#define FREE      0
#define FILLING   1
#define PRESENT   2
#define WRITEBACK 3
#define EVICTING  4

byte state[FRAMES];
bit  locked[FRAMES];
bit  dirty[FRAMES];
bit  redirtied[FRAMES];
bit  pinned[FRAMES];
byte page[FRAMES] = NONE;           /* stays when the frame is free, as in the code */
byte slot[FRAMES] = NONE;
byte mappers[FRAMES];               /* bits of workers */
byte waiters[FRAMES];
byte seen[2] = NONE;                /* by fault thread: the frame whose generation it has seen, until it is claimed anew */

/* A page table entry: 0 empty, 1 + frame, 8 + slot. */
byte pte[PAGES];
#define FRAME_ENTRY(f) (1 + (f))
#define SLOT_ENTRY(s)  ((s) == NONE -> 0 : 8 + (s))
#define IS_FRAME(e)    ((e) >= 1 && (e) < 8)
#define IS_SLOT(e)     ((e) >= 8)
#define FRAME_OF(e)    ((e) - 1)
#define SLOT_OF(e)     (IS_SLOT(e) -> (e) - 8 : NONE)

#define OWNS(f)        (page[f] != NONE && pte[page[f]] == FRAME_ENTRY(f))
#define RESIDENT(f)    (state[f] == PRESENT || state[f] == WRITEBACK)

#if FRAMES == 1
#define ANY_FRAME(is)  is(0)
#elif FRAMES == 2
#define ANY_FRAME(is)  (is(0) || is(1))
#else
#define ANY_FRAME(is)  (is(0) || is(1) || is(2))
#endif
#define IS_FREE(f)     (state[f] == FREE)

/* A page has one slot at most, and a second while it is written out: 2p and 2p + 1, whichever they are in the area. */
#define S_FREE     0
#define S_RESERVED 1
#define S_USED     2
#define SLOTS      (2 * PAGES)
byte slot_state[SLOTS];
byte slot_bytes[SLOTS];

byte references[PAGES];
bit  region[WORKERS];               /* a worker's regions live */
byte users[WORKERS];                /* who holds them */
byte map[ADDRESSES] = NONE;         /* the page id at an index */
bit  copying[WORKERS];              /* COPYING in the map: it is about to be mapped by the attendant */
byte gate[WORKERS];                 /* who decides about a write */
bit  shut[WORKERS];

#define C_FREE    0
#define C_ORDERED 1
#define C_ENDING  2
byte copy_state[WORKERS];
byte copy_old[WORKERS] = NONE;
byte copy_name[WORKERS];            /* the generation, which is in an answer */

#define RUNS    0
#define DEAD    1
#define REPAIRS 2
#define DYING   3                   /* one thread after the other is stopped */
byte swapper;

/* A free frame, locked, in FILLING: frame_claim(). */
inline claim(f, got) {
    d_step {
        got = 0; f = 0;
        do
        :: f < FRAMES && !got -> if :: state[f] == FREE -> got = 1 :: else -> f++ fi
        :: else -> break
        od;
        if
        :: got ->
            MUST(L_PANIC, !locked[f]);
            state[f] = FILLING; locked[f] = 1;
            if :: seen[0] == f -> seen[0] = NONE :: else fi;
            if :: seen[1] == f -> seen[1] = NONE :: else fi
        :: else -> f = 0
        fi
    }
}

/* frame_claim_wait(): nothing is held. */
inline claim_wait(f) {
    atomic { ANY_FRAME(IS_FREE) -> claim(f, got) }
}

/* engine_wake_waiters(). */
inline wake_waiters(bits, at) {
    d_step {
#ifndef M_NO_WAKE
        if :: bits & 1 -> wake(0, at) :: else fi;
        if :: bits & 2 -> wake(1, at) :: else fi;
#endif
        bits = 0; at = 0
    }
}

/* page_unlock(): who left word is woken after the lock has ended. */
inline unlock(f) {
    if
    :: d_step { !waiters[f] -> MUST(L_PANIC, locked[f]); locked[f] = 0 }
    :: d_step { waiters[f] ->
        MUST(L_PANIC, locked[f]);
        bits = waiters[f]; at = INDEX(page[f]); waiters[f] = 0; locked[f] = 0 };
        wake_waiters(bits, at)
    fi
}

inline free_frame(f) {
    MUST(L_PANIC, locked[f] && (state[f] == FILLING || state[f] == EVICTING) && !dirty[f]);
    bits = waiters[f]; at = INDEX(page[f]); waiters[f] = 0; state[f] = FREE;
    slot[f] = NONE; mappers[f] = 0; redirtied[f] = 0; pinned[f] = 0
}

/* From FILLING or EVICTING, lock and frame in one swap: frame_set_free(). */
inline give_back(f) {
#ifdef M_FREE_FIRST
    d_step { free_frame(f) };
    locked[f] = 0;
#else
    d_step { free_frame(f); locked[f] = 0 };
#endif
    if
    :: atomic { bits -> wake_waiters(bits, at) }
    :: d_step { !bits -> at = 0 }
    fi
}

/* frame_set_dirty(). */
inline set_dirty(f) {
    MUST(L_PANIC, locked[f] && RESIDENT(f));
#ifndef M_NO_REDIRTIED
    if :: state[f] == WRITEBACK -> redirtied[f] = 1 :: else fi;
#endif
    dirty[f] = 1
}

inline slot_free(s) {
    if
    :: s != NONE ->
        MUST(L_SLOT, slot_state[s] != S_FREE);
        slot_state[s] = S_FREE; slot_bytes[s] = HOLE
    :: else
    fi
}

/* page_take(): a page id that nobody refers to and that holds nothing; with one reference. */
inline page_take(q) {
    q = NONE;
    for (k : 0 .. PAGES - 1) {
        if :: q == NONE && references[k] == 0 && pte[k] == 0 -> q = k :: else fi
    }
    k = 0;
    if
    :: q != NONE ->
        MUST(L_ADDRESS, mem[q] == HOLE && vma[AT(0, 0)] != q && vma[AT(1, 0)] != q);
        references[q] = 1; filled_in[q] = 0
    :: else
    fi
}

/* What is in a dead process's channel goes with it. */
inline channel_close(w) {
    do
    :: nempty(orders[w]) -> orders[w] ? _, _
    :: nempty(answers[w]) -> answers[w] ? _
    :: empty(orders[w]) && empty(answers[w]) -> break
    od
}
