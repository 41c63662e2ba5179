// SPDX-License-Identifier: GPL-2.0-only
/*
 * main.c - loads, unloads, and switches the table off whenever the hooks can't be trusted or the host must not look.
 *
 * Everything in the life of the machine that could make the table lie comes down to one thing: a reason to hold it. While
 * there is any reason, the table is off (all zeros, nobody marks); when the last one goes, it is switched on, which marks
 * from scratch what is free by then.
 *
 *   LOADING    until every hook and every notifier is in place
 *   CPU        a CPU is between offline and online. Tracepoints do nothing on it, but it allocates. Two hotplug states
 *              enclose that time: PREPARE_DYN is the first to run when a CPU comes, and the last when it goes;
 *              ONLINE_DYN runs on the CPU while it is online
 *   MEMORY     memory is coming that the table has no states for; until a larger table replaces it
 *   PM         suspend, hibernation: the image that is written holds a table without marks, and is read back by a
 *              machine whose memory the host knows nothing about. Also unregistered
 *   SHUTDOWN   reboot, halt, kexec. Also unregistered, and for kexec we wait for that, however long it takes: the next
 *              kernel knows nothing of us, puts its own data where the table is, and only resets the control disk later
 *   UNLOADING  rmmod
 *
 * A panic may come at any time, on any CPU, so it has a way of its own that needs no lock (quire_table_stop_in_panic()).
 * kexec with preserve_context sends no notification, but resets the control disk (device suspend) and takes the CPUs
 * offline, and either would do.
 *
 * Memory that goes offline: its pages leave the free lists without a hook and nobody frees them afterwards, so clearing
 * their states when they are gone is enough; until then they are free, and discarding them is right.
 *
 * Locks. The gate (a mutex) guards the reasons and switching. It is taken inside CPU and memory hotplug's own locks, so
 * nothing that is done under it may take those: no tracepoint or ftrace registration, no I/O.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cc_platform.h>
#include <linux/cpuhotplug.h>
#include <linux/cpu.h>
#include <linux/cpumask.h>
#include <linux/delay.h>
#include <linux/memory.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/panic_notifier.h>
#include <linux/reboot.h>
#include <linux/suspend.h>
#include <linux/workqueue.h>
#include <xen/xen.h>
#include "quire.h"

#define UNREGISTER_PATIENCE (10 * HZ)

static char *control = "";
module_param(control, charp, 0444);
MODULE_PARM_DESC(control, "the control disk, for example /dev/vdb (default: look at /dev/vda to /dev/vdz)");

enum hold { HOLD_LOADING, HOLD_CPU, HOLD_MEMORY, HOLD_PM, HOLD_SHUTDOWN, HOLD_UNLOADING };

static const char *const hold_names[] = { "loading", "cpu", "memory", "pm", "shutdown", "unloading" };

static DEFINE_MUTEX(gate);
static unsigned long holds = BIT(HOLD_LOADING);
static struct cpumask cpus_between;        /* set and cleared, not counted: a callback that is repeated does no harm */
static unsigned int memory_busy;           /* announcements of new memory that have not ended */
static unsigned long memory_generation;    /* counts those events */
static bool loaded;                        /* memory events may replace the table */

static enum cpuhp_state cpu_prepare, cpu_online_state;

void quire_gate_lock(void)
{
	mutex_lock(&gate);
}

void quire_gate_unlock(void)
{
	mutex_unlock(&gate);
}

/* Caller: holds the gate. */
const char *quire_hold_names(void)
{
	static char text[64];
	size_t used = 0;
	int i;

	strscpy(text, "-", sizeof(text));
	for_each_set_bit(i, &holds, ARRAY_SIZE(hold_names))
		used += scnprintf(text + used, sizeof(text) - used, "%s%s", used ? "," : "", hold_names[i]);
	return text;
}

/* Both: the caller holds the gate. hold() returns with the table off. */
static void hold(enum hold reason)
{
	if (!holds && quire_table)
		quire_table_stop(quire_table);
	holds |= BIT(reason);
}

static void release(enum hold reason)
{
	unsigned long before = holds;

	holds &= ~BIT(reason);
	if (before && !holds)
		quire_table_start(quire_table);
}

static void hold_for(enum hold reason)
{
	mutex_lock(&gate);
	hold(reason);
	mutex_unlock(&gate);
}

static void release_from(enum hold reason)
{
	mutex_lock(&gate);
	release(reason);
	mutex_unlock(&gate);
}

/* ---- CPUs ---- */

static int cpu_leaves_certainty(unsigned int cpu)
{
	mutex_lock(&gate);
	cpumask_set_cpu(cpu, &cpus_between);
	hold(HOLD_CPU);
	mutex_unlock(&gate);
	return 0;
}

static int cpu_is_certain(unsigned int cpu)
{
	mutex_lock(&gate);
	cpumask_clear_cpu(cpu, &cpus_between);
	if (cpumask_empty(&cpus_between))
		release(HOLD_CPU);
	mutex_unlock(&gate);
	return 0;
}

/* Both states at once, or a CPU could come in between, through one of them only. */
static int cpu_states_install(void)
{
	int error;

	cpus_read_lock();
	error = cpuhp_setup_state_nocalls_cpuslocked(CPUHP_BP_PREPARE_DYN, "quire:prepare", cpu_leaves_certainty,
						     cpu_is_certain);
	if (error >= 0) {
		cpu_prepare = error;
		error = cpuhp_setup_state_nocalls_cpuslocked(CPUHP_AP_ONLINE_DYN, "quire:online", cpu_is_certain,
							     cpu_leaves_certainty);
		if (error >= 0)
			cpu_online_state = error;
		else
			__cpuhp_remove_state_cpuslocked(cpu_prepare, false);
	}
	cpus_read_unlock();
	return error < 0 ? error : 0;
}

static void cpu_states_remove(void)
{
	cpus_read_lock();
	__cpuhp_remove_state_cpuslocked(cpu_online_state, false);
	__cpuhp_remove_state_cpuslocked(cpu_prepare, false);
	cpus_read_unlock();
}

/* ---- memory ---- */

/*
 * On the control workqueue: the old table must not be freed before the host has let go of it. Tasks that are between
 * compaction_free()'s entry and its free event may have left their bit in the old table: marking waits until they are
 * through.
 */
static void rebuild_run(struct work_struct *work)
{
	unsigned long generation;
	struct quire_table *table, *old;
	bool again, talk;

	do {
		mutex_lock(&gate);
		generation = memory_generation;
		again = loaded && !memory_busy && (holds & BIT(HOLD_MEMORY));
		mutex_unlock(&gate);
		if (!again)
			return;

		quire_control_unregister();
		table = quire_table_create(quire_control_period_ms());
		if (!table || table->page_count > quire_control_max_pages()) {
			pr_err("no table for the memory that was added (%s): nothing is recycled until the module is loaded again\n",
			       table ? "the host doesn't take one as large" : "out of memory");
			quire_table_destroy(table);
			return;
		}
		mutex_lock(&gate);
		old = quire_table;
		WRITE_ONCE(quire_table, table);
		mutex_unlock(&gate);
		synchronize_rcu();
		synchronize_rcu_tasks();
		if (quire_control_host_may_use_table())
			pr_warn("the host didn't let go of the old table: leaking %zu bytes\n", old->metadata_bytes);
		else
			quire_table_destroy(old);

		mutex_lock(&gate);
		again = memory_generation != generation;
		if (!again)
			release(HOLD_MEMORY);
		talk = !(holds & (BIT(HOLD_PM) | BIT(HOLD_SHUTDOWN) | BIT(HOLD_UNLOADING)));
		mutex_unlock(&gate);
	} while (again);
	if (talk && !quire_control_register(table))
		pr_info("a table for %lu pages replaces the old one\n", table->page_count);
}

static DECLARE_WORK(rebuild, rebuild_run);

static int on_memory(struct notifier_block *block, unsigned long event, void *data)
{
	struct memory_notify *range = data;

	mutex_lock(&gate);
	switch (event) {
	case MEM_GOING_ONLINE:
		memory_generation++;
		memory_busy++;
		if (!quire_table_covers(quire_table, range->start_pfn, range->nr_pages))
			hold(HOLD_MEMORY);
		break;
	case MEM_ONLINE:
	case MEM_CANCEL_ONLINE:
		memory_generation++;
		if (memory_busy)
			memory_busy--;
		if ((holds & BIT(HOLD_MEMORY)) && loaded)
			quire_control_schedule(&rebuild);
		break;
	case MEM_OFFLINE:
		if (quire_table)
			quire_table_clear(quire_table, range->start_pfn, range->nr_pages);
		break;
	}
	mutex_unlock(&gate);
	return NOTIFY_OK;
}

static struct notifier_block memory_notifier = { .notifier_call = on_memory };

/* ---- suspend, hibernation, shutdown, panic ---- */

/*
 * Tells the host to leave the table alone. False: it may use it now, or later. Where the disk is being unplugged it is not later than
 * what comes next, for suspend and shutdown of devices wait for each other's removal.
 */
static bool host_is_off(void)
{
	int error = quire_control_set(false, UNREGISTER_PATIENCE);

	return !error || quire_control_disk_is_gone() || (error != -ETIMEDOUT && !quire_control_host_may_use_table());
}

static int on_pm(struct notifier_block *block, unsigned long event, void *data)
{
	switch (event) {
	case PM_HIBERNATION_PREPARE:
	case PM_SUSPEND_PREPARE:
	case PM_RESTORE_PREPARE:
		hold_for(HOLD_PM);
		if (!host_is_off()) {
			pr_err("the control disk doesn't answer: no suspend now\n");
			quire_control_set(true, 0);
			release_from(HOLD_PM);
			return notifier_from_errno(-EBUSY);
		}
		break;
	case PM_POST_HIBERNATION:
	case PM_POST_SUSPEND:
	case PM_POST_RESTORE:
		release_from(HOLD_PM);
		quire_control_set(true, 0);
		break;
	}
	return NOTIFY_OK;
}

static struct notifier_block pm_notifier = { .notifier_call = on_pm };

static int on_shutdown(struct notifier_block *block, unsigned long action, void *command)
{
	bool kexec = action == SYS_RESTART && command && !strcmp(command, "kexec reboot");

	hold_for(HOLD_SHUTDOWN);
	while (!host_is_off()) {
		pr_emerg_ratelimited("the control disk doesn't answer%s\n",
			 kexec ? ": kexec waits for it, or the host would write into the next kernel" : "");
		if (!kexec)
			break;
		/* Any other error than a time-out is there at once. */
		msleep(100);
	}
	/* Should the host still have it, it must not find a table there when it looks again. */
	mutex_lock(&gate);
	memset(quire_table->header->magic, 0, sizeof(quire_table->header->magic));
	mutex_unlock(&gate);
	return NOTIFY_OK;
}

/* Before everybody else: drivers flush and save at shutdown, and we have nothing to wait for. */
static struct notifier_block shutdown_notifier = { .notifier_call = on_shutdown, .priority = INT_MAX };

static int on_panic(struct notifier_block *block, unsigned long event, void *data)
{
	quire_table_stop_in_panic(quire_table);
	return NOTIFY_DONE;
}

static struct notifier_block panic_notifier = { .notifier_call = on_panic, .priority = INT_MAX };

/* ---- load and unload ---- */

/* A discarded page reads as zeros, at a page's granularity, at any time while it is free. Who can't live with that? */
static int check_kernel(void)
{
	const char *reason = NULL;

	if (IS_ENABLED(CONFIG_KASAN) || IS_ENABLED(CONFIG_KMSAN))
		reason = "KASAN or KMSAN checks the content of free pages";
	else if (IS_ENABLED(CONFIG_PREEMPT_RT))
		reason = "PREEMPT_RT: the page allocator's locks don't keep preemption off";
	else if (page_poisoning_enabled_static())
		reason = "page_poison=1 expects its pattern in free pages";
	else if (debug_pagealloc_enabled())
		reason = "debug_pagealloc=on unmaps free pages";
	else if (xen_domain())
		reason = "a Xen domain's page numbers are not the host's";
	else if (cc_platform_has(CC_ATTR_GUEST_MEM_ENCRYPT))
		reason = "encrypted memory (SEV, TDX) doesn't read as zeros when it was discarded";
	else if (!IS_ENABLED(CONFIG_DYNAMIC_FTRACE_WITH_ARGS))
		reason = "the kernel lacks CONFIG_DYNAMIC_FTRACE_WITH_ARGS";
	if (!reason)
		return 0;
	pr_err("refused: %s\n", reason);
	return -EOPNOTSUPP;
}

static void notifiers_remove(void)
{
	atomic_notifier_chain_unregister(&panic_notifier_list, &panic_notifier);
	unregister_reboot_notifier(&shutdown_notifier);
	unregister_pm_notifier(&pm_notifier);
}

static int notifiers_install(void)
{
	int error = register_pm_notifier(&pm_notifier);

	if (!error)
		error = register_reboot_notifier(&shutdown_notifier);
	if (!error)
		error = atomic_notifier_chain_register(&panic_notifier_list, &panic_notifier);
	if (error)
		notifiers_remove();        /* the ones that are not there say so, and no more */
	return error;
}

static void table_free(void)
{
	if (quire_control_host_may_use_table())
		pr_warn("the host didn't let go of the table: leaking %zu bytes\n", quire_table->metadata_bytes);
	else
		quire_table_destroy(quire_table);
}

static int __init quire_init(void)
{
	struct quire_table *table;
	int error = check_kernel();

	if (error)
		return error;
	error = quire_control_open(control);
	if (error)
		return error;
	error = register_memory_notifier(&memory_notifier);
	if (error)
		goto no_notifier;

	table = quire_table_create(quire_control_period_ms());
	error = -ENOMEM;
	if (!table) {
		pr_err("refused: no memory for the table\n");
		goto no_table;
	}
	mutex_lock(&gate);
	quire_table = table;
	mutex_unlock(&gate);
	error = -EFBIG;
	if (table->page_count > quire_control_max_pages()) {
		pr_err("refused: the host takes tables of up to %llu pages, this machine needs %lu\n",
		       quire_control_max_pages(), table->page_count);
		goto no_hooks;
	}
	error = quire_hooks_install();
	if (error)
		goto no_hooks;
	error = cpu_states_install();
	if (error)
		goto no_cpu_states;
	error = notifiers_install();
	if (error)
		goto no_notifiers;

	release_from(HOLD_LOADING);
	error = quire_control_set(true, MAX_SCHEDULE_TIMEOUT);
	if (error) {
		pr_err("refused by the host (error %d)\n", error);
		goto not_registered;
	}
	quire_debugfs_create();
	quire_control_watch(true);
	mutex_lock(&gate);
	loaded = true;
	if (holds & BIT(HOLD_MEMORY))
		quire_control_schedule(&rebuild);
	mutex_unlock(&gate);
	pr_info("%s: a table for %lu pages, %zu bytes, is registered\n", QUIRE_VERSION, table->page_count,
		table->metadata_bytes);
	return 0;

not_registered:
	hold_for(HOLD_UNLOADING);
	quire_control_set(false, MAX_SCHEDULE_TIMEOUT);
	notifiers_remove();
no_notifiers:
	cpu_states_remove();
no_cpu_states:
	quire_hooks_remove();
no_hooks:
no_table:
	unregister_memory_notifier(&memory_notifier);
no_notifier:
	quire_control_close();
	if (quire_table)
		table_free();
	return error;
}

/*
 * From the first line on the table is off for good; the rest takes down what nobody needs any more. Waiting for the host
 * to acknowledge lasts for as long as its backend is away.
 */
static void __exit quire_exit(void)
{
	hold_for(HOLD_UNLOADING);
	quire_debugfs_remove();
	unregister_memory_notifier(&memory_notifier);
	cancel_work_sync(&rebuild);
	notifiers_remove();
	quire_control_watch(false);
	quire_control_set(false, MAX_SCHEDULE_TIMEOUT);
	cpu_states_remove();
	quire_hooks_remove();
	quire_control_close();
	table_free();
}

module_init(quire_init);
module_exit(quire_exit);

/* For the checker in the project's tests, which compares the table with the free lists. */
struct quire_table *quire_test_table(void)
{
	return quire_table;
}
EXPORT_SYMBOL_NS_GPL(quire_test_table, QUIRE_TEST);

MODULE_DESCRIPTION("Gives the host the pages that this guest has freed");
MODULE_AUTHOR("The Quire project");
MODULE_VERSION(QUIRE_VERSION);
MODULE_LICENSE("GPL");
