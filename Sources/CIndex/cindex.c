/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cindex.h"
#include <numa.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <urcu/urcu-bp.h>
#include <urcu/rculfhash.h>

struct ci_index {
	struct cds_lfht *table;
	struct cds_lfht_node *nodes;
	const uint64_t *hashes;
	uint64_t slots;
};

static const uint64_t *hash_of(const struct ci_index *index, uint64_t slot) { return index->hashes + 2 * slot; }

struct ci_index *ci_new(const uint64_t *hashes, uint64_t slots)
{
	struct ci_index *index = calloc(1, sizeof *index);
	if (!index) return NULL;
	index->hashes = hashes;
	index->slots = slots;
	/* Sparse: nodes of slots that nobody used cost nothing. */
	index->nodes = mmap(NULL, slots * sizeof *index->nodes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (index->nodes == MAP_FAILED) { free(index); return NULL; }
	index->table = cds_lfht_new_flavor(64, 64, 0, CDS_LFHT_AUTO_RESIZE | CDS_LFHT_ACCOUNTING, &urcu_bp_flavor, NULL);
	if (!index->table) {
		munmap(index->nodes, slots * sizeof *index->nodes);
		free(index);
		return NULL;
	}
	return index;
}

void ci_free(struct ci_index *index)
{
	/* The table must be empty before it goes. */
	struct cds_lfht_iter at;
	struct cds_lfht_node *node;
	urcu_bp_read_lock();
	cds_lfht_for_each(index->table, &at, node) cds_lfht_del(index->table, node);
	urcu_bp_read_unlock();
	cds_lfht_destroy(index->table, NULL);
	munmap(index->nodes, index->slots * sizeof *index->nodes);
	free(index);
}

void ci_read_lock(void) { urcu_bp_read_lock(); }
void ci_read_unlock(void) { urcu_bp_read_unlock(); }
void ci_wait(void) { urcu_bp_synchronize_rcu(); }

struct search { const struct ci_index *index; uint64_t low, high; };

static int matches(struct cds_lfht_node *node, const void *key)
{
	const struct search *search = key;
	const uint64_t *hash = hash_of(search->index, (uint64_t)(node - search->index->nodes));
	return hash[0] == search->low && hash[1] == search->high;
}

uint64_t ci_find(struct ci_index *index, uint64_t low, uint64_t high)
{
	struct search search = { index, low, high };
	struct cds_lfht_iter at;
	cds_lfht_lookup(index->table, low, matches, &search, &at);
	struct cds_lfht_node *node = cds_lfht_iter_get_node(&at);
	return node ? (uint64_t)(node - index->nodes) : 0;
}

uint64_t ci_add(struct ci_index *index, uint64_t slot)
{
	const uint64_t *hash = hash_of(index, slot);
	struct search search = { index, hash[0], hash[1] };
	struct cds_lfht_node *node = index->nodes + slot;
	urcu_bp_read_lock();
	cds_lfht_node_init(node);
	node = cds_lfht_add_unique(index->table, hash[0], matches, &search, node);
	urcu_bp_read_unlock();
	return (uint64_t)(node - index->nodes);
}

bool ci_remove(struct ci_index *index, uint64_t slot)
{
	urcu_bp_read_lock();
	bool was_in = cds_lfht_del(index->table, index->nodes + slot) == 0;
	urcu_bp_read_unlock();
	return was_in;
}

int ci_node_count(void) { return numa_available() < 0 ? 1 : numa_max_node() + 1; }

void ci_prefer_node(void *address, size_t length, int node)
{
	if (numa_available() >= 0 && numa_max_node() > 0) numa_tonode_memory(address, length, node);
}
