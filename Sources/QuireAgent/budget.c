// SPDX-License-Identifier: Apache-2.0
/*
 * budget.c - mappings are what merging costs QEMU, and there are only vm.max_map_count of them.
 *
 * An eighth stays in reserve: for QEMU's own, and for the splits on the way of a fold. What was spent is estimated
 * upwards and counted (which reads all of /proc/self/maps) only when the estimate says that merging must stop, or is
 * old.
 *
 * QEMU may use up that eighth and the rest. Then not even a mapping that replaces another is to be had (mmap fails
 * above the limit before it looks at what it would replace), and merged pages could not be brought back. For that there
 * is ballast: some mappings of nothing, which the agent gives up when it needs mappings most, and takes again when
 * there are enough.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include "agent.h"
#include "sys.h"

#define BALLAST_MAPPINGS 64u

#define RECOUNT_AFTER_SECONDS 1  /* at the limit */
#define BELIEVE_FOR_SECONDS   60 /* below it: QEMU has mappings of its own */

static _Atomic uint64_t mappings;
static uint64_t maximum = 65530;
static time_t counted;
static void *_Atomic ballast;

static time_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec;
}

uint64_t budget_maximum(void)
{
	FILE *file = fopen("/proc/sys/vm/max_map_count", "re");
	unsigned long long value;
	if (file && fscanf(file, "%llu", &value) == 1) maximum = value;
	if (file) fclose(file);
	return maximum;
}

uint64_t budget_limit(void) { return maximum - maximum / 8; }
uint64_t budget_mappings(void) { return mappings; }

void budget_recount(void)
{
	budget_maximum();
	mappings = ram_count_mappings();
	counted = now();
	if (mappings <= budget_limit()) budget_keep_ballast();
}

void budget_keep_ballast(void)
{
	size_t bytes = BALLAST_MAPPINGS * PAGE;
	if (atomic_load(&ballast)) return;
	void *room = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room == MAP_FAILED) return;
	/* Every other page readable: what differs doesn't join. */
	for (unsigned i = 1; i < BALLAST_MAPPINGS; i += 2) mprotect((char *)room + i * PAGE, PAGE, PROT_READ);
	atomic_store(&ballast, room);
}

bool budget_drop_ballast(void)
{
	void *room = atomic_exchange(&ballast, NULL);
	return room && sys3(SYS_munmap, (long)room, BALLAST_MAPPINGS * PAGE, 0) == 0;
}

bool budget_allows(unsigned more)
{
	time_t age = now() - counted;
	if (age >= BELIEVE_FOR_SECONDS || (mappings + more > budget_limit() && age >= RECOUNT_AFTER_SECONDS))
		budget_recount();
	return mappings + more <= budget_limit();
}

void budget_spend(unsigned more) { mappings += more; }
