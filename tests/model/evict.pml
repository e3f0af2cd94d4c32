/* Reclaim, write-ahead, and evictions that were asked for: core/victim and core/clean, a victim at a time. */

/* victim_lock(): present and not pinned. */
#define EVICTABLE(f) (swapper == RUNS && state[f] == PRESENT && !locked[f] && !pinned[f])
#define LOCK_VICTIM(n) :: d_step { EVICTABLE(n) -> f = n; locked[n] = 1; p = page[n]; MUST(L_PANIC, pte[p] == FRAME_ENTRY(n)) }

/* run_protect(): in every region that may map it. */
inline protect_in(w) {
    d_step {
        if
        :: (mappers[f] & (1 << w)) && region[w] && map[AT(w, INDEX(p))] == p -> ioctl_protect(w, INDEX(p))
        :: else
        fi
    }
}

/* The page's only slot is called its first. */
inline first_name(s) {
    if
    :: s % 2 && slot_state[s - 1] == S_FREE ->
        slot_state[s - 1] = S_USED; slot_bytes[s - 1] = slot_bytes[s]; slot[f] = s - 1;
        slot_state[s] = S_FREE; slot_bytes[s] = HOLE
    :: else
    fi
}

proctype evict(byte me) {
    byte f, p, s, old, bits, at, k;
    bit leaves;
end_again:
    {
end:
    do
    :: TOGETHER {
        if
        LOCK_VICTIM(0)
#if FRAMES > 1
        LOCK_VICTIM(1)
#endif
#if FRAMES > 2
        LOCK_VICTIM(2)
#endif
        fi;
        if
        :: !dirty[f] -> goto drop
        :: atomic { dirty[f] -> leaves = 1 }
        :: WRITE_AHEAD && dirty[f]
        fi;
        /* victims_protect() */
#ifndef M_NO_PROTECT
        protect_in(0)
#endif
        };
        TOGETHER {
#ifndef M_NO_PROTECT
        protect_in(1);
#endif
        /* victims_find_zero() */
        if
        :: mem[p] == FRESH && !filled_in[p] ->
            d_step { slot_free(slot[f]) };
            slot[f] = NONE;
            dirty[f] = 0;
            if :: leaves -> goto drop :: else -> unlock(f); goto done fi
        :: else
        fi;
        /* victims_give_slots(): what is read from here on goes out; a write makes it stale. */
        d_step {
            s = (slot_state[2 * p] == S_FREE -> 2 * p : 2 * p + 1);
            MUST(L_SLOT, slot_state[s] == S_FREE);
            slot_state[s] = S_RESERVED; slot_bytes[s] = mem[p]
        };
        d_step { redirtied[f] = 0; state[f] = WRITEBACK };
#ifdef M_CLEAN_FIRST
        dirty[f] = 0;
#endif
        unlock(f)
        };
        TOGETHER {
        /* victims_finish(), victim_publish() */
        d_step { !locked[f] -> locked[f] = 1; MUST(L_PANIC, state[f] == WRITEBACK && page[f] == p) };
        if
        :: redirtied[f] -> d_step { slot_free(s) }; state[f] = PRESENT; unlock(f); goto done
        :: else
        fi;
        slot_state[s] = S_USED;
        old = slot[f];
#ifdef M_CLEAN_BEFORE_SLOT
        dirty[f] = 0;
        slot[f] = s;
#else
        slot[f] = s;
        dirty[f] = 0;
#endif
        state[f] = PRESENT;
#ifndef M_KEEP_SLOT
        d_step { slot_free(old) };
#endif
        d_step { first_name(s); old = 0; s = 0 };
        /* victim_keep() */
        if
        :: leaves && !pinned[f]
        :: unlock(f); goto done
        fi;
drop:
        /* victims_free() */
        atomic { MUST(L_PANIC, !dirty[f] && !pinned[f]); state[f] = EVICTING };
#ifdef M_PUNCH_LATE
        pte[p] = SLOT_ENTRY(slot[f])
#else
        d_step { punch(p) }
#endif
        };
        TOGETHER {
#ifdef M_PUNCH_LATE
        d_step { punch(p) };
#else
        d_step { MUST(L_PANIC, pte[p] == FRAME_ENTRY(f)); pte[p] = SLOT_ENTRY(slot[f]) }
#endif
        };
        TOGETHER {
        give_back(f);
done:
        atomic { f = 0; p = 0; s = 0; old = 0; leaves = 0 }
        }
    od
    } UNLESS_KILLED(d_step { f = 0; p = 0; s = 0; old = 0; bits = 0; at = 0; k = 0; leaves = 0 });
    goto end_again
}
