// SPDX-License-Identifier: Apache-2.0
/*
 * lock.c - the range lock of quire_layout.h, QEMU's side: the agent's windows, and the I/O of QEMU's own threads.
 *
 * Whoever opens a window gives up where he finds I/O, and never waits. I/O waits for the window: it is some system calls
 * long, so a short sleep is enough and nobody has to be woken.
 */
#include "agent.h"
#include "sys.h"

#define FIRST(gfn) ((gfn) / QUIRE_LOCK_PAGES * QUIRE_LOCK_PAGES)
#define EACH_LOCK(lock_gfn, gfn, pages) \
	for (uint64_t lock_gfn = FIRST(gfn); lock_gfn < (gfn) + (pages); lock_gfn += QUIRE_LOCK_PAGES)

static inline bool is_used(struct quire_lock *lock)
{
	return __atomic_load_n(&lock->backend_io, __ATOMIC_SEQ_CST) || __atomic_load_n(&lock->agent_io, __ATOMIC_SEQ_CST);
}

void lock_close_window(uint64_t gfn, uint64_t pages)
{
	EACH_LOCK(at, gfn, pages) __atomic_store_n(&map_lock(at)->busy, 0, __ATOMIC_SEQ_CST);
}

static uint32_t served; /* the generation of backends that commands are carried out for */

void lock_serve_backend(void) { served = map_generation(); }
bool lock_serves_backend(void) { return map_generation() == served; }

bool lock_open_own_window(uint64_t gfn, uint64_t pages)
{
	bool used = false;
	EACH_LOCK(at, gfn, pages) {
		__atomic_store_n(&map_lock(at)->busy, 1, __ATOMIC_SEQ_CST);
		used |= is_used(map_lock(at));
	}
	if (used) lock_close_window(gfn, pages);
	return !used;
}

bool lock_open_window(uint64_t gfn, uint64_t pages)
{
	if (!lock_open_own_window(gfn, pages)) return false;
	if (lock_serves_backend()) return true;
	/* Another backend has taken over: it may hold pages private of which the one before knew nothing. */
	lock_close_window(gfn, pages);
	return false;
}

void lock_note_merge(uint64_t gfn, uint64_t pages)
{
	EACH_LOCK(at, gfn, pages) __atomic_store_n(&map_lock(at)->merged, 1, __ATOMIC_SEQ_CST);
}

void lock_begin_io(uint64_t gfn, uint64_t pages)
{
	EACH_LOCK(at, gfn, pages) {
		struct quire_lock *lock = map_lock(at);
		for (;;) {
			__atomic_fetch_add(&lock->agent_io, 1, __ATOMIC_SEQ_CST);
			if (!__atomic_load_n(&lock->busy, __ATOMIC_SEQ_CST)) break;
			__atomic_fetch_sub(&lock->agent_io, 1, __ATOMIC_SEQ_CST);
			sys_nap(20);
		}
	}
}

void lock_end_io(uint64_t gfn, uint64_t pages)
{
	EACH_LOCK(at, gfn, pages) __atomic_fetch_sub(&map_lock(at)->agent_io, 1, __ATOMIC_SEQ_CST);
}

void lock_forget_agent(const struct ram_table *table)
{
	for (unsigned i = 0; i < table->count; i++)
		EACH_LOCK(at, table->regions[i].gfn, table->regions[i].pages) {
			struct quire_lock *lock = map_lock(at);
			/* Looked at first: a lock that nobody ever used costs no memory. */
			if (lock->agent_io) __atomic_store_n(&lock->agent_io, 0, __ATOMIC_SEQ_CST);
			if (lock->busy) __atomic_store_n(&lock->busy, 0, __ATOMIC_SEQ_CST);
		}
}
