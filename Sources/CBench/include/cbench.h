/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a benchmark reads of the machine and Swift cannot import: the time stamp counter and the cycle counter. And what
 * a guest would do with its memory, page by page.
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

/* Guest RAM, mapped as QEMU maps it: a file, or (-1) private memory that KSM may merge. NULL with errno. */
void *cb_map_guest(int file, uint64_t bytes, int huge);

/* Writes pages `first` and up through the mapping, each with the content that its number says; 0: zeros. */
void cb_fill(void *memory, const uint64_t *contents, uint64_t first, uint64_t pages);
/* How many of them do not hold what they should. */
uint64_t cb_wrong_pages(const void *memory, const uint64_t *contents, uint64_t first, uint64_t pages);

/* Reads a byte of each page that `numbers` names. */
void cb_read_pages(const void *memory, const uint64_t *numbers, uint64_t first, uint64_t count);
/* Writes a byte to each; in place of its number then stands how many ticks of the time stamp counter that took. */
void cb_write_pages(void *memory, uint64_t *numbers, uint64_t first, uint64_t count);

#endif
