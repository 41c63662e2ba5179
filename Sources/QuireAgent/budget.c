// SPDX-License-Identifier: Apache-2.0
/*
 * budget.c - mappings are what merging costs QEMU, and there are only vm.max_map_count of them.
 *
 * An eighth stays in reserve: for QEMU's own, and for the splits on the way of a fold. What was spent is estimated upwards
 * and counted (which reads all of /proc/self/maps) only when the estimate says that merging must stop, or is old.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <time.h>
#include "agent.h"

#define RECOUNT_AFTER_SECONDS 1  /* at the limit */
#define BELIEVE_FOR_SECONDS   60 /* below it: QEMU has mappings of its own */

static _Atomic uint64_t mappings;
static uint64_t maximum = 65530;
static time_t counted;

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
}

bool budget_allows(unsigned more)
{
	time_t age = now() - counted;
	if (age >= BELIEVE_FOR_SECONDS || (mappings + more > budget_limit() && age >= RECOUNT_AFTER_SECONDS))
		budget_recount();
	return mappings + more <= budget_limit();
}

void budget_spend(unsigned more) { mappings += more; }
