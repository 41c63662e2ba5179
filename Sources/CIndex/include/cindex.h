/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A content index: from the 128-bit hash of a page to the slot that holds it, read without a lock by any number of
 * threads (liburcu's cds_lfht). And where memory of a NUMA node comes from (libnuma).
 *
 * A slot has at most one node, so nodes are an array beside the slots, and their hashes stay where the store's table
 * has them: an indexed slot costs 16 bytes here, and its bucket. A slot that was taken out must not be put in again, and
 * its hash must not change, before ci_wait: a reader may still be on it.
 *
 * Flavour "bp" of liburcu: a thread registers itself when it first reads, so nobody can forget to.
 */
#ifndef CINDEX_H
#define CINDEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ci_index;

/* `hashes` are two 64-bit words a slot, `slots` of them, which outlive the index. NULL: no memory. */
struct ci_index *ci_new(const uint64_t *hashes, uint64_t slots);
/* No other thread uses it any more. */
void ci_free(struct ci_index *index);

/* Between these a slot that ci_find returned is not used for anything else. They nest. */
void ci_read_lock(void);
void ci_read_unlock(void);
/* 0: there is none. */
uint64_t ci_find(struct ci_index *index, uint64_t low, uint64_t high);
/* Puts a slot in under the hash that `hashes` has for it. Returns it, or another that has that hash already. */
uint64_t ci_add(struct ci_index *index, uint64_t slot);
/* True if it was in. */
bool ci_remove(struct ci_index *index, uint64_t slot);
/* Waits until every reader of this moment has left. Not between ci_read_lock and ci_read_unlock. */
void ci_wait(void);

/* Nodes are 0 ..< ci_node_count(), 1 where the kernel knows of none. */
int ci_node_count(void);
/* Memory of the range comes from this node where it can. */
void ci_prefer_node(void *address, size_t length, int node);

#endif
