// SPDX-License-Identifier: Apache-2.0
/*
 * recycle.c - gives back what the guest has freed: the host's side of the state table (part 2 of quire_layout.h), inside
 * QEMU.
 *
 * A guest that wants a claimed page spins until it is released, with interrupts off. So whatever freezes the claimer
 * must freeze the guest, too: claimed, punched and released is here, and no other process has a part in it.
 *
 *   1 claim      compare-exchange, from a mark that is due to CLAIMED: it fails if the guest has taken the page, and there
 *                the claim ends. From here on nobody has the page: no vCPU, no device, no DMA
 *   2 punch      once for all that was claimed
 *   3 map        merged pages only: the memfd, which has nothing there now, in place of what they were merged with
 *   4 entry      the page map says HOLE
 *   5 release    RECYCLED: from here on the guest may have it, and it reads as zeros
 *
 * If a step fails the pages are as they were, and their marks become the current epoch's.
 *
 * Between claim and release there are system calls only, made without libc; the thread has every signal blocked; and a
 * claim is of a few pages at most, fewer where punching is slow.
 *
 * Locks. The window lock keeps every other thread of QEMU's from changing mappings. The range lock is needed where the
 * entry of a merged page changes; a page that isn't merged is in the memfd before and after, so I/O in the neighbourhood
 * doesn't keep it from being recycled. Of the pin gate's reasons nearly all are of no concern: what a device was told to write to
 * is not free. But one that was told of all memory at once (VFIO; io_uring's buffers) knows the pages by what they were then, and
 * would write to those when the guest has them in use again: while there is one, nothing is recycled, and nothing that it filled
 * is punched again.
 *
 * Stale marks. The table is only as good as the kernel that wrote it, and QEMU must not begin another one's life while
 * this goes on. The backend sees to that as long as it lives: it waits for the result. For the case that it doesn't, the
 * connection by whose end QEMU would learn of that comes with the command and is open here until it is over (protocol.c
 * closes it). Whenever this thread is stopped, and for however long: QEMU waits. That is also why nobody looks here
 * whether the backend is alive, which could change after the look.
 */
#include "agent.h"
#include "sys.h"

#define EPOCHS (QUIRE_STATE_EPOCH_LAST - QUIRE_STATE_EPOCH_FIRST + 1)

/* Claims under one window lock: so many, or until so long has passed. */
#define TURN_CLAIMS 64u
#define TURN_NS     200000
/* A claim that takes longer is too large. */
#define CLAIM_NS    150000
#define CLAIM_LEAST 4u

struct recycling {
	bool again;
	unsigned now, due_age, claim_pages;
};

static unsigned claim_now = QUIRE_CLAIM_MAX_PAGES; /* how much was claimed at once lately without taking too long */

static bool wanted(const struct recycling *r, unsigned state)
{
	if (r->again) return state == QUIRE_STATE_RECYCLED;
	if (state < QUIRE_STATE_EPOCH_FIRST || state > QUIRE_STATE_EPOCH_LAST) return false;
	return (r->now >= state ? r->now - state : r->now + EPOCHS - state) >= r->due_age;
}

/* The first page from `at` on that is wanted; `end` if there is none. Pages in use and recycled ones come in masses. */
static uint64_t next_wanted(const struct recycling *r, _Atomic uint8_t *states, uint64_t at, uint64_t end)
{
	for (; at < end; at++) {
		while (!r->again && (uintptr_t)(states + at) % 8 == 0 && end - at >= 8) {
			uint64_t eight = atomic_load_explicit((_Atomic uint64_t *)(states + at), memory_order_relaxed);
			if (eight != 0 && eight != ~0ull) break;
			at += 8;
			if (at == end) return end;
		}
		if (wanted(r, atomic_load_explicit(&states[at], memory_order_relaxed))) break;
	}
	return at;
}

/*
 * Eight pages by one exchange, where all have the same mark, as neighbours mostly do. It fails as each of eight would if the
 * guest takes one of them: its exchange of a byte and ours of the word are of one cache line, which only one has at a time.
 */
static bool claim_eight(const struct recycling *r, _Atomic uint8_t *states)
{
	const uint64_t ones = 0x0101010101010101;
	if ((uintptr_t)states % 8) return false;
	_Atomic uint64_t *eight = (_Atomic uint64_t *)states;
	uint64_t seen = atomic_load_explicit(eight, memory_order_relaxed);
	if (seen != (seen & 0xff) * ones || !wanted(r, seen & 0xff)) return false;
	if (step(QUIRE_STEP_EIGHT, NULL)) return atomic_compare_exchange_strong(eight, &seen, QUIRE_STATE_CLAIMED * ones);
	atomic_store(eight, QUIRE_STATE_CLAIMED * ones);
	return true;
}

/*
 * One claim: of the pages from `gfn` on, at most *pages, those that are wanted and all merged or all not. Sets *pages to
 * how many were looked at. The number of pages recycled, or a negative errno; -EAGAIN: I/O in flight, or no mapping left.
 */
static long claim(const struct recycling *r, const struct ram *ram, uint64_t gfn, _Atomic uint8_t *states, uint64_t *pages)
{
	bool merged = map_merged(map_load(gfn));
	uint64_t n = 1, count = 0;
	while (n < *pages && wanted(r, states[n]) && map_merged(map_load(gfn + n)) == merged) n++;
	*pages = n;
	/* Before the claim: a guest may wait as long as there is one. */
	if (merged && (!budget_allows(2) || !lock_open_window(gfn, n))) return -EAGAIN;

	struct quire_agent_place p = place_of(ram, gfn, n);
	bool exchange = step(QUIRE_STEP_EXCHANGE, &p);
	while (count < n) {
		if (!exchange) {
			states[count++] = QUIRE_STATE_CLAIMED;
			continue;
		}
		if (n - count >= 8 && claim_eight(r, states + count)) {
			count += 8;
			continue;
		}
		uint8_t seen = states[count];
		if (!wanted(r, seen) || !atomic_compare_exchange_strong(&states[count], &seen, QUIRE_STATE_CLAIMED)) break;
		count++;
	}
	long error = 0;
	if (count) {
		p.bytes = count * PAGE;
		step(QUIRE_STEP_CLAIMED, &p);
		if (step(QUIRE_STEP_RECYCLE_PUNCH, &p)) error = sys_punch(p.file, p.offset, p.bytes);
		if (!error && merged) error = window_map_back(ram, gfn, count);
		step(QUIRE_STEP_PUNCHED, &p);
	}
	for (uint64_t i = 0; i < count; i++) {
		if (!error) map_move(gfn + i, QUIRE_MAP_PRIVATE, QUIRE_MAP_HOLE);
		/* After all of the above, which is all that whoever waits for it wants to know. */
		atomic_store_explicit(&states[i], error ? r->now : QUIRE_STATE_RECYCLED, memory_order_release);
	}
	if (merged) lock_close_window(gfn, n);
	if (merged && !error) budget_spend(2); /* if it was the middle of a run; a recount knows better */
	if (merged && error == -ENOMEM) return -EAGAIN;
	return error ? error : (long)count;
}

/* Where the state bytes are in QEMU; NULL if they aren't all in one page that is in the memfd. */
static _Atomic uint8_t *find_states(uint64_t address, uint64_t count)
{
	const struct ram *ram = ram_of_gfns(address / PAGE, 1);
	if (!ram || ram->file->unmapped || count > PAGE - address % PAGE || map_merged(map_load(address / PAGE))) return NULL;
	return (_Atomic uint8_t *)(ram->address + (address - ram->gfn * PAGE));
}

/* Some claims of the run, from its page *at on. With the window lock. */
static struct quire_agent_outcome next_turn(const struct recycling *r, const struct quire_agent_run *run, uint64_t *at)
{
	struct quire_agent_outcome result = { .done = 0 };
	uint64_t begin = *at;
	*at = run->page_count; /* where it is refused nothing follows */
	const struct ram *ram = ram_of_gfns(run->gfn, run->page_count);
	_Atomic uint8_t *states = find_states(run->slot, run->page_count);
	if (!ram || ram->file->unmapped || !states) return refuse(0, QUIRE_AGENT_INVALID, 0);
	/* Another backend is there; or QEMU has use for its own for what happens in memory: postcopy, a snapshot; or a device has. */
	if (!lock_serves_backend() || gate_suspects(GATE_USERFAULT | GATE_ALL_OF_RAM)) return refuse(0, QUIRE_AGENT_BUSY, 0);

	*at = begin;
	int64_t began = clock_ns(), then = began;
	for (unsigned claims = 0; claims < TURN_CLAIMS && then - began < TURN_NS; claims++) {
		*at = next_wanted(r, states, *at, run->page_count);
		if (*at == run->page_count) break;
		unsigned limit = claim_now < r->claim_pages ? claim_now : r->claim_pages;
		uint64_t pages = run->page_count - *at < limit ? run->page_count - *at : limit;
		long done = claim(r, ram, run->gfn + *at, states + *at, &pages);
		int64_t now = clock_ns();
		if (now - then > CLAIM_NS) claim_now = claim_now / 2 > CLAIM_LEAST ? claim_now / 2 : CLAIM_LEAST;
		else if (done == limit && claim_now < QUIRE_CLAIM_MAX_PAGES) claim_now *= 2;
		then = now;
		if (done < 0 && done != -EAGAIN) {
			*at = run->page_count;
			return refuse(result.done, QUIRE_AGENT_FAILED, (uint64_t)-done);
		}
		if (done < 0) result.reason = QUIRE_AGENT_BUSY;
		else result.done += (uint32_t)done;
		/* Where the guest was faster the claim ended: what follows is looked at anew. */
		*at += done <= 0 ? (done ? pages : 1) : (uint64_t)done;
	}
	return result;
}

struct quire_agent_outcome recycle_run(const struct quire_agent_command *c, const struct quire_agent_run *run)
{
	struct recycling r = { c->operation == QUIRE_AGENT_RECYCLE_AGAIN, c->now, c->due_age, c->claim_pages };
	struct quire_agent_outcome result = { .done = 0 };
	if (r.now < QUIRE_STATE_EPOCH_FIRST || r.now > QUIRE_STATE_EPOCH_LAST || r.claim_pages == 0
	    || r.claim_pages > QUIRE_CLAIM_MAX_PAGES || run->page_count == 0)
		return refuse(0, QUIRE_AGENT_INVALID, 0);
	for (uint64_t at = 0; at < run->page_count;) {
		sigset_t old;
		agent_lock(&old);
		struct quire_agent_outcome turn = next_turn(&r, run, &at);
		agent_unlock(&old);
		result.done += turn.done;
		if (turn.reason == QUIRE_AGENT_DONE) continue;
		result.reason = turn.reason;
		result.detail = turn.detail;
	}
	return result;
}
