// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks.c - follows every page in and out of the page allocator.
 *
 * What it must guarantee: while a page is in use, its state is 0 and stays 0. "In use" begins before the allocator's
 * caller gets the page and ends when the allocator has it back. A page that is marked may be discarded at any moment:
 * it then reads as zeros, and so does everything that is written to it until its state is 0.
 *
 * Out of the allocator (state := 0, waiting while it is CLAIMED)
 *
 *   mm_page_alloc, tracepoint      the last thing __alloc_pages() does
 *   __isolate_free_page, ftrace    compaction, alloc_contig_range(), page reporting. On entry, under zone->lock. It can
 *                                  still fail at a watermark; the page is then free without a mark until its next turn
 *   bulk allocator, ftrace         takes pages from a per-CPU list past the tracepoint. See below
 *
 * Into the allocator (state := epoch)
 *
 *   mm_page_free, tracepoint       the first thing free_pages_prepare() does
 *   __putback_isolated_page        on entry, under zone->lock
 *
 * Why it is safe to mark at the top of free_pages_prepare(), and to unmark at the end of __alloc_pages(): between them
 * and the free list only the allocator itself writes to the page, and it writes zeros (init_on_free, init_on_alloc,
 * __GFP_ZERO). Whether such a write comes before a discard or after it, the page reads as zeros. init_on_alloc trusts
 * nothing, init_on_free trusts that a free page stays zero, without either any content will do. Page poisoning, KASAN
 * and DEBUG_PAGEALLOC do expect other contents or other mappings: with them main.c refuses to load. If
 * free_pages_prepare() finds a page bad, the page is leaked with its mark: it is in nobody's hands.
 *
 * A page may also be freed while it has a mark: when __alloc_pages() can't charge a cgroup for the page it has just
 * taken, it frees it again before the tracepoint. The state is then anything, CLAIMED included, which only the host may
 * change; hence a free that doesn't find 0 goes the slow way. A free that does find 0 may use a plain store: nobody but
 * the owner of the page changes a 0.
 *
 * The bulk allocator (__alloc_pages_bulk, alloc_pages_bulk_noprof) is replaced, as livepatch would replace it, by
 * bulk_wrapper(): it calls the original and then takes all pages that came back from the table. Until then they are
 * marked, and that is safe by the same argument: in both kernels the original only calls prep_new_page() (zeroing) on
 * them and links them into the caller's array or list; it looks at no byte of a page, and the array or list becomes the
 * caller's when the function returns. The page that its `failed:` path gets comes from __alloc_pages() and has seen the
 * tracepoint. What comes back: array entries [0, n) are filled, those that the caller had filled before being in use
 * already (state 0, left alone); on the list, pages are added at the head, so the first n are new.
 * Clamping nr_pages to 1 instead, so that it takes the traced path, made vmalloc 1.5 to 2 times as slow.
 *
 * compaction_free (6.12) runs free_pages_prepare() on a page, and keeps it on its own list instead of freeing it; when it
 * hands the page to migration again, no hook sees that. So the event that compaction_free() causes must not mark. The
 * hook on its entry sets a bit for the page, and the free event takes that bit. If somebody else holds a reference,
 * compaction_free() causes no event, and the bit swallows the page's next free: a page that is free without a mark, once.
 * The bitmap is looked at only while any bit is set, so that the free path pays one load for it.
 *
 * Tracepoints need an online CPU (they do nothing otherwise): main.c switches the table off while a CPU is between
 * online and offline. Ftrace hooks are PERMANENT: the ftrace_enabled sysctl can't switch them off. They may be called
 * with the zone lock held, so they spin but never sleep, and this file is built without tracing of its own.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/ftrace.h>
#include <linux/kernel.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/sched/clock.h>
#include <linux/string.h>
#include <linux/tracepoint.h>
#include "quire.h"

#if QUIRE_KERNEL_6_12
#define BULK_NAME "alloc_pages_bulk_noprof"
#define bulk_original alloc_pages_bulk_noprof
#define registers_of(fregs) (&arch_ftrace_regs(fregs)->regs)
#else
#define BULK_NAME "__alloc_pages_bulk"
#define bulk_original __alloc_pages_bulk
#define registers_of(fregs) (&(fregs)->regs)
#define ftrace_regs_set_instruction_pointer ftrace_instruction_pointer_set
#endif

#define EVERY_BYTE 0x0101010101010101ULL
#define BULK_STRIDE 64

struct quire_table *quire_table __read_mostly;
struct quire_events __percpu *quire_events;

static DEFINE_PER_CPU(long, bulk_running);
static atomic64_t waits;
static atomic64_t longest_wait;

/* States wider than a byte, zero-extended: whether one of them is CLAIMED. */
static __always_inline bool has_claimed(u64 word)
{
	u64 difference = word ^ (EVERY_BYTE * QUIRE_STATE_CLAIMED);

	return (difference - EVERY_BYTE) & ~difference & (EVERY_BYTE << 7);
}

/* The host writes the epoch, and is not believed: 0 would lose pages, CLAIMED would hang their next user. */
static __always_inline u8 epoch_of(struct quire_table *table)
{
	u8 epoch = READ_ONCE(table->header->epoch);

	return likely((u8)(epoch - 1) < QUIRE_STATE_EPOCH_LAST) ? epoch : QUIRE_STATE_EPOCH_FIRST;
}

/* ---- out of the allocator ---- */

static noinline void take_slowly(struct quire_table *table, u8 *state)
{
	u8 old = READ_ONCE(*state);
	u64 since = 0, lasted, longest;

	while (old) {
		if (old == QUIRE_STATE_CLAIMED) {
			if (!since)
				since = local_clock() | 1;
			cpu_relax();
			old = READ_ONCE(*state);
		} else if (try_cmpxchg(state, &old, QUIRE_STATE_IN_USE)) {
			break;
		}
	}
	if (!since)
		return;
	WRITE_ONCE(table->header->waits, atomic64_inc_return(&waits));
	lasted = local_clock() - since;
	longest = atomic64_read(&longest_wait);
	while ((s64)lasted > (s64)longest && !atomic64_try_cmpxchg(&longest_wait, &longest, lasted))
		;
}

static noinline void take_bytes(struct quire_table *table, u8 *state, unsigned int count)
{
	while (count--)
		take_slowly(table, state++);
}

void quire_take_word(struct quire_table *table, u64 *word)
{
	u64 old = READ_ONCE(*word);

	while (old) {
		if (has_claimed(old)) {
			take_bytes(table, (u8 *)word, sizeof(*word));
			return;
		}
		if (try_cmpxchg(word, &old, 0))
			return;
	}
}

/* Orders 3 and up; gigantic pages that alloc_contig_range() made included, so the end is checked once more. */
static noinline void take_words(struct quire_table *table, unsigned long pfn, unsigned int order)
{
	unsigned long end = min(pfn + (1UL << order), table->page_count);

	for (; pfn < end; pfn += sizeof(u64))
		quire_take_word(table, (u64 *)(table->states + pfn));
}

#define TAKE_NARROW(type)								\
do {											\
	type old = READ_ONCE(*(type *)state);						\
											\
	if (!old)									\
		return;									\
	if (likely(!has_claimed(old) && try_cmpxchg((type *)state, &old, 0)))		\
		return;									\
	take_bytes(table, state, sizeof(type));						\
} while (0)

static __always_inline void take(struct quire_table *table, unsigned long pfn, unsigned int order)
{
	u8 *state;

	if (unlikely(pfn >= table->page_count))
		return;
	state = table->states + pfn;
	if (likely(!order)) {
		u8 old = READ_ONCE(*state);

		if (!old)
			return;
		if (likely(old != QUIRE_STATE_CLAIMED && try_cmpxchg(state, &old, QUIRE_STATE_IN_USE)))
			return;
		take_slowly(table, state);
	} else if (order >= 3) {
		take_words(table, pfn, order);
	} else if (order == 1) {
		TAKE_NARROW(u16);
	} else {
		TAKE_NARROW(u32);
	}
}

/* ---- into the allocator ---- */

/* The page has a mark already. CLAIMED stays: the host is discarding it, which a free page may be. */
static noinline void mark_slowly(u8 *state, unsigned int count, u8 epoch)
{
	for (; count--; state++) {
		u8 old = READ_ONCE(*state);

		while (old != QUIRE_STATE_CLAIMED && !try_cmpxchg(state, &old, epoch))
			;
	}
}

static noinline void mark_words(struct quire_table *table, unsigned long pfn, unsigned int order, u8 epoch)
{
	unsigned long end = min(pfn + (1UL << order), table->page_count);
	u64 marks = epoch * EVERY_BYTE;

	for (; pfn < end; pfn += sizeof(u64)) {
		u64 *word = (u64 *)(table->states + pfn);

		if (likely(!READ_ONCE(*word)))
			WRITE_ONCE(*word, marks);
		else
			mark_slowly((u8 *)word, sizeof(u64), epoch);
	}
}

#define MARK_NARROW(type)								\
do {											\
	if (likely(!READ_ONCE(*(type *)state)))						\
		WRITE_ONCE(*(type *)state, (type)(epoch * EVERY_BYTE));			\
	else										\
		mark_slowly(state, sizeof(type), epoch);				\
} while (0)

/* The buddy allocator's blocks are aligned to their size, so the narrow and word stores are, too. */
static __always_inline void mark(struct quire_table *table, unsigned long pfn, unsigned int order)
{
	u8 *state = table->states + pfn;
	u8 epoch = epoch_of(table);

	if (likely(!order))
		MARK_NARROW(u8);
	else if (order >= 3)
		mark_words(table, pfn, order, epoch);
	else if (order == 1)
		MARK_NARROW(u16);
	else
		MARK_NARROW(u32);
}

/* For the walk of the free lists. */
void quire_mark(struct quire_table *table, unsigned long pfn, unsigned int order)
{
	if (pfn < READ_ONCE(table->mark_limit))
		mark(table, pfn, order);
}

/* ---- the hooks ---- */

#if QUIRE_KERNEL_6_12
/* The whole rest of on_free(), so that the usual way through it needs no stack frame. */
static noinline void mark_unless_skipped(struct quire_table *table, unsigned long pfn, unsigned int order)
{
	if (test_bit(pfn, table->skip) && test_and_clear_bit(pfn, table->skip)) {
		atomic_dec(&table->skips);
		this_cpu_inc(quire_events->compaction_skips);
	} else {
		mark(table, pfn, order);
	}
}
#endif

static void on_free(void *data, struct page *page, unsigned int order)
{
	struct quire_table *table = READ_ONCE(quire_table);
	unsigned long pfn = page_to_pfn(page);

	if (unlikely(pfn >= READ_ONCE(table->mark_limit)))
		return;
#if QUIRE_KERNEL_6_12
	if (unlikely(atomic_read(&table->skips))) {
		mark_unless_skipped(table, pfn, order);
		return;
	}
#endif
	mark(table, pfn, order);
}

static void on_alloc(void *data, struct page *page, unsigned int order, gfp_t gfp, int type)
{
	if (likely(page))
		take(READ_ONCE(quire_table), page_to_pfn(page), order);
}

static void __maybe_unused on_isolate(unsigned long ip, unsigned long parent, struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct page *page = (void *)registers_of(fregs)->di;
	unsigned int order = registers_of(fregs)->si;

	preempt_disable_notrace();
	take(READ_ONCE(quire_table), page_to_pfn(page), order);
	this_cpu_inc(quire_events->isolated);
	preempt_enable_notrace();
}

static void on_putback(unsigned long ip, unsigned long parent, struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct page *page = (void *)registers_of(fregs)->di;
	unsigned int order = registers_of(fregs)->si;
	unsigned long pfn = page_to_pfn(page);
	struct quire_table *table;

	preempt_disable_notrace();
	table = READ_ONCE(quire_table);
	if (pfn < READ_ONCE(table->mark_limit))
		mark(table, pfn, order);
	this_cpu_inc(quire_events->put_back);
	preempt_enable_notrace();
}

#if QUIRE_KERNEL_6_12
static void __maybe_unused on_compaction_free(unsigned long ip, unsigned long parent, struct ftrace_ops *ops,
			       struct ftrace_regs *fregs)
{
	unsigned long pfn = folio_pfn((void *)registers_of(fregs)->di);
	struct quire_table *table;

	preempt_disable_notrace();
	table = READ_ONCE(quire_table);
	/* The count first: a bit that is set is never overlooked by the event that follows in this task. */
	if (pfn < table->page_count) {
		atomic_inc(&table->skips);
		if (test_and_set_bit(pfn, table->skip))
			atomic_dec(&table->skips);
	}
	preempt_enable_notrace();
}
#endif

static unsigned long bulk_wrapper(gfp_t gfp, int node, nodemask_t *nodes, int count, struct list_head *list,
				  struct page **array)
{
	unsigned long got, done = 0;
	struct list_head *at = list;

	this_cpu_inc(bulk_running);
	got = bulk_original(gfp, node, nodes, count, list, array);
	while (done < got) {
		unsigned long stop = min(got, done + BULK_STRIDE);
		struct quire_table *table;

		/* In strides: the table must not be freed under us, and others want to run. */
		preempt_disable_notrace();
		table = READ_ONCE(quire_table);
		for (; done < stop; done++) {
			struct page *page;

			if (list) {
				at = at->next;
				page = list_entry(at, struct page, lru);
			} else {
				page = array[done];
			}
			take(table, page_to_pfn(page), 0);
		}
		preempt_enable_notrace();
	}
	this_cpu_inc(quire_events->bulk_calls);
	this_cpu_add(quire_events->bulk_pages, got);
	this_cpu_dec(bulk_running);
	return got;
}

static void __maybe_unused on_bulk(unsigned long ip, unsigned long parent, struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	/* bulk_wrapper()'s own call goes on to the original. */
	if (!within_module(parent, THIS_MODULE))
		ftrace_regs_set_instruction_pointer(fregs, (unsigned long)bulk_wrapper);
}

/*
 * RECURSION says that a handler may run inside itself; none of them calls anything that leads to a hooked function. With
 * it, ftrace doesn't wrap them in a check that could skip one.
 */
#define HOOK_FLAGS (FTRACE_OPS_FL_PERMANENT | FTRACE_OPS_FL_RECURSION)

static struct hook {
	const char *symbol;
	struct ftrace_ops ops;
	bool installed;
} hooks[] = {
#ifndef QUIRE_CONTROL_NO_ISOLATE
	{ "__isolate_free_page", { .func = on_isolate, .flags = HOOK_FLAGS } },
#endif
	{ "__putback_isolated_page", { .func = on_putback, .flags = HOOK_FLAGS } },
#ifndef QUIRE_CONTROL_NO_BULK
	{ BULK_NAME, { .func = on_bulk, .flags = HOOK_FLAGS | FTRACE_OPS_FL_IPMODIFY } },
#endif
#if QUIRE_KERNEL_6_12 && !defined(QUIRE_CONTROL_NO_COMPACTION)
	{ "compaction_free", { .func = on_compaction_free, .flags = HOOK_FLAGS } },
#endif
};

static struct tracepoint *free_tracepoint, *alloc_tracepoint;
static bool free_installed, alloc_installed;

static void find_tracepoint(struct tracepoint *tracepoint, void *data)
{
	if (!strcmp(tracepoint->name, "mm_page_free"))
		free_tracepoint = tracepoint;
	else if (!strcmp(tracepoint->name, "mm_page_alloc"))
		alloc_tracepoint = tracepoint;
}

static int hook_install(struct hook *hook)
{
	int error = ftrace_set_filter(&hook->ops, (unsigned char *)hook->symbol, strlen(hook->symbol), 1);

	if (error) {
		pr_err("refused: ftrace can't hook %s (error %d): this kernel doesn't have it, or not traceable\n",
		       hook->symbol, error);
		ftrace_free_filter(&hook->ops);
		return error;
	}
	error = register_ftrace_function(&hook->ops);
	if (error) {
		if (error == -EBUSY && (hook->ops.flags & FTRACE_OPS_FL_IPMODIFY))
			pr_err("refused: can't redirect %s: ftrace is off (sysctl kernel.ftrace_enabled), or a live patch redirects it\n",
			       hook->symbol);
		else if (error == -EBUSY)
			pr_err("refused: can't hook %s: ftrace is off (sysctl kernel.ftrace_enabled)\n", hook->symbol);
		else
			pr_err("refused: can't hook %s (error %d)\n", hook->symbol, error);
		ftrace_free_filter(&hook->ops);
		return error;
	}
	hook->installed = true;
	return 0;
}

static long bulk_calls_in_flight(void)
{
	long sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += READ_ONCE(per_cpu(bulk_running, cpu));
	return sum;
}

/*
 * The table is off, so what is missed here or marked late has no consequence. What must be waited for is the module's
 * code: a task can be in bulk_wrapper(), asleep in the original, after the hook is gone.
 *   1. unregister_ftrace_function(): no new task gets there.
 *   2. synchronize_rcu_tasks(): whoever was in a trampoline, or had not counted itself yet, has got on (neither sleeps).
 *   3. No task is counted as being between the wrapper's first and last line. Only decrements happen by now, so a sum
 *      that is not taken at one instant can't be too small.
 *   4. synchronize_rcu_tasks(): whoever had just uncounted itself has returned.
 */
void quire_hooks_remove(void)
{
	int i;

	if (free_installed)
		tracepoint_probe_unregister(free_tracepoint, on_free, NULL);
	if (alloc_installed)
		tracepoint_probe_unregister(alloc_tracepoint, on_alloc, NULL);
	free_installed = alloc_installed = false;
	for (i = ARRAY_SIZE(hooks) - 1; i >= 0; i--) {
		if (!hooks[i].installed)
			continue;
		if (unregister_ftrace_function(&hooks[i].ops))
			pr_err("ftrace would not give up %s\n", hooks[i].symbol);
		ftrace_free_filter(&hooks[i].ops);
		hooks[i].installed = false;
	}
	synchronize_rcu_tasks();
	while (bulk_calls_in_flight())
		schedule_timeout_uninterruptible(1);
	synchronize_rcu_tasks();
	tracepoint_synchronize_unregister();
	free_percpu(quire_events);
	quire_events = NULL;
}

/*
 * quire_table is set, and off. Alloc hooks before the free hook: a page must not get a mark that nothing would take away.
 * The wait between them is for tasks that were in a function when its hook was installed, and so passed it by.
 */
int quire_hooks_install(void)
{
	int error = 0, i;

	quire_events = alloc_percpu(struct quire_events);
	if (!quire_events)
		return -ENOMEM;
	for_each_kernel_tracepoint(find_tracepoint, NULL);
	if (!free_tracepoint || !alloc_tracepoint) {
		pr_err("refused: this kernel has no tracepoint mm_page_free or mm_page_alloc\n");
		error = -EOPNOTSUPP;
		goto fail;
	}
	for (i = 0; i < ARRAY_SIZE(hooks); i++) {
		error = hook_install(&hooks[i]);
		if (error)
			goto fail;
	}
	error = tracepoint_probe_register(alloc_tracepoint, on_alloc, NULL);
	if (error)
		goto fail_tracepoint;
	alloc_installed = true;
	synchronize_rcu_tasks();
	tracepoint_synchronize_unregister();
	error = tracepoint_probe_register(free_tracepoint, on_free, NULL);
	if (error)
		goto fail_tracepoint;
	free_installed = true;
	return 0;

fail_tracepoint:
	pr_err("refused: can't hook the page tracepoints (error %d)\n", error);
fail:
	quire_hooks_remove();
	return error;
}

void quire_wait_figures(u64 *count, u64 *longest_ns)
{
	*count = atomic64_read(&waits);
	*longest_ns = atomic64_read(&longest_wait);
}
