/* The next swapper's repair, from the tables alone: core/takeover.  It may die at any step too, and is begun anew. */

proctype takeover(byte me) {
    byte f, s, w, k;
end_again:
    {
    d_step { swapper == DEAD -> swapper = REPAIRS };
    /* frames_repair() */
    do
    :: atomic { f < FRAMES ->
        if
        :: state[f] == FILLING || state[f] == EVICTING ->
#ifdef M_REPAIR_BLIND
            if
            :: page[f] != NONE ->
#else
            if
            :: OWNS(f) ->
#endif
#ifndef M_REPAIR_NO_PUNCH
                d_step { punch(page[f]) };
#endif
                goto entry
            :: else -> goto freed
            fi
        :: RESIDENT(f) -> goto recover
        :: else -> goto next
        fi };
entry:
        atomic { if :: OWNS(f) -> pte[page[f]] = SLOT_ENTRY(slot[f]) :: else fi };
freed:
        atomic {
            state[f] = FREE; locked[f] = 0; dirty[f] = 0; redirtied[f] = 0; waiters[f] = 0; slot[f] = NONE;
            mappers[f] = 0; pinned[f] = 0
        };
        goto next;
recover:
        atomic {
            MUST(L_PANIC, OWNS(f));
            if :: state[f] == WRITEBACK -> dirty[f] = 1 :: else fi;
#ifndef M_REPAIR_FOREIGN_SLOT
            if
            :: slot[f] != NONE && slot_state[slot[f]] != S_USED -> slot[f] = NONE; dirty[f] = 1
            :: else
            fi;
#endif
            state[f] = PRESENT; locked[f] = 0; redirtied[f] = 0; waiters[f] = 0; pinned[f] = 0
        };
next:
        f++
    :: atomic { f == FRAMES -> f = 0; break }
    od;
    /* slots_repair(): those that nothing names. */
    do
    :: d_step { s < SLOTS ->
        if
        :: slot_state[s] == S_USED && (pte[s / 2] == SLOT_ENTRY(s) ||
            (IS_FRAME(pte[s / 2]) && slot[FRAME_OF(pte[s / 2])] == s))
#ifdef M_REPAIR_NO_SLOTS
        :: else
#else
        :: else -> slot_state[s] = S_FREE; slot_bytes[s] = HOLE
#endif
        fi;
        s++ }
    :: atomic { s == SLOTS -> s = 0; break }
    od;
    /* lives_repair(), references_repair(), copies_repair(): a child that was not promised yet is not. */
    atomic {
#if FORKS
        for (k : 0 .. PAGES - 1) { references[k] = (k == 0 && SNAPSHOT) }
        for (w : 0 .. WORKERS - 1) {
            users[w] = 0; gate[w] = 0; shut[w] = 0;
            if
            :: region[w] -> references[map[AT(w, 0)]]++
            :: else ->
                map[AT(w, 0)] = NONE; copying[w] = 0; born[w] = 0; dead[w] = (w == 0);
                channel_close(w)
            fi;
            if
            :: copying[w] ->
                copy_state[w] = C_ORDERED;
                references[copy_old[w]]++;
                pinned[FRAME_OF(pte[map[AT(w, 0)]])] = 1;
                copy_name[w] = (copy_name[w] + 1) % 8
            :: else -> copy_state[w] = C_FREE; copy_old[w] = NONE
            fi
        }
#else
        skip;
#endif
        w = 0; k = 0
    };
#if FORKS && !defined(M_NO_REMINDER)
    /* copies_remind() */
    do
    :: d_step { w < WORKERS && copying[w] && ALIVE(w) && nfull(orders[w]) -> orders[w] ! copy_name[w], map[AT(w, 0)]; w++ }
    :: d_step { w < WORKERS && !(copying[w] && ALIVE(w)) -> w++ }
    :: atomic { w == WORKERS -> w = 0; break }
    od;
#endif
    /* waiters_wake() */
    atomic {
#ifndef M_NO_WAKE_ALL
        for (w : 0 .. WORKERS - 1) {
            if :: blocked[w] -> wake(w, blocked[w] - 1) :: else fi
        }
        w = 0;
#endif
        swapper = RUNS
    }
    } UNLESS_KILLED(d_step { f = 0; s = 0; w = 0; k = 0 });
    goto end_again
}
