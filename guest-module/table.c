// SPDX-License-Identifier: GPL-2.0-only
/*
 * table.c - the state table: its memory, switching it on and off.
 *
 * What it must guarantee: a state other than 0 is only ever seen by the host for a page that is free, and a table that
 * is off holds nothing but zeros, so that a host that still reads it (or one that is dead and comes back) finds nothing
 * to discard. Both without any I/O: the host is told that the table is off, but nothing depends on it having heard.
 *
 * Off -> on. The alloc side of the hooks is installed for the module's whole life, so a page that leaves the free lists
 * is always taken from the table. Marking starts with the next free (mark_limit), and what is free already is marked by
 * a walk of the free lists: the buddy lists under zone->lock, each CPU's lists under their own. A page that is on a list
 * while its lock is held has not been allocated: its allocation starts with taking that lock, and its hook runs after. A
 * page that has left the list before, but whose alloc hook has not run yet, is not marked by the walk. A page that moves
 * from one list to another between the two walks may be missed; it is marked when it is freed next.
 *
 * On -> off. mark_limit = 0; then synchronize_rcu(): every hook that marks runs with preemption off, so after it
 * nobody marks any more. Then each state is compare-exchanged to 0. A state that is CLAIMED belongs to the host, which
 * is discarding that page right now: it is waited for, like an allocation would. What the host claims while we walk was
 * not cleared yet, and we get to it.
 *
 * Memory. One page of states a 16 MiB block of guest RAM, mapped in one piece. Blocks without memory (the PCI hole, the
 * gap before plugged DIMMs) all share one page that stays 0, which the host is not told of, or a small guest with DIMMs
 * above 4 GiB would pay for the gap. Nothing marks in a hole because nothing is freed there; memory that is about to be plugged into one switches the
 * table off first (main.c), and a table that covers it replaces this one.
 *
 * The table's own pages are allocated like any other, so they are never marked: the module can't discard itself.
 */
#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/memory_hotplug.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include "quire.h"

#define STATES_PER_WORD sizeof(u64)
#define PANIC_PATIENCE_US 500000

/*
 * The end of memory that the allocator can hand out, in pages. Device memory has struct pages too, but is not freed. By
 * span, not by what is online: memory that is being plugged is in the span before it is announced.
 */
static unsigned long end_of_memory(void)
{
	unsigned long end = 0;
	int node, index;

	for_each_online_node(node)
		for (index = 0; index < MAX_NR_ZONES; index++) {
			struct zone *zone = &NODE_DATA(node)->node_zones[index];

			if (!zone_is_empty(zone) && !zone_is_zone_device(zone))
				end = max(end, zone_end_pfn(zone));
		}
	return end;
}

/*
 * Memory that is there but not online counts: its first page may be freed to the allocator before anybody is told. It is
 * there or not by 2 MiB.
 */
static bool block_has_memory(unsigned long block)
{
	unsigned long pfn = block * QUIRE_BLOCK_PAGES, end = pfn + QUIRE_BLOCK_PAGES;

	for (; pfn < end; pfn += PAGES_PER_SUBSECTION)
		if (pfn_valid(pfn))
			return true;
	return false;
}

void quire_table_destroy(struct quire_table *table)
{
	unsigned long block;

	if (!table)
		return;
	if (table->states)
		vunmap(table->states);
	for (block = 0; table->pages && block < table->blocks; block++)
		if (table->pages[block] && table->pages[block] != table->hole)
			__free_page(table->pages[block]);
	if (table->hole)
		__free_page(table->hole);
	kvfree(table->pages);
	vfree(table->skip);
	if (table->directory)
		free_pages_exact(table->directory, table->directory_bytes);
	free_page((unsigned long)table->header);
	kfree(table);
}

/* Sleeps. The table that is returned is off and all zeros. The caller looks for memory that came meanwhile. */
struct quire_table *quire_table_create(u32 period_ms)
{
	const gfp_t gfp = GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN;
	struct quire_table *table = kzalloc(sizeof(*table), GFP_KERNEL);
	unsigned long block, own = 0;

	if (!table)
		return NULL;
	table->blocks = DIV_ROUND_UP(end_of_memory(), QUIRE_BLOCK_PAGES);
	table->page_count = table->blocks * QUIRE_BLOCK_PAGES;
	table->directory_bytes = PAGE_ALIGN(table->blocks * sizeof(u64));

	table->header = (void *)__get_free_page(gfp);
	table->directory = alloc_pages_exact(table->directory_bytes, gfp);
	table->pages = kvcalloc(table->blocks, sizeof(*table->pages), GFP_KERNEL);
	table->hole = alloc_page(gfp);
	if (!table->header || !table->directory || !table->pages || !table->hole)
		goto fail;
#if QUIRE_KERNEL_6_12
	table->skip = vzalloc(table->page_count / BITS_PER_BYTE);
	if (!table->skip)
		goto fail;
	table->metadata_bytes += PAGE_ALIGN(table->page_count / BITS_PER_BYTE);
#endif
	for (block = 0; block < table->blocks; block++) {
		struct page *page = table->hole;

		if (block_has_memory(block)) {
			page = alloc_page(gfp);
			own++;
		}
		if (!page)
			goto fail;
		table->pages[block] = page;
		table->directory[block] = page == table->hole ? QUIRE_NO_STATES : page_to_phys(page);
		cond_resched();
	}
	table->states = vmap(table->pages, table->blocks, VM_MAP, PAGE_KERNEL);
	if (!table->states)
		goto fail;
	table->metadata_bytes += own * PAGE_SIZE + table->directory_bytes + 2 * PAGE_SIZE +
				 table->blocks * sizeof(*table->pages) + sizeof(*table);

	memcpy(table->header->magic, QUIRE_TABLE_MAGIC, sizeof(table->header->magic));
	table->header->version = QUIRE_TABLE_VERSION;
	table->header->page_count = table->page_count;
	table->header->directory_gpa = virt_to_phys(table->directory);
	table->header->epoch = QUIRE_STATE_EPOCH_FIRST;
	table->header->period_ms = period_ms;
	return table;
fail:
	quire_table_destroy(table);
	return NULL;
}

/* Whether every page of the range has a state of its own. */
bool quire_table_covers(const struct quire_table *table, unsigned long pfn, unsigned long count)
{
	unsigned long block, last = (pfn + count - 1) / QUIRE_BLOCK_PAGES;

	if (!table || pfn + count > table->page_count)
		return false;
	for (block = pfn / QUIRE_BLOCK_PAGES; block <= last; block++)
		if (table->pages[block] == table->hole)
			return false;
	return true;
}

static void mark_free_lists(struct quire_table *table, struct zone *zone)
{
	unsigned long flags;
	unsigned int order;
	struct page *page;
	int type, cpu;

	/*
	 * Per-CPU lists hold tens of MiB on a machine that has just booted. They go first: what they spill meanwhile goes to
	 * the buddy lists. Interrupts off on 6.12, too: an allocation in an interrupt only tries this lock.
	 */
	for_each_possible_cpu(cpu) {
		struct per_cpu_pages *pcp = per_cpu_ptr(zone->per_cpu_pageset, cpu);

		spin_lock_irqsave(&pcp->lock, flags);
		for (type = 0; type < NR_PCP_LISTS; type++)
			list_for_each_entry(page, &pcp->lists[type], lru)
				quire_mark(table, page_to_pfn(page), quire_order_of_pcp_list(type));
		spin_unlock_irqrestore(&pcp->lock, flags);
	}
	spin_lock_irqsave(&zone->lock, flags);
	for (order = 0; order < ARRAY_SIZE(zone->free_area); order++)
		for (type = 0; type < MIGRATE_TYPES; type++)
			list_for_each_entry(page, &zone->free_area[order].free_list[type], lru)
				quire_mark(table, page_to_pfn(page), order);
	spin_unlock_irqrestore(&zone->lock, flags);
}

/* Caller: holds the gate. Takes zone locks, for 0.4 to 1.6 ms a GiB of free memory. */
void quire_table_start(struct quire_table *table)
{
	int node, index;

	WRITE_ONCE(table->mark_limit, table->page_count);
	for_each_online_node(node)
		for (index = 0; index < MAX_NR_ZONES; index++) {
			struct zone *zone = &NODE_DATA(node)->node_zones[index];

			if (populated_zone(zone) && !zone_is_zone_device(zone))
				mark_free_lists(table, zone);
			cond_resched();
		}
}

/*
 * Takes pages that nobody allocates away from the host. Sleeps: a claim lasts microseconds, but while the host's claimer
 * is frozen or being replaced it can be half a second, and nothing here runs with interrupts off.
 */
void quire_table_clear(struct quire_table *table, unsigned long pfn, unsigned long count)
{
	unsigned long at, end = min(pfn + count, table->page_count);

	for (at = round_down(pfn, STATES_PER_WORD); at < end; at += STATES_PER_WORD) {
		u64 *word = (u64 *)(table->states + at);
		unsigned int polls = 0;
		unsigned int byte;

		for (byte = 0; READ_ONCE(*word) && byte < STATES_PER_WORD; byte++)
			while (READ_ONCE(table->states[at + byte]) == QUIRE_STATE_CLAIMED) {
				if (++polls < 1000)
					cpu_relax();
				else
					usleep_range(50, 100);
			}
		if (READ_ONCE(*word))
			quire_take_word(table, word);
		if (!(at % QUIRE_BLOCK_PAGES))
			cond_resched();
	}
}

/* Caller: holds the gate. Sleeps; may be called from CPU hotplug callbacks, so it takes no lock of CPU hotplug. */
void quire_table_stop(struct quire_table *table)
{
	WRITE_ONCE(table->mark_limit, 0);
	synchronize_rcu();
	quire_table_clear(table, 0, table->page_count);
}

/*
 * The other CPUs have been stopped, perhaps in the middle of a hook, or of quire_table_stop(): so no lock, no RCU, and an
 * end to the waiting. The magic goes first: a backend that restarts after this finds no table to go on with.
 */
void quire_table_stop_in_panic(struct quire_table *table)
{
	unsigned long at, patience = PANIC_PATIENCE_US;

	memset(table->header->magic, 0, sizeof(table->header->magic));
	WRITE_ONCE(table->mark_limit, 0);
	for (at = 0; at < table->page_count; at++) {
		u8 *state = table->states + at;
		u8 old = READ_ONCE(*state);

		if (!(at % STATES_PER_WORD) && !READ_ONCE(*(u64 *)state)) {
			at += STATES_PER_WORD - 1;
			continue;
		}
		while (old) {
			if (old != QUIRE_STATE_CLAIMED) {
				if (try_cmpxchg(state, &old, QUIRE_STATE_IN_USE))
					break;
				continue;
			}
			if (!patience)
				break;
			patience--;
			udelay(1);
			old = READ_ONCE(*state);
		}
	}
}
