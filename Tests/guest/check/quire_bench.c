// SPDX-License-Identifier: GPL-2.0-only
/*
 * quire_bench.c - what an allocation costs, in instructions. Run it under `qemu -icount shift=0`, where the time stamp
 * counter counts one a instruction, with quire.ko and without, and subtract. Each figure is the best of many batches, so
 * that a timer tick doesn't count. The module doesn't stay loaded.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/vmalloc.h>
#include <asm/msr.h>

#define BATCHES 40
#define PAIRS 100

static char *label = "";
module_param(label, charp, 0444);

static u64 pairs(unsigned int order)
{
	u64 best = U64_MAX;
	int batch, i;

	for (batch = 0; batch < BATCHES; batch++) {
		u64 since = rdtsc_ordered();

		for (i = 0; i < PAIRS; i++)
			__free_pages(alloc_pages(GFP_KERNEL, order), order);
		best = min(best, rdtsc_ordered() - since);
	}
	return best / PAIRS;
}

static u64 vmallocs(unsigned int pages)
{
	u64 best = U64_MAX;
	int batch;

	for (batch = 0; batch < BATCHES; batch++) {
		u64 since = rdtsc_ordered();

		vfree(vmalloc(pages * PAGE_SIZE));
		best = min(best, rdtsc_ordered() - since);
	}
	return best;
}

static u64 bulks(void)
{
	static struct page *array[64];
	u64 best = U64_MAX;
	int batch, i;

	for (batch = 0; batch < BATCHES; batch++) {
		unsigned int count;
		u64 since = rdtsc_ordered();

		memset(array, 0, sizeof(array));
		count = alloc_pages_bulk_array(GFP_KERNEL, ARRAY_SIZE(array), array);
		for (i = 0; i < count; i++)
			__free_page(array[i]);
		if (count == ARRAY_SIZE(array))
			best = min(best, rdtsc_ordered() - since);
	}
	return best;
}

static int __init bench_init(void)
{
	pr_info("%s pair0=%llu pair1=%llu pair3=%llu pair9=%llu vmalloc16=%llu vmalloc256=%llu bulk64=%llu\n", label,
		pairs(0), pairs(1), pairs(3), pairs(9), vmallocs(16), vmallocs(256), bulks());
	return -EAGAIN;
}

module_init(bench_init);
MODULE_DESCRIPTION("Instructions an allocation");
MODULE_LICENSE("GPL");
