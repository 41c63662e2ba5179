/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cguard.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>

enum { PAGE = 4096, MAPPINGS = 4096, RESERVED = 1, SINGLE_PAGES = 64 };

/*
 * The guarded mappings. Without locks, because a signal handler reads it: an entry is free while `end` is 0, and valid
 * while it is more than RESERVED. Whoever faults in a mapping holds it, so its own entry does not change under the
 * handler; those of others may.
 */
static struct guarded {
	uintptr_t start, end;
	struct cp_alarm *alarm;
} mappings[MAPPINGS];

/* What SIGBUS did before. */
static struct sigaction previous;

static struct guarded *find(uintptr_t address)
{
	for (int i = 0; i < MAPPINGS; i++) {
		struct guarded *g = &mappings[i];
		uintptr_t end = __atomic_load_n(&g->end, __ATOMIC_ACQUIRE);
		uintptr_t start = __atomic_load_n(&g->start, __ATOMIC_ACQUIRE);
		/* The second look: start and end are of the same mapping. */
		if (start <= address && address < end && __atomic_load_n(&g->end, __ATOMIC_ACQUIRE) == end) return g;
	}
	return NULL;
}

static bool fill(uintptr_t start, size_t length)
{
	return mmap((void *)start, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
	            -1, 0) != MAP_FAILED;
}

/* Async-signal-safe calls only (mmap is a bare system call on Linux). */
static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)context;
	int saved = errno;
	uintptr_t address = (uintptr_t)info->si_addr;
	struct guarded *g = info->si_code == BUS_ADRERR ? find(address) : NULL;
	if (g) {
		/* One page, because the rest may still be there. All of the mapping when it happens again and again on the same
		 * connection: every page is a mapping of its own, and a process has room for only so many. */
		bool single = __atomic_fetch_add(&g->alarm->raised, 1, __ATOMIC_ACQ_REL) < SINGLE_PAGES;
		if (single ? fill(address & ~(uintptr_t)(PAGE - 1), PAGE) : fill(g->start, g->end - g->start)) {
			shutdown(g->alarm->socket, SHUT_RDWR);
			errno = saved;
			return;
		}
	}
	/* Not ours: what would have happened without us, as soon as this handler returns. */
	sigaction(signal, &previous, NULL);
	raise(signal);
}

static int install_error;
static void install(void)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART };
	sigemptyset(&action.sa_mask);
	install_error = sigaction(SIGBUS, &action, &previous) < 0 ? errno : 0;
}

int cp_guard(void *start, size_t length, struct cp_alarm *alarm)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, install);
	if (install_error) { errno = install_error; return -1; }
	for (int i = 0; i < MAPPINGS; i++) {
		struct guarded *g = &mappings[i];
		uintptr_t expected = 0;
		if (!__atomic_compare_exchange_n(&g->end, &expected, RESERVED, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) continue;
		g->alarm = alarm;
		__atomic_store_n(&g->start, (uintptr_t)start, __ATOMIC_RELEASE);
		__atomic_store_n(&g->end, (uintptr_t)start + length, __ATOMIC_RELEASE);
		return 0;
	}
	errno = ENOMEM;
	return -1;
}

void cp_unguard(void *start)
{
	for (int i = 0; i < MAPPINGS; i++) {
		struct guarded *g = &mappings[i];
		if (__atomic_load_n(&g->end, __ATOMIC_ACQUIRE) > RESERVED
		    && __atomic_load_n(&g->start, __ATOMIC_ACQUIRE) == (uintptr_t)start) {
			__atomic_store_n(&g->end, 0, __ATOMIC_RELEASE);
			return;
		}
	}
}
