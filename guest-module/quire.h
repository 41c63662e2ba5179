/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * quire.h - what the files of quire.ko share.
 *
 *   table.c    the state table: memory, directory, initial marking, clearing
 *   hooks.c    the hooks in the page allocator (the hot path)
 *   control.c  the control disk: registration, and noticing that the host lost it
 *   debugfs.c  /sys/kernel/debug/quire
 *   main.c     load, unload, and everything that switches the table off for a while
 */
#ifndef QUIRE_H
#define QUIRE_H

#include <linux/cache.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/percpu.h>
#include <linux/version.h>
#include "quire_layout.h"

#define QUIRE_VERSION "0.1"

#define QUIRE_LINE(major, minor) \
	(LINUX_VERSION_CODE >= KERNEL_VERSION(major, minor, 0) && LINUX_VERSION_CODE < KERNEL_VERSION(major, minor + 1, 0))
#define QUIRE_KERNEL_6_1 QUIRE_LINE(6, 1)
#define QUIRE_KERNEL_6_12 QUIRE_LINE(6, 12)

#if !QUIRE_KERNEL_6_1 && !QUIRE_KERNEL_6_12
#error "The list of hooks in hooks.c was checked against 6.1 and 6.12 only. On another kernel it can be incomplete, and then memory in use is discarded."
#endif

/* The order of the blocks on one of a CPU's free lists: the kernel's pindex_to_order(), which it keeps to itself. */
static inline unsigned int quire_order_of_pcp_list(unsigned int index)
{
#if QUIRE_KERNEL_6_12
	return index >= NR_LOWORDER_PCP_LISTS ? pageblock_order : index / MIGRATE_PCPTYPES;
#else
	unsigned int order = index / MIGRATE_PCPTYPES;

	return order > PAGE_ALLOC_COSTLY_ORDER ? pageblock_order : order;
#endif
}

/* States in one page of the table. */
#define QUIRE_BLOCK_PAGES 4096UL

/*
 * A table. The first four fields are all that the hot path reads of it. The pointer quire_table is replaced when memory
 * was plugged; whoever uses it has preemption off, and the old table is freed after synchronize_rcu().
 */
struct quire_table {
	u8 *states;                        /* page_count bytes, mapped in one piece */
	unsigned long page_count;          /* allocations below this are looked up: a multiple of QUIRE_BLOCK_PAGES */
	unsigned long mark_limit;          /* frees below this are marked: page_count, or 0 while the table is off */
	struct quire_table_header *header;

	/* 6.12: pages that compaction_free() is about to "free" and to keep. See hooks.c. */
	unsigned long *skip;
	atomic_t skips ____cacheline_aligned_in_smp;

	unsigned long blocks ____cacheline_aligned_in_smp;
	struct page **pages;               /* one a block; the hole page where there is no memory */
	struct page *hole;
	u64 *directory;
	size_t directory_bytes;
	size_t metadata_bytes;             /* everything above, in bytes */
};

extern struct quire_table *quire_table;

/* table.c */
struct quire_table *quire_table_create(u32 period_ms);
void quire_table_destroy(struct quire_table *table);
bool quire_table_covers(const struct quire_table *table, unsigned long pfn, unsigned long count);
void quire_table_start(struct quire_table *table);
void quire_table_stop(struct quire_table *table);
void quire_table_clear(struct quire_table *table, unsigned long pfn, unsigned long count);
void quire_table_stop_in_panic(struct quire_table *table);

/* hooks.c */
struct quire_events {
	unsigned long bulk_calls, bulk_pages, isolated, put_back, compaction_skips;
};

extern struct quire_events __percpu *quire_events;

int quire_hooks_install(void);
void quire_hooks_remove(void);
void quire_mark(struct quire_table *table, unsigned long pfn, unsigned int order);
void quire_take_word(struct quire_table *table, u64 *word);
void quire_wait_figures(u64 *waits, u64 *longest_ns);

/* control.c */
int quire_control_open(const char *path);
void quire_control_close(void);
u32 quire_control_period_ms(void);
u64 quire_control_max_pages(void);
int quire_control_set(bool registered, unsigned long timeout);
void quire_control_watch(bool on);
bool quire_control_schedule(struct work_struct *work);
int quire_control_register(struct quire_table *table);
int quire_control_unregister(void);
bool quire_control_host_may_use_table(void);
bool quire_control_disk_is_gone(void);
void quire_control_figures(bool *registered, u64 *registrations, u64 *failures, const char **disk);

/* main.c */
void quire_gate_lock(void);
void quire_gate_unlock(void);
const char *quire_hold_names(void);
struct quire_table *quire_test_table(void);

/* debugfs.c */
void quire_debugfs_create(void);
void quire_debugfs_remove(void);

#endif
