// SPDX-License-Identifier: GPL-2.0-only
/*
 * debugfs.c - /sys/kernel/debug/quire: what the module does, for people and tests. Nothing here is counted on the hot
 * path: how many pages are marked now is found by walking the table, when somebody asks.
 */
#include <linux/debugfs.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include "quire.h"

static struct dentry *directory;

static int state_show(struct seq_file *file, void *unused)
{
	unsigned long pfn, marked = 0, claimed = 0, recycled = 0;
	struct quire_table *table;
	u64 registrations, failures;
	const char *disk;
	bool registered;

	quire_control_figures(&registered, &registrations, &failures, &disk);
	quire_gate_lock();
	table = quire_table;
	for (pfn = 0; pfn < table->page_count; pfn++) {
		u8 state = READ_ONCE(table->states[pfn]);

		marked += state >= QUIRE_STATE_EPOCH_FIRST && state <= QUIRE_STATE_EPOCH_LAST;
		claimed += state == QUIRE_STATE_CLAIMED;
		recycled += state == QUIRE_STATE_RECYCLED;
		if (!(pfn % QUIRE_BLOCK_PAGES))
			cond_resched();
	}
	seq_printf(file, "control_disk %s\n", disk);
	seq_printf(file, "registered %d\n", registered);
	seq_printf(file, "marking %d\n", !!table->mark_limit);
	seq_printf(file, "off_because %s\n", quire_hold_names());
	seq_printf(file, "epoch %u\n", READ_ONCE(table->header->epoch));
	seq_printf(file, "ticks %llu\n", READ_ONCE(table->header->ticks));
	seq_printf(file, "period_ms %u\n", READ_ONCE(table->header->period_ms));
	seq_printf(file, "page_count %lu\n", table->page_count);
	seq_printf(file, "metadata_bytes %zu\n", table->metadata_bytes);
	seq_printf(file, "marked_pages %lu\n", marked);
	seq_printf(file, "claimed_pages %lu\n", claimed);
	seq_printf(file, "recycled_pages %lu\n", recycled);
	quire_gate_unlock();
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(state);

static int counters_show(struct seq_file *file, void *unused)
{
	struct quire_events sum = {};
	u64 registrations, failures, waits, longest_ns;
	const char *disk;
	bool registered;
	int cpu;

	for_each_possible_cpu(cpu) {
		struct quire_events *events = per_cpu_ptr(quire_events, cpu);

		sum.bulk_calls += READ_ONCE(events->bulk_calls);
		sum.bulk_pages += READ_ONCE(events->bulk_pages);
		sum.isolated += READ_ONCE(events->isolated);
		sum.put_back += READ_ONCE(events->put_back);
		sum.compaction_skips += READ_ONCE(events->compaction_skips);
	}
	quire_wait_figures(&waits, &longest_ns);
	quire_control_figures(&registered, &registrations, &failures, &disk);
	seq_printf(file, "waits %llu\n", waits);
	seq_printf(file, "longest_wait_ns %llu\n", longest_ns);
	seq_printf(file, "bulk_calls %lu\n", sum.bulk_calls);
	seq_printf(file, "bulk_pages %lu\n", sum.bulk_pages);
	seq_printf(file, "isolated_blocks %lu\n", sum.isolated);
	seq_printf(file, "put_back_blocks %lu\n", sum.put_back);
	seq_printf(file, "compaction_skips %lu\n", sum.compaction_skips);
	seq_printf(file, "registrations %llu\n", registrations);
	seq_printf(file, "failed_requests %llu\n", failures);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(counters);

void quire_debugfs_create(void)
{
	directory = debugfs_create_dir("quire", NULL);
	debugfs_create_file("state", 0400, directory, NULL, &state_fops);
	debugfs_create_file("counters", 0400, directory, NULL, &counters_fops);
}

/* Waits for readers. */
void quire_debugfs_remove(void)
{
	debugfs_remove(directory);
}
