/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Chains of slots, by the low bits of their hashes. A slot costs four bytes for the one that follows it in its chain, and half of the
 * four bytes of a chain's head: nodes with pointers, and buckets of their own, would cost as much as everything else that is
 * known of a slot. Bits of these links that numbers of slots do not need have a part of the hash of the slot that the link leads to:
 * most hashes that are others need not be read. All of it is sparse: slots that nobody used yet cost nothing.
 *
 * Writers hold one lock, for a walk along a chain of two slots. Each two slots that are added split one chain into two (linear
 * hashing), so that nobody ever waits for the whole table. Chains are never joined again: heads stay for as many slots as there
 * were at once.
 *
 * Readers hold no lock. What they rely on:
 *
 * 1. A look-up returns no slot whose hash is another one. It compares all of the hash of what it returns. A slot's hash is written
 *    before the slot is linked (release; readers follow links with acquire), and does not change before everyone has left
 *    who may have met it: the slot is taken out, then comes ci_wait, then it may get another hash. What was taken out meanwhile may
 *    still be returned, as by any look-up that ended a moment earlier; its user counts references.
 *
 * 2. It ends. A slot is put in at the head of its chain, and a split keeps the order, so each link leads to a slot that was put in
 *    earlier than the one that has it. A slot that is taken out keeps its link, for those who stand on it, and comes in again
 *    only after they have left (ci_wait). So no walk meets a slot twice.
 *
 * 3. It does not miss a slot that was in all along.
 *    - Others that come in are in front of it, and others that go are unlinked by one store: whoever stands on one that is gone still
 *      has its link, which leads to everything behind it that stayed.
 *    - A split moves slots to another chain, and whoever walks meanwhile may be led to the wrong one, or begin at it. So who finds
 *      nothing looks again if a split went on that concerns him. Each split is counted, before it begins (odd) and after it has
 *      ended (even): as in a seqlock, the count is stored, then a release fence, then the links; a reader loads the links, then an
 *      acquire fence, then the count. If he saw one store of a split he sees that it has begun. Counts are striped by
 *      hash bits that no split changes, so that others' splits do not make him look again.
 *    - The number of chains is stored inside of a split, too. Who reads an older one, or a newer one, than fits his hash's chain has
 *      read it while that chain was split, for splits of others do not change which chain is his.
 *    - Who was disturbed several times looks under the writers' lock: he does not look for ever.
 *
 * What is found needs no second look: it was there.
 */
#define _GNU_SOURCE
#include "cindex.h"
#include <numa.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <urcu/urcu-bp.h>

/* As many chains as there are in the beginning, so all slots of a chain are in one stripe, however far it is split. */
#define STRIPES 64
#define SLOTS_A_CHAIN 2
/* Looks without the lock. */
#define LOOKS 8

struct stripe {
	/* Odd while one of its chains is split. */
	_Atomic uint32_t splits;
	char others[60];
};

struct ci_index {
	const uint64_t *hashes;
	/* Links. 0: there is none. */
	_Atomic uint32_t *next, *heads;
	uint64_t slots, most_chains;
	unsigned slot_bits; /* of a link */
	bool looks_again;
	_Atomic uint64_t chains;
	pthread_mutex_t writing;
	uint64_t used; /* under `writing` */
	struct stripe stripes[STRIPES];
};

/*
 * Links are read at random, so in huge pages where the kernel has them: fewer misses of the TLB, fewer faults. Not the first ones: a
 * small index stays small.
 */
#define SMALL_BYTES (2ull << 20)

static void *sparse(uint64_t words)
{
	uint64_t bytes = words * 4;
	void *all = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (all == MAP_FAILED) return NULL;
	if (bytes > SMALL_BYTES) madvise((char *)all + SMALL_BYTES, bytes - SMALL_BYTES, MADV_HUGEPAGE);
	return all;
}

struct ci_index *ci_new(const uint64_t *hashes, uint64_t slots)
{
	struct ci_index *index = calloc(1, sizeof *index);
	if (!index) return NULL;
	index->hashes = hashes;
	index->slots = slots;
	while (index->slot_bits < 32 && slots > 1ull << index->slot_bits) index->slot_bits++;
	index->most_chains = slots / SLOTS_A_CHAIN + STRIPES;
	index->looks_again = true;
	index->next = sparse(slots);
	index->heads = sparse(index->most_chains);
	if (!index->next || !index->heads) { ci_free(index); return NULL; }
	pthread_mutex_init(&index->writing, NULL);
	atomic_init(&index->chains, STRIPES);
	return index;
}

void ci_free(struct ci_index *index)
{
	if (index->next) munmap(index->next, index->slots * 4);
	if (index->heads) munmap(index->heads, index->most_chains * 4);
	free(index);
}

void ci_never_look_again(struct ci_index *index) { index->looks_again = false; }

void ci_read_lock(void) { urcu_bp_read_lock(); }
void ci_read_unlock(void) { urcu_bp_read_unlock(); }
void ci_wait(void) { urcu_bp_synchronize_rcu(); }

/* The next lower power of two chains have all been split; of the first of them there is the other half already. */
static uint64_t chain_of(uint64_t hash, uint64_t chains)
{
	uint64_t power = 1ull << (63 - __builtin_clzll(chains));
	uint64_t chain = hash & (2 * power - 1);
	return chain < chains ? chain : chain & (power - 1);
}

static uint64_t hash_of(const struct ci_index *index, uint32_t slot) { return index->hashes[slot]; }
static uint32_t follow(_Atomic uint32_t *link) { return atomic_load_explicit(link, memory_order_acquire); }
static void lead(_Atomic uint32_t *link, uint32_t to) { atomic_store_explicit(link, to, memory_order_release); }

/* The chain's number is in the low bits of a hash, the part that a link has in the high ones. */
static uint32_t part_of(const struct ci_index *index, uint64_t hash)
{
	return (uint32_t)((hash >> 32 >> index->slot_bits) << index->slot_bits);
}
static uint32_t slot_of(const struct ci_index *index, uint32_t link) { return link & (uint32_t)((1ull << index->slot_bits) - 1); }

static uint32_t walk(const struct ci_index *index, uint64_t hash)
{
	uint64_t chains = atomic_load_explicit(&index->chains, memory_order_acquire);
	uint32_t link = follow(&index->heads[chain_of(hash, chains)]), part = part_of(index, hash), slot;
	for (; (slot = slot_of(index, link)); link = follow(&index->next[slot]))
		if (link - slot == part && hash_of(index, slot) == hash) break;
	return slot;
}

uint64_t ci_find(struct ci_index *index, uint64_t hash)
{
	_Atomic uint32_t *splits = &index->stripes[hash % STRIPES].splits;
	for (int look = 0; look < LOOKS; look++) {
		uint32_t before = atomic_load_explicit(splits, memory_order_acquire);
		uint32_t slot = walk(index, hash);
		if (slot || !index->looks_again) return slot;
		atomic_thread_fence(memory_order_acquire);
		if (before % 2 == 0 && atomic_load_explicit(splits, memory_order_relaxed) == before) return 0;
	}
	pthread_mutex_lock(&index->writing);
	uint32_t slot = walk(index, hash);
	pthread_mutex_unlock(&index->writing);
	return slot;
}

/* The next chain in turn becomes two. Under `writing`. */
static void split(struct ci_index *index)
{
	uint64_t chains = atomic_load_explicit(&index->chains, memory_order_relaxed);
	uint64_t power = 1ull << (63 - __builtin_clzll(chains));
	uint64_t old = chains - power;
	_Atomic uint32_t *splits = &index->stripes[old % STRIPES].splits;
	uint32_t count = atomic_load_explicit(splits, memory_order_relaxed);
	atomic_store_explicit(splits, count + 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);

	/* The last links of both halves, each slot in its old order. */
	_Atomic uint32_t *stay = &index->heads[old], *go = &index->heads[chains];
	uint32_t link = follow(stay), slot;
	while ((slot = slot_of(index, link))) {
		uint32_t next = follow(&index->next[slot]);
		_Atomic uint32_t **half = hash_of(index, slot) & power ? &go : &stay;
		lead(*half, link);
		*half = &index->next[slot];
		link = next;
	}
	lead(stay, 0);
	lead(go, 0);
	atomic_store_explicit(&index->chains, chains + 1, memory_order_release);
	atomic_store_explicit(splits, count + 2, memory_order_release);
}

uint64_t ci_add(struct ci_index *index, uint64_t slot)
{
	uint64_t hash = hash_of(index, (uint32_t)slot);
	pthread_mutex_lock(&index->writing);
	uint32_t other = walk(index, hash);
	if (!other) {
		uint64_t chains = atomic_load_explicit(&index->chains, memory_order_relaxed);
		_Atomic uint32_t *head = &index->heads[chain_of(hash, chains)];
		lead(&index->next[slot], follow(head));
		lead(head, part_of(index, hash) | (uint32_t)slot);
		index->used++;
		if (index->used > SLOTS_A_CHAIN * chains && chains < index->most_chains) split(index);
	}
	pthread_mutex_unlock(&index->writing);
	return other ? other : slot;
}

bool ci_remove(struct ci_index *index, uint64_t slot)
{
	uint64_t hash = hash_of(index, (uint32_t)slot);
	pthread_mutex_lock(&index->writing);
	uint64_t chains = atomic_load_explicit(&index->chains, memory_order_relaxed);
	_Atomic uint32_t *link = &index->heads[chain_of(hash, chains)];
	uint32_t at;
	while ((at = slot_of(index, follow(link))) && at != slot) link = &index->next[at];
	if (at) {
		/* It keeps its own link. */
		lead(link, follow(&index->next[at]));
		index->used--;
	}
	pthread_mutex_unlock(&index->writing);
	return at != 0;
}

int ci_node_count(void) { return numa_available() < 0 ? 1 : numa_max_node() + 1; }

void ci_prefer_node(void *address, size_t length, int node)
{
	if (numa_available() >= 0 && numa_max_node() > 0) numa_tonode_memory(address, length, node);
}
