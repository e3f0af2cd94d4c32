/* The protocol: two workers, a swapper, pages, and a frame less than they need.

   kernel.pml    what the kernel and the workers' threads do
   tables.pml    the control segment's words and the steps that change them
   fault.pml     a fault, and a copy's beginning       evict.pml      eviction and write-ahead
   copy.pml      a copy's end                          fork.pml       forks, ends of workers, sweeps
   takeover.pml  the next swapper's repair

   run.py checks it in several configurations, and that each mutant (M_...) is found out.
*/
#ifndef FORKS                       /* the page is private, and was shared by a fork; else there are two, shared */
#define FORKS 0
#endif
#ifndef BOTH_BORN                   /* both workers are there at first */
#define BOTH_BORN 1
#endif
#ifndef MAY_BEAR                    /* the first may fork whenever the second is not there */
#define MAY_BEAR 0
#endif
#ifndef TWINS                       /* both fault threads serve the first worker, whose faults are interrupted */
#define TWINS 0
#endif
#ifndef SNAPSHOT                    /* somebody else shares the first page, and only keeps it */
#define SNAPSHOT 0
#endif
#ifndef EVICTS
#define EVICTS 1
#endif
#ifndef WRITE_AHEAD                 /* pages are written out and stay too */
#define WRITE_AHEAD 1
#endif
#ifndef WORKER_DIES
#define WORKER_DIES 0
#endif
#ifndef SWAPPER_DIES
#define SWAPPER_DIES 0
#endif
#ifndef FINE                        /* every step of the swapper for itself; else what it does under a lock at once */
#define FINE SWAPPER_DIES
#endif
#ifndef ZEROS                       /* zeros may be written too */
#define ZEROS 1
#endif
#ifndef FRAMES
#define FRAMES 1
#endif
#ifndef PAGES
#define PAGES 2
#endif
#define TOUCHED(w) (!TWINS || (w) == 0)

#if FINE
#define TOGETHER
#else
#define TOGETHER atomic
#endif

#define WORKERS   2
#if FORKS
#define INDICES   1
#define INDEX(p)  0
#else
#define INDICES   2
#define INDEX(p)  (p)
#endif
#define ADDRESSES (WORKERS * INDICES)
#define AT(w, i)  ((w) * INDICES + (i))
#define NONE      15

/* An address, in a page table of the kernel's. */
#define UNMAPPED  0
#define PROTECTED 1
#define WRITABLE  2
/* A page's bytes. */
#define HOLE      0
#define STALE     1
#define FRESH     2
#define ALIVE(w)  (born[w] && !dead[w])

#define TWO       (BOTH_BORN || MAY_BEAR)
#define MAIN      (MAY_BEAR || WORKER_DIES)
#define THREADS   (1 + TWO + EVICTS + 2 * FORKS + MAIN + 1)

/* The laws.  Which was broken is told by its number. */
#define L_LOST    1                 /* an allocated page is in neither frame nor slot, or not with its bytes */
#define L_WRONG   2                 /* a worker sees other bytes than were written last */
#define L_UNSEEN  3                 /* what is writable is dirty, and nobody else's */
#define L_STALE   4                 /* a clean page's bytes are in its slot, or zeros */
#define L_ASTRAY  5                 /* bytes are in the store, and of no frame */
#define L_PRIVATE 6                 /* a private page is written and somebody else sees it, or it is written in vain */
#define L_ADDRESS 7                 /* an ioctl is for another page than the address leads to, or for a hole */
#define L_SLOT    8                 /* a slot is somebody else's, or free */
#define L_PANIC   9                 /* core's own checks */
#define L_HANGS   10                /* somebody waits for ever */
#define L_LEAK    11                /* a frame, a slot or a page is nobody's and not free */
#define MUST(law, is) assert((law) == 0 || (is))

/* The end of the swapper's process: each thread forgets where it was, the last one's end is the process's. */
chan die = [0] of { byte };
#if SWAPPER_DIES
#define UNLESS_KILLED(forget) unless { atomic { die ? eval(me) -> forget; \
    if :: me + 1 < THREADS -> die ! me + 1 :: else -> swapper = DEAD fi } }
#define CHANNEL 3
#else
#define UNLESS_KILLED(forget)
#define CHANNEL 1
#endif
chan orders[2] = [CHANNEL] of { byte, byte };
chan answers[2] = [CHANNEL] of { byte };

#include "tables.pml"
#include "kernel.pml"
#include "fault.pml"
#if EVICTS
#include "evict.pml"
#endif
#if FORKS
#include "copy.pml"
#endif
#include "fork.pml"
#if SWAPPER_DIES
#include "takeover.pml"
#endif

/* Where a page's bytes are: in the store, or else in the slot that its entry or its frame names, or else zeros. */
#define IN_FRAME(p)  (IS_FRAME(pte[p]) && slot[FRAME_OF(pte[p])] != NONE)
#define VALUE(p)     (mem[p] != HOLE -> mem[p] : (IS_SLOT(pte[p]) -> slot_bytes[SLOT_OF(pte[p])] : \
    (IN_FRAME(p) -> slot_bytes[slot[FRAME_OF(pte[p])]] : (filled_in[p] -> STALE : FRESH))))
#define LIVES(w)     (ALIVE(w) && region[w])

#define LOST(w, i)   (LIVES(w) && VALUE(map[AT(w, i)]) != FRESH)
#define WRONG(w, i)  (mapping[AT(w, i)] != UNMAPPED && (mem[vma[AT(w, i)]] != FRESH || \
    (vma[AT(w, i)] != map[AT(w, i)] && vma[AT(w, i)] != copy_old[w])))
#define UNSEEN(w, i) (mapping[AT(w, i)] == WRITABLE && (!IS_FRAME(pte[vma[AT(w, i)]]) || \
    !dirty[FRAME_OF(pte[vma[AT(w, i)]])] || (FORKS && !shut[0] && references[vma[AT(w, i)]] > 1)))
#define STALE_IN(f)  (state[f] >= PRESENT && !dirty[f] && OWNS(f) && references[page[f]] && mem[page[f]] != HOLE && \
    (slot[f] == NONE -> filled_in[page[f]] : slot_bytes[slot[f]] != FRESH))
#define ASTRAY(p)    ((mem[p] != HOLE && !IS_FRAME(pte[p])) || (IS_FRAME(pte[p]) && page[FRAME_OF(pte[p])] != p))
#define FOREIGN(p)   (IS_SLOT(pte[p]) && slot_state[SLOT_OF(pte[p])] != S_USED)

#define LEAKED_FRAME(f) (locked[f] || state[f] == FILLING || state[f] == EVICTING || state[f] == WRITEBACK)
#define LEAKED_SLOT(s)  (slot_state[s] == S_RESERVED || (slot_state[s] == S_USED && \
    pte[(s) / 2] != SLOT_ENTRY(s) && !(IN_FRAME((s) / 2) && slot[FRAME_OF(pte[(s) / 2])] == s)))
#define LEAKED_PAGE(p)  (FORKS && (references[p] != (map[0] == (p)) + (map[1] == (p)) + ((p) == 0 && SNAPSHOT) || \
    (references[p] == 0 && pte[p] != 0)))
#define HELD(w)         (blocked[w] || users[w] || gate[w] || shut[w] || copying[w] || copy_state[w] || \
    (dead[w] && region[w]))

#if INDICES == 1
#define ANYWHERE(is) (is(0, 0) || is(1, 0))
#else
#define ANYWHERE(is) (is(0, 0) || is(0, 1) || is(1, 0) || is(1, 1))
#endif
#if PAGES == 2
#define ANY_PAGE(is) (is(0) || is(1))
#define ANY_SLOT(is) (is(0) || is(1) || is(2) || is(3))
#else
#define ANY_PAGE(is) (is(0) || is(1) || is(2))
#define ANY_SLOT(is) (is(0) || is(1) || is(2) || is(3) || is(4) || is(5))
#endif

/* Looks at every state, and at what is left when nothing happens any more. */
proctype monitor() {
end:
    do
    :: ANYWHERE(LOST) -> MUST(L_LOST, 0)
    :: ANYWHERE(WRONG) -> MUST(L_WRONG, 0)
    :: ANYWHERE(UNSEEN) -> MUST(L_UNSEEN, 0)
    :: ANY_FRAME(STALE_IN) -> MUST(L_STALE, 0)
    :: ANY_PAGE(ASTRAY) -> MUST(L_ASTRAY, 0)
    :: ANY_PAGE(FOREIGN) -> MUST(L_SLOT, 0)
    :: timeout -> break
    od;
    MUST(L_HANGS, swapper == RUNS && !HELD(0) && !HELD(1));
    MUST(L_LEAK, !ANY_FRAME(LEAKED_FRAME) && !ANY_SLOT(LEAKED_SLOT) && !ANY_PAGE(LEAKED_PAGE))
}

/* At some time nobody begins anything any more.  Until then the swapper may be killed at any step. */
proctype fate() {
end:
    do
    :: d_step { !quiet -> quiet = 1 }
#if SWAPPER_DIES
    :: atomic { !quiet && (swapper == RUNS || swapper == REPAIRS) -> swapper = DYING; die ! 0 }
#endif
    od
}

inline bear(w) {
    born[w] = 1; region[w] = 1;
#if FORKS
    map[w] = 0; vma[w] = 0; references[0]++
#else
    map[AT(w, 0)] = 0; vma[AT(w, 0)] = 0;
    map[AT(w, 1)] = 1; vma[AT(w, 1)] = 1;
    references[0] = 1; references[1] = 1
#endif
}

init {
    byte n;
    atomic {
#if SNAPSHOT
        references[0] = 1;
#endif
        bear(0);
#if BOTH_BORN
        bear(1);
#endif
#if SWAPPER_DIES
        run takeover(n); n++;
#endif
        run threads(0); run fault(n, 0, 0); n++;
#if TWO
        run threads(1); run fault(n, (TWINS -> 0 : 1), 1); n++;
#endif
#if EVICTS
        run evict(n); n++;
#endif
#if FORKS
        run attendant(0); run attendant(1); run settle(n); n++; run sweeper(n); n++;
#endif
#if MAIN
        run main(n); n++;
#endif
        n = 0;
        run fate(); run monitor()
    }
}
