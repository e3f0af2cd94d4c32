/* What attendants answer: the second half of core/copy. */

/* pinned_lock(): it is resident, so this waits for the lock only. */
inline pinned_lock(p) {
    d_step { IS_FRAME(pte[p]) && !locked[FRAME_OF(pte[p])] -> f = FRAME_OF(pte[p]); locked[f] = 1 }
}

/* copy_answered(): run_settle() or copy_abandon(). */
proctype settle(byte me) {
    byte w, p, f, name, bits, at, k;
    bit mapped, got;
end_again:
    {
end:
    do
    :: TOGETHER {
        if
        :: atomic { swapper == RUNS && nempty(answers[0]) -> answers[0] ? name }
        :: atomic { swapper == RUNS && nempty(answers[1]) -> answers[1] ? name; w = 1 }
        fi;
        d_step {
            got = copy_state[w] == C_ORDERED && copy_name[w] == name; name = 0;
            if :: got -> copy_state[w] = C_ENDING :: else fi
        };
        if :: !got -> goto done :: else fi;
        d_step { got = region[w]; p = map[AT(w, 0)]; if :: got -> users[w]++ :: else fi }
        };
        TOGETHER {
        pinned_lock(p);
        if :: got -> copying[w] = 0 :: else fi
        };
        TOGETHER {
        /* frame_unpin(), before which a fork may see that the map has changed. */
        pinned[f] = 0;
        if
        :: got ->
            d_step { got = !shut[w]; if :: got -> gate[w]++ :: else fi };
            if
            :: got ->
                if
                :: references[p] == 1 ->
                    d_step { set_dirty(f) };
                    mappers[f] = mappers[f] | (1 << w);
                    d_step { ioctl_map(w, 0, p, 1, 1) };
                    mapped = 1
                :: else
                fi;
                gate[w]--
            :: else
            fi;
            unlock(f);
            if :: !mapped -> d_step { wake(w, 0) } :: else fi;
            goto settled
        :: else -> unlock(f)
        fi
        };
        TOGETHER {
        references[copy_old[w]]--;
        d_step { copy_state[w] = C_FREE; copy_old[w] = NONE };
        goto done
        };
settled:
        TOGETHER {
        /* page_forget(): the sweep is in fork.pml. */
#ifndef M_DROP_EARLY
        references[copy_old[w]]--;
#endif
        users[w]--;
        d_step { copy_state[w] = C_FREE; copy_old[w] = NONE }
        };
done:
        atomic { w = 0; p = 0; f = 0; mapped = 0; got = 0 }
    od
    } UNLESS_KILLED(d_step { w = 0; p = 0; f = 0; name = 0; bits = 0; at = 0; k = 0; mapped = 0; got = 0 });
    goto end_again
}
