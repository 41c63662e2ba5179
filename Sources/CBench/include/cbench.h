/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a benchmark reads of the machine and Swift cannot import: the time stamp counter and the cycle counter.
 */
#ifndef CBENCH_H
#define CBENCH_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <linux/perf_event.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static inline uint64_t cb_tsc(void) { return __builtin_ia32_rdtsc(); }

/* A counter of CPU cycles, user and kernel, of the calling thread and of the threads that it starts from now on.
 * -1 with errno where the machine counts none (many virtual machines) or does not let us. */
static inline int cb_open_cycles(void)
{
	struct perf_event_attr what;
	memset(&what, 0, sizeof what);
	what.size = sizeof what;
	what.type = PERF_TYPE_HARDWARE;
	what.config = PERF_COUNT_HW_CPU_CYCLES;
	what.inherit = 1;
	return (int)syscall(SYS_perf_event_open, &what, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
}

/* The clock of all CPU time of a process, as clock_getcpuclockid() makes it. */
static inline clockid_t cb_cpu_clock(pid_t pid)
{
	clockid_t clock = -1;
	return clock_getcpuclockid(pid, &clock) ? -1 : clock;
}

#endif
