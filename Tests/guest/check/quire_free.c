// SPDX-License-Identifier: GPL-2.0-only
/*
 * quire_free.c - which pages are free, exactly: on the buddy lists or on the per-CPU lists, in one instant of a stopped
 * machine. It knows nothing of quire.ko, so that guests with and without it are measured alike.
 *
 * Write anything to /sys/kernel/debug/quire_free/take to take a picture. Then `bitmap` holds it, one bit a page frame
 * number, lowest bit first, and `counts` says how many pages it has by kind of list. A picture needs no memory.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/debugfs.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/stop_machine.h>
#include <linux/vmalloc.h>
#include "quire.h"

static unsigned long *bitmap, map_pages;
static struct debugfs_blob_wrapper blob;
static struct dentry *directory;

static struct {
	unsigned long small, large, per_cpu;
} counts;

static void add(struct page *page, unsigned int order, unsigned long *count)
{
	unsigned long pfn = page_to_pfn(page);

	if (pfn + (1UL << order) > map_pages)
		return;
	bitmap_set(bitmap, pfn, 1UL << order);
	*count += 1UL << order;
}

static void add_zone(struct zone *zone)
{
	unsigned int order, index;
	struct page *page;
	int type, cpu;

	for (order = 0; order < ARRAY_SIZE(zone->free_area); order++)
		for (type = 0; type < MIGRATE_TYPES; type++)
			list_for_each_entry(page, &zone->free_area[order].free_list[type], lru)
				add(page, order, order < pageblock_order ? &counts.small : &counts.large);
	for_each_possible_cpu(cpu) {
		struct per_cpu_pages *pcp = per_cpu_ptr(zone->per_cpu_pageset, cpu);

		for (index = 0; index < NR_PCP_LISTS; index++)
			list_for_each_entry(page, &pcp->lists[index], lru)
				add(page, quire_order_of_pcp_list(index), &counts.per_cpu);
	}
}

static int take_stopped(void *unused)
{
	int node, index;

	bitmap_zero(bitmap, map_pages);
	memset(&counts, 0, sizeof(counts));
	for_each_online_node(node)
		for (index = 0; index < MAX_NR_ZONES; index++)
			if (populated_zone(&NODE_DATA(node)->node_zones[index]))
				add_zone(&NODE_DATA(node)->node_zones[index]);
	return 0;
}

static ssize_t take_write(struct file *file, const char __user *text, size_t size, loff_t *at)
{
	stop_machine(take_stopped, NULL, NULL);
	return size;
}

static const struct file_operations take_fops = { .owner = THIS_MODULE, .write = take_write };

static int counts_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "free_pages %lu\n", counts.small + counts.large + counts.per_cpu);
	seq_printf(file, "in_small_blocks %lu\n", counts.small);
	seq_printf(file, "in_large_blocks %lu\n", counts.large);
	seq_printf(file, "on_per_cpu_lists %lu\n", counts.per_cpu);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(counts);

static int __init free_init(void)
{
	int node;

	for_each_online_node(node)
		map_pages = max(map_pages, pgdat_end_pfn(NODE_DATA(node)));
	map_pages = round_up(map_pages, BITS_PER_LONG);
	bitmap = vzalloc(map_pages / BITS_PER_BYTE);
	if (!bitmap)
		return -ENOMEM;
	blob.data = bitmap;
	blob.size = map_pages / BITS_PER_BYTE;
	directory = debugfs_create_dir("quire_free", NULL);
	debugfs_create_file("take", 0200, directory, NULL, &take_fops);
	debugfs_create_file("counts", 0400, directory, NULL, &counts_fops);
	debugfs_create_blob("bitmap", 0400, directory, &blob);
	return 0;
}

static void __exit free_exit(void)
{
	debugfs_remove(directory);
	vfree(bitmap);
}

module_init(free_init);
module_exit(free_exit);
MODULE_DESCRIPTION("Which pages are free");
MODULE_LICENSE("GPL");
