// SPDX-License-Identifier: GPL-2.0-only
/*
 * quire_check.c - holds quire.ko to its promise: no page in use is ever marked.
 *
 * Every round stops the machine, builds the exact set of free pages (buddy lists and per-CPU lists) and compares it with
 * the state table. A page that is marked but in no list may be on its way in or out (freed but not on a list yet, or taken
 * but its hook has not run): that is tolerated once. If the same page is found so in the next round again, and something
 * uses it, that is a violation.
 *
 * The module also plays the host, so that a wrong mark has consequences and claims are contended: in the stopped machine
 * (zap pages a round) and from a thread at any time (claim pages at once, for hold_us). It discards as the host does:
 * compare-exchange to CLAIMED, zero the page, store RECYCLED. Meanwhile its own load allocates by every path that the
 * allocator has, and verifies that what it wrote stays.
 *
 * The result is in the log ("FINAL ...") and in /sys/kernel/debug/quire_check/result.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/highmem.h>
#include <linux/kthread.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/module.h>
#include <linux/random.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/stop_machine.h>
#include <linux/vmalloc.h>
#include "quire.h"

MODULE_IMPORT_NS(QUIRE_TEST);

static int rounds = 60, gap_ms = 250, zap = 4000, claim = 256, hold_us = 50;
static bool load = true;
module_param(rounds, int, 0444);
module_param(gap_ms, int, 0444);
module_param(zap, int, 0444);
MODULE_PARM_DESC(zap, "pages to discard a round, in the stopped machine");
module_param(claim, int, 0444);
MODULE_PARM_DESC(claim, "pages that the host's thread claims at once (0: no thread)");
module_param(hold_us, int, 0444);
module_param(load, bool, 0444);

static unsigned long *is_free, *suspect, *suspect_before;
static unsigned long map_pages;

static struct result {
	unsigned long rounds, violations, limbo, in_flight_most, free, marked, recycled, missed, zapped;
	unsigned long first_bad[4];
} result;

/* A loop of the load counts when it got memory. */
static atomic_long_t discarded, corruptions, loops_vmalloc, loops_bulk, loops_order, contig_ok, contig_failed;
static bool finished;

/* ---- the free set ---- */

static unsigned int order_of_pcp_list(unsigned int index)
{
#if QUIRE_KERNEL_6_12
	return index >= NR_LOWORDER_PCP_LISTS ? pageblock_order : index / MIGRATE_PCPTYPES;
#else
	unsigned int order = index / MIGRATE_PCPTYPES;

	return order > PAGE_ALLOC_COSTLY_ORDER ? pageblock_order : order;
#endif
}

static void add_free(struct page *page, unsigned int order)
{
	unsigned long pfn = page_to_pfn(page), count = 1UL << order;

	if (pfn + count <= map_pages) {
		bitmap_set(is_free, pfn, count);
		result.free += count;
	}
}

static void add_zone(struct zone *zone)
{
	unsigned int order, index;
	struct page *page;
	int type, cpu;

	for (order = 0; order < ARRAY_SIZE(zone->free_area); order++)
		for (type = 0; type < MIGRATE_TYPES; type++)
			list_for_each_entry(page, &zone->free_area[order].free_list[type], lru)
				add_free(page, order);
	for_each_possible_cpu(cpu) {
		struct per_cpu_pages *pcp = per_cpu_ptr(zone->per_cpu_pageset, cpu);

		for (index = 0; index < NR_PCP_LISTS; index++)
			list_for_each_entry(page, &pcp->lists[index], lru)
				add_free(page, order_of_pcp_list(index));
	}
}

static bool in_use(struct page *page)
{
	return page_count(page) > 0 || PageLRU(page) || PageSlab(page) || PageCompound(page) || page->mapping;
}

static u8 *state_of(struct quire_table *table, unsigned long pfn)
{
	return table->states + pfn;
}

static bool discard(struct quire_table *table, unsigned long pfn)
{
	u8 *state = state_of(table, pfn);
	u8 old = READ_ONCE(*state);

	if (!old || old == QUIRE_STATE_CLAIMED || !try_cmpxchg(state, &old, QUIRE_STATE_CLAIMED))
		return false;
	clear_page(page_address(pfn_to_page(pfn)));
	return true;
}

static int round_stopped(void *unused)
{
	struct quire_table *table = quire_test_table();
	unsigned long pfn, end = min(table->page_count, map_pages), in_flight = 0, left, start;
	int node, index;

	bitmap_zero(is_free, map_pages);
	result.free = result.marked = result.recycled = result.missed = 0;
	for_each_online_node(node)
		for (index = 0; index < MAX_NR_ZONES; index++)
			if (populated_zone(&NODE_DATA(node)->node_zones[index]))
				add_zone(&NODE_DATA(node)->node_zones[index]);
	swap(suspect, suspect_before);
	bitmap_zero(suspect, map_pages);
	for (pfn = 0; pfn < end; pfn++) {
		u8 state = READ_ONCE(*state_of(table, pfn));

		if (!state) {
			result.missed += test_bit(pfn, is_free);
			continue;
		}
		result.marked++;
		result.recycled += state == QUIRE_STATE_RECYCLED;
		if (test_bit(pfn, is_free))
			continue;
		in_flight++;
		__set_bit(pfn, suspect);
		if (!test_bit(pfn, suspect_before))
			continue;
		if (in_use(pfn_to_page(pfn))) {
			if (result.violations < ARRAY_SIZE(result.first_bad))
				result.first_bad[result.violations] = pfn;
			result.violations++;
		} else {
			result.limbo++;
		}
	}
	result.in_flight_most = max(result.in_flight_most, in_flight);
	left = zap;
	start = end ? get_random_u32() % end : 0;
	for (index = 0; left && index < end; index++) {
		pfn = (start + index) % end;
		if (discard(table, pfn)) {
			WRITE_ONCE(*state_of(table, pfn), QUIRE_STATE_RECYCLED);
			result.zapped++;
			left--;
		}
	}
	result.rounds++;
	return 0;
}

/* ---- the host, at any time ---- */

static struct task_struct *tasks[8];
static unsigned int task_count;

/* Interrupts off while claims are open: an allocation on this CPU would wait for us. */
static int host_thread(void *unused)
{
	unsigned long *claimed = kvcalloc(claim, sizeof(*claimed), GFP_KERNEL);

	while (claimed && !kthread_should_stop()) {
		struct quire_table *table;
		unsigned long flags, pfn, tries;
		int count = 0;

		local_irq_save(flags);
		table = quire_test_table();
		pfn = get_random_u32() % table->page_count;
		for (tries = 0; count < claim && tries < 16384; tries++, pfn++) {
			if (pfn >= table->page_count)
				pfn = 0;
			if (READ_ONCE(*state_of(table, pfn)) && discard(table, pfn))
				claimed[count++] = pfn;
		}
		udelay(hold_us);
		while (count--) {
			clear_page(page_address(pfn_to_page(claimed[count])));
			smp_store_release(state_of(table, claimed[count]), QUIRE_STATE_RECYCLED);
			atomic_long_inc(&discarded);
		}
		local_irq_restore(flags);
		usleep_range(200, 2000);
	}
	kvfree(claimed);
	while (!kthread_should_stop())
		msleep(20);
	return 0;
}

/* ---- the load ---- */

#define LOAD_GFP (GFP_KERNEL | __GFP_NOWARN | __GFP_NORETRY)

static void fill(void *page, u64 seed)
{
	u64 *word = page;
	int i;

	for (i = 0; i < PAGE_SIZE / sizeof(u64); i += 16)
		WRITE_ONCE(word[i], seed + i);
}

static void verify(void *page, u64 seed, const char *who)
{
	u64 *word = page;
	int i;

	for (i = 0; i < PAGE_SIZE / sizeof(u64); i += 16)
		if (READ_ONCE(word[i]) != seed + i) {
			if (atomic_long_inc_return(&corruptions) < 10)
				pr_err("CORRUPTION %s: word %d is %llx\n", who, i, word[i]);
			return;
		}
}

static int vmalloc_thread(void *unused)
{
	while (!kthread_should_stop()) {
		unsigned long count = 1 + get_random_u32() % 800, i;
		u64 seed = get_random_u64() | 1;
		char *area = __vmalloc(count * PAGE_SIZE, LOAD_GFP);

		if (area) {
			for (i = 0; i < count; i++)
				fill(area + i * PAGE_SIZE, seed);
			msleep(1 + get_random_u32() % 150);
			for (i = 0; i < count; i++)
				verify(area + i * PAGE_SIZE, seed, "vmalloc");
			vfree(area);
			atomic_long_inc(&loops_vmalloc);
		}
		msleep(5);
	}
	return 0;
}

static int bulk_thread(void *unused)
{
	static struct page *array[200];

	while (!kthread_should_stop()) {
		unsigned int count = 1 + get_random_u32() % ARRAY_SIZE(array), i, hole = get_random_u32() % count;
		u64 seed = get_random_u64() | 1;
		struct page *page, *next;
		unsigned long got;
		LIST_HEAD(list);

		/* An array with a hole, and one page that was there before. */
		memset(array, 0, sizeof(array));
		array[hole] = alloc_page(LOAD_GFP);
		if (array[hole])
			fill(page_address(array[hole]), seed);
		alloc_pages_bulk_array(LOAD_GFP, count, array);
		got = alloc_pages_bulk_list(LOAD_GFP, count, &list);
		for (i = 0; i < count; i++)
			if (array[i])
				fill(page_address(array[i]), seed);
		list_for_each_entry(page, &list, lru)
			fill(page_address(page), seed);
		msleep(1 + get_random_u32() % 60);
		for (i = 0; i < count; i++)
			if (array[i]) {
				verify(page_address(array[i]), seed, "bulk array");
				__free_page(array[i]);
			}
		list_for_each_entry_safe(page, next, &list, lru) {
			verify(page_address(page), seed, "bulk list");
			__free_page(page);
		}
		if (got)
			atomic_long_inc(&loops_bulk);
		msleep(5);
	}
	return 0;
}

static int order_thread(void *unused)
{
	while (!kthread_should_stop()) {
		unsigned int order = get_random_u32() % 11, i;
		bool zero = get_random_u32() % 2;
		u64 seed = get_random_u64() | 1;
		struct page *page = alloc_pages(LOAD_GFP | __GFP_COMP | (zero ? __GFP_ZERO : 0), order);

		if (page) {
			char *start = page_address(page);

			if (zero && memchr_inv(start, 0, PAGE_SIZE << order) &&
			    atomic_long_inc_return(&corruptions) < 10)
				pr_err("CORRUPTION: a zeroed block of order %u is not zero\n", order);
			for (i = 0; i < 1U << order; i++)
				fill(start + i * PAGE_SIZE, seed);
			msleep(1 + get_random_u32() % 30);
			for (i = 0; i < 1U << order; i++)
				verify(start + i * PAGE_SIZE, seed, "order");
			__free_pages(page, order);
			atomic_long_inc(&loops_order);
		}
		msleep(2);
	}
	return 0;
}

#if QUIRE_KERNEL_6_12
#define contig_alloc alloc_contig_range_noprof
#else
#define contig_alloc alloc_contig_range
#endif

static int contig_thread(void *unused)
{
	const unsigned long count = 512;

	while (!kthread_should_stop()) {
		unsigned long pfn = round_down(get_random_u32() % map_pages, count), i;
		u64 seed = get_random_u64() | 1;

		if (pfn_to_online_page(pfn) && pfn_to_online_page(pfn + count - 1) &&
		    page_zone(pfn_to_page(pfn)) == page_zone(pfn_to_page(pfn + count - 1)) &&
		    !contig_alloc(pfn, pfn + count, MIGRATE_MOVABLE, GFP_KERNEL | __GFP_NOWARN)) {
			for (i = 0; i < count; i++)
				fill(page_address(pfn_to_page(pfn + i)), seed);
			msleep(1 + get_random_u32() % 100);
			for (i = 0; i < count; i++)
				verify(page_address(pfn_to_page(pfn + i)), seed, "contig");
			free_contig_range(pfn, count);
			atomic_long_inc(&contig_ok);
		} else {
			atomic_long_inc(&contig_failed);
		}
		msleep(20);
	}
	return 0;
}

/* ---- the whole ---- */

static void format(char *text, size_t size)
{
	scnprintf(text, size,
		  "rounds=%lu violations=%lu corruptions=%ld limbo=%lu in_flight_most=%lu free=%lu marked=%lu missed=%lu zapped=%lu discarded=%ld vmalloc=%ld bulk=%ld orders=%ld contig=%ld/%ld first_bad=%lx,%lx",
		  result.rounds, result.violations, atomic_long_read(&corruptions), result.limbo, result.in_flight_most,
		  result.free, result.marked, result.missed, result.zapped, atomic_long_read(&discarded),
		  atomic_long_read(&loops_vmalloc), atomic_long_read(&loops_bulk), atomic_long_read(&loops_order),
		  atomic_long_read(&contig_ok), atomic_long_read(&contig_failed), result.first_bad[0],
		  result.first_bad[1]);
}

static int result_show(struct seq_file *file, void *unused)
{
	char text[512];

	format(text, sizeof(text));
	seq_printf(file, "%s %s\n", finished ? "FINAL" : "running", text);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(result);

static struct dentry *folder;

static int check_thread(void *unused)
{
	char text[512];

	while (result.rounds < rounds && !kthread_should_stop()) {
		unsigned long before = result.violations;

		stop_machine(round_stopped, NULL, NULL);
		if (result.violations != before || result.rounds <= 2) {
			format(text, sizeof(text));
			pr_info("%s\n", text);
		}
		msleep(gap_ms);
	}
	format(text, sizeof(text));
	finished = true;
	pr_info("FINAL %s\n", text);
	while (!kthread_should_stop())
		msleep(50);
	return 0;
}

static void start(int (*function)(void *), const char *name)
{
	struct task_struct *task = kthread_run(function, NULL, "check_%s", name);

	if (!IS_ERR(task))
		tasks[task_count++] = task;
}

static int __init check_init(void)
{
	/* A margin for memory that is plugged while we run: QEMU puts it above 4 GiB. */
	map_pages = quire_test_table()->page_count + (8UL << (30 - PAGE_SHIFT));
	is_free = vzalloc(map_pages / 8);
	suspect = vzalloc(map_pages / 8);
	suspect_before = vzalloc(map_pages / 8);
	if (!is_free || !suspect || !suspect_before) {
		vfree(is_free);
		vfree(suspect);
		vfree(suspect_before);
		return -ENOMEM;
	}
	folder = debugfs_create_dir("quire_check", NULL);
	debugfs_create_file("result", 0400, folder, NULL, &result_fops);
	start(check_thread, "rounds");
	if (claim > 0)
		start(host_thread, "host");
	if (load) {
		start(vmalloc_thread, "vmalloc");
		start(bulk_thread, "bulk");
		start(order_thread, "orders");
		start(contig_thread, "contig");
	}
	return 0;
}

static void __exit check_exit(void)
{
	while (task_count)
		kthread_stop(tasks[--task_count]);
	debugfs_remove(folder);
	vfree(is_free);
	vfree(suspect);
	vfree(suspect_before);
}

module_init(check_init);
module_exit(check_exit);
MODULE_DESCRIPTION("Compares quire.ko's table with the free lists");
MODULE_LICENSE("GPL");
