/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A content index: from the hash of a page, 64 bits of it, to the slot that holds it, read without a lock by any number of
 * threads. And where memory of a NUMA node comes from (libnuma).
 *
 * A slot is in it once at most, so its links are arrays beside the slots, and hashes stay where the store's table has them: a
 * slot that is in costs six bytes here. One that was taken out must not be put in again, and its hash must not
 * change, before ci_wait: a reader may still be on it.
 *
 * Readers are known to liburcu, flavour "bp": a thread registers itself when it first reads, so nobody can forget to.
 */
#ifndef CINDEX_H
#define CINDEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ci_index;

/* `hashes` are `slots` of them, which outlive the index; slot 0 is none. At most 2^32 slots. NULL: no memory. */
struct ci_index *ci_new(const uint64_t *hashes, uint64_t slots);
/* No other thread uses it any more. */
void ci_free(struct ci_index *index);

/* Between these a slot that ci_find returned is not used for anything else. They nest. */
void ci_read_lock(void);
void ci_read_unlock(void);
/* 0: there is none. Between ci_read_lock and ci_read_unlock. */
uint64_t ci_find(struct ci_index *index, uint64_t hash);
/* Puts a slot in, which is not in, under the hash that `hashes` has for it. Returns it, or another that has that hash already. */
uint64_t ci_add(struct ci_index *index, uint64_t slot);
/* True if it was in. */
bool ci_remove(struct ci_index *index, uint64_t slot);
/* Waits until every reader of this moment has left. Not between ci_read_lock and ci_read_unlock. */
void ci_wait(void);
/* For a test's control: from now on a look-up that was disturbed may miss what is there. */
void ci_never_look_again(struct ci_index *index);

/* Nodes are 0 ..< ci_node_count(), 1 where the kernel knows of none. */
int ci_node_count(void);
/* Memory of the range comes from this node where it can. */
void ci_prefer_node(void *address, size_t length, int node);

#endif
