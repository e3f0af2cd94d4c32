/* The swapper's main thread: core/fork and the end of a worker; and sweeps of pages that nobody refers to. */

#define MAY_FORK     (swapper == RUNS && !quiet && ALIVE(0) && region[0] && !born[1] && !region[1])
#define SWEEPABLE(p) (references[p] == 0 && (IS_SLOT(pte[p]) || \
    (IS_FRAME(pte[p]) && !locked[FRAME_OF(pte[p])] && state[FRAME_OF(pte[p])] == PRESENT)))
#define SWEEP(n)     :: d_step { swapper == RUNS && SWEEPABLE(n) -> p = n }; goto sweep

#if MAIN
proctype main(byte me) {
    byte w, p, q, f, g, bits, at, k;
    bit got;
end_again:
    {
end:
    do
#if MAY_BEAR
    /* regions_share(): gate_shut() */
    :: d_step { MAY_FORK ->
#ifndef M_NO_GATE
        shut[0] = 1
#endif
        };
        (gate[0] == 0);
share:
        /* map_share(): a reference more. */
        TOGETHER {
        atomic {
            p = map[AT(0, 0)];
#ifndef M_SHARE_PINNED
            got = IS_FRAME(pte[p]) && pinned[FRAME_OF(pte[p])] && page[FRAME_OF(pte[p])] == p
#endif
        };
        if :: got -> goto early :: else fi;
        references[p]++;
        map[AT(1, 0)] = p
        };
        /* region_protect_all(): until here the parent may write what it has mapped writable, which is dirty. */
#ifndef M_FORK_WRITABLE
        d_step {
            if
            :: IS_FRAME(pte[p]) && dirty[FRAME_OF(pte[p])] && (mappers[FRAME_OF(pte[p])] & 1) ->
                ioctl_protect(0, 0)
            :: else
            fi
        };
#endif
        goto open;
early:
        /* page_copy_early(), of a page that is pinned: it cannot be protected. */
        claim_wait(g);
        TOGETHER {
        if
        :: !IS_FRAME(pte[p]) -> give_back(g); goto share
        :: d_step { IS_FRAME(pte[p]) && !locked[FRAME_OF(pte[p])] && RESIDENT(FRAME_OF(pte[p])) ->
            f = FRAME_OF(pte[p]); locked[f] = 1 }
        fi;
        d_step { page_take(q) };
        if
        :: q == NONE -> give_back(g); unlock(f); shut[0] = 0; goto done
        :: else
        fi;
        d_step { page[g] = q; slot[g] = NONE; MUST(L_PANIC, pte[q] == 0); pte[q] = FRAME_ENTRY(g) };
        d_step { mem[q] = mem[p]; filled_in[q] = filled_in[p] };
        state[g] = PRESENT;
        d_step { set_dirty(g) };
        unlock(f);
        unlock(g);
        map[AT(1, 0)] = q
        };
open:
        /* gate_open() */
        shut[0] = 0;
        /* The child: its region, and its mappings, of which none is present. */
        d_step {
            region[1] = 1;
            if
            :: dead[0] -> kill_worker(1)
            :: else -> born[1] = 1; vma[AT(1, 0)] = map[AT(1, 0)]
            fi
        };
        goto done
#endif
#if WORKER_DIES
    /* life_end() of the regions */
    :: d_step { swapper == RUNS && dead[0] && region[0] -> w = 0; region[0] = 0 }; goto gone
    :: d_step { swapper == RUNS && dead[1] && region[1] -> w = 1; region[1] = 0 }; goto gone;
gone:
        (users[w] == 0);
#if FORKS
#ifndef M_COPIES_NOT_ENDED
        /* copies_end(), copy_abandon() */
        TOGETHER {
        d_step { got = copy_state[w] == C_ORDERED; if :: got -> copy_state[w] = C_ENDING :: else fi };
        if
        :: got ->
            p = map[AT(w, 0)];
            pinned_lock(p);
            pinned[f] = 0;
            unlock(f);
            references[copy_old[w]]--;
            d_step { copy_state[w] = C_FREE; copy_old[w] = NONE }
        :: else -> (copy_state[w] == C_FREE)
        fi
        };
#endif
        /* region_unshare() */
        TOGETHER {
        d_step { references[map[AT(w, 0)]]--; copying[w] = 0; map[AT(w, 0)] = NONE }
        };
#endif
        /* frame_forget_mapper() */
        d_step {
            for (k : 0 .. FRAMES - 1) {
                mappers[k] = mappers[k] & (3 - (1 << w))
            }
            k = 0;
            channel_close(w);
            born[w] = 0; dead[w] = (w == 0)
        };
        goto done
#endif
    ;
done:
        atomic { w = 0; p = 0; q = 0; f = 0; g = 0; got = 0 }
    od
    } UNLESS_KILLED(d_step { w = 0; p = 0; q = 0; f = 0; g = 0; bits = 0; at = 0; k = 0; got = 0 });
    goto end_again
}
#endif

#if FORKS
/* pages_sweep(), which in the code any thread does. */
proctype sweeper(byte me) {
    byte p, f, e, bits, at, k;
    bit got;
end_again:
    {
end:
    do
    SWEEP(0)
    SWEEP(1)
#if PAGES > 2
    SWEEP(2)
#endif
    ;
sweep:
        TOGETHER {
        atomic { e = pte[p]; f = (IS_FRAME(e) -> FRAME_OF(e) : NONE); got = references[p] == 0 };
        if :: !got -> goto done :: else fi;
        if
        :: f == NONE ->
            d_step { got = IS_SLOT(e) && pte[p] == e; if :: got -> pte[p] = 0 :: else fi };
            if :: got -> e = SLOT_OF(e); d_step { slot_free(e) } :: else fi;
            goto done
        :: else
        fi
        };
        TOGETHER {
        d_step { got = !locked[f] && RESIDENT(f); if :: got -> locked[f] = 1 :: else fi };
        if :: !got -> goto done :: else fi;
        if
        :: pte[p] != e || references[p] != 0 || state[f] != PRESENT -> unlock(f); goto done
        :: else
        fi;
        d_step { slot_free(slot[f]) };
        slot[f] = NONE;
        d_step { pinned[f] = 0; dirty[f] = 0; state[f] = EVICTING };
#ifndef M_SWEEP_NO_PUNCH
        d_step { punch(p) }
#endif
        };
        d_step { MUST(L_PANIC, pte[p] == e); pte[p] = 0 };
        give_back(f);
done:
        atomic { p = 0; f = 0; e = 0; got = 0 }
    od
    } UNLESS_KILLED(d_step { p = 0; f = 0; e = 0; bits = 0; at = 0; k = 0; got = 0 });
    goto end_again
}
#endif
