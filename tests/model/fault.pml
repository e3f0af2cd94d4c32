/* A fault thread: core/fault, core/page, core/mapping; and the first half of core/copy. */

/* spare_give_back(). */
inline drop_spare() {
    if
    :: spare != NONE -> give_back(spare); spare = NONE
    :: else
    fi
}

/* fault_resolve(), for the faults of one worker; t is the thread. */
proctype fault(byte me; byte w; byte t) {
    byte i, p, e, f, g, q, bits, at, k, spare = NONE;
    bit write, protected, filled, got;
end_again:
    {
end:
    do
    :: d_step { swapper == RUNS && message[w] ->
        message[w] = 0; i = blocked[w] - 1; write = fault_write[w]; protected = fault_protected[w];
        fault_write[w] = 0; fault_protected[w] = 0 };
find:
        /* fault_find(): a fault at what is being copied is left alone: the wake-up comes with the copy. */
        TOGETHER {
        atomic { p = map[AT(w, i)]; got = region[w] && !copying[w]; filled = 0 };
        if :: !got -> goto done :: else fi;
acquire:
        /* page_acquire(): STALE, or the entry, and the generation of the frame that it names. */
        atomic {
            got = references[p] != 0; e = pte[p]; f = (IS_FRAME(e) -> FRAME_OF(e) : NONE);
            seen[t] = (got -> f : NONE)
        };
        if :: !got -> goto find :: else fi;
        if :: f == NONE -> goto fill :: else fi
        };
        TOGETHER {
        /* frame_trylock(), and the entry once more; or else frame_wait_for(). */
        d_step {
            got = !locked[f] && RESIDENT(f);
            if :: got -> locked[f] = 1; seen[t] = NONE :: else fi
        };
        if
        :: got ->
#ifndef M_NO_RECHECK
            if
            :: pte[p] == e -> goto have
            :: else -> unlock(f); goto acquire
            fi
#else
            goto have
#endif
        :: else ->
            d_step {
#ifdef M_NO_GENERATION
                got = locked[f];
#else
                got = locked[f] && seen[t] == f;
#endif
                if :: got -> waiters[f] = waiters[f] | (1 << w) :: else fi;
                seen[t] = NONE
            };
            if :: got -> goto done :: else -> goto acquire fi
        fi
        };
fill:
        /* fill_claim(): the frame held for a copy, or frame_claim_wait(); fill_install(). */
        TOGETHER {
        if
#ifndef M_HOLD_SPARE
        :: atomic { spare != NONE -> f = spare; spare = NONE }
        :: atomic { spare == NONE && ANY_FRAME(IS_FREE) -> claim(f, got) }
#else
        :: atomic { ANY_FRAME(IS_FREE) -> claim(f, got) }
#endif
        fi;
        d_step {
            page[f] = p; slot[f] = SLOT_OF(e);
#ifdef M_BLIND_INSTALL
            got = 1;
#else
            got = pte[p] == e;
#endif
            if :: got -> pte[p] = FRAME_ENTRY(f) :: else fi
        };
        if
        :: !got -> give_back(f); goto acquire
        :: else
        fi;
        if
        :: references[p] == 0 ->
            /* Too late: fill_undo(). */
            pte[p] = SLOT_ENTRY(slot[f]); give_back(f); goto find
        :: else
        fi
        };
        TOGETHER {
        /* fill_page(). */
        d_step {
            MUST(L_ASTRAY, mem[p] == HOLE);
            if
            :: slot[f] == NONE -> mem[p] = (filled_in[p] -> STALE : FRESH)
            :: else -> MUST(L_SLOT, slot_state[slot[f]] == S_USED && slot[f] / 2 == p); mem[p] = slot_bytes[slot[f]]
            fi
        };
        d_step { state[f] = PRESENT; filled = 1 };
have:
#if FORKS
        /* private_map(): the region is held, the gate entered, the map read again. */
        atomic { got = region[w]; if :: got -> users[w]++ :: else fi };
        if :: !got -> unlock(f); goto find :: else fi;
        if
        :: write ->
#ifndef M_NO_GATE
            d_step { got = !shut[w]; if :: got -> gate[w]++ :: else fi };
            if
            :: !got -> users[w]--; unlock(f); drop_spare(); (!shut[w]); goto find
            :: else
            fi
#else
            gate[w]++
#endif
        :: else
        fi;
#ifndef M_NO_MAP_CHECK
        if
        :: map[AT(w, i)] != p || copying[w] ->
            if :: write -> gate[w]-- :: else fi;
            users[w]--; unlock(f); goto find
        :: else
        fi;
#endif
        if :: write && references[p] > 1 -> goto copy :: else fi;
#endif
        /* fault_map() */
        if
        :: protected && !filled ->
#ifndef M_CLEAN_UNPROTECT
            d_step { set_dirty(f) };
#endif
            d_step { ioctl_unprotect(w, i, p) }
        :: else ->
            /* map_run() */
#ifndef M_DIRTY_LATE
            if :: d_step { write -> set_dirty(f) } :: !write fi;
#endif
#if !defined(M_FORGET_MAPPER) && !defined(M_MAPPER_LATE)
            mappers[f] = mappers[f] | (1 << w);
#endif
            d_step { ioctl_map(w, i, p, (write || (!FORKS && dirty[f] && state[f] == PRESENT)), write) };
#ifdef M_DIRTY_LATE
            if :: d_step { write -> set_dirty(f) } :: !write fi;
#endif
#ifdef M_MAPPER_LATE
            mappers[f] = mappers[f] | (1 << w);
#endif
        fi;
#if FORKS
        d_step { if :: write -> gate[w]-- :: else fi; users[w]-- };
#endif
        unlock(f);
        goto done
        };
#if FORKS
copy:
        /* copy_start(), run_copy() of one page; there is one record a worker. */
        TOGETHER {
        if
        :: atomic { copy_state[w] != C_FREE -> gate[w]--; users[w]-- }; unlock(f); d_step { wake(w, i) }; goto done
        :: else
        fi;
        if
        :: spare != NONE -> g = spare; spare = NONE
        :: else ->
            claim(g, got);
            if
            :: !got -> gate[w]--; users[w]--; unlock(f); claim_wait(spare); goto find
            :: else
            fi
        fi;
        d_step { page_take(q) };
        if
        :: q == NONE ->
            give_back(g); gate[w]--; users[w]--; unlock(f);
            d_step { wake(w, i) };
            goto done
        :: else
        fi;
        d_step { page[g] = q; slot[g] = NONE; MUST(L_PANIC, pte[q] == 0); pte[q] = FRAME_ENTRY(g) };
#ifndef M_COPY_LATE
        d_step { mem[q] = mem[p]; filled_in[q] = filled_in[p] };
#endif
        state[g] = PRESENT;
        d_step { set_dirty(g) };
        copy_old[w] = p;
        d_step {
            mappers[g] = mappers[g] | (1 << w);
#ifndef M_NO_PIN
            pinned[g] = 1
#endif
        };
        d_step { map[AT(w, 0)] = q; copying[w] = 1 };
        copy_state[w] = C_ORDERED;
#ifdef M_DROP_EARLY
        references[p]--;
#endif
        orders[w] ! copy_name[w], q;
        unlock(g);
#ifdef M_COPY_LATE
        d_step { mem[q] = mem[p]; filled_in[q] = filled_in[p] };
#endif
        d_step { gate[w]--; users[w]-- };
        unlock(f)
        };
#endif
done:
        TOGETHER {
        drop_spare();
        d_step { i = 0; p = 0; e = 0; f = 0; g = 0; q = 0; write = 0; protected = 0; filled = 0; got = 0 }
        }
    od
    } UNLESS_KILLED(d_step { i = 0; p = 0; e = 0; f = 0; g = 0; q = 0; bits = 0; at = 0; k = 0; spare = NONE;
        seen[t] = NONE; write = 0; protected = 0; filled = 0; got = 0 });
    goto end_again
}
