/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Files of others may be truncated while we have them mapped, and touching what was cut off raises SIGBUS, which would
 * end the process. Mappings of such files are guarded: the handler puts a page of zeros of our own where the file has none
 * any more, so that the access goes on, and raises an alarm, so that its owner stops believing what it reads.
 */
#ifndef CGUARD_H
#define CGUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Owned by somebody who keeps it until every mapping that names it is unguarded. */
struct cp_alarm {
	int socket;      /* shut down when the alarm is raised, which wakes whoever waits for it */
	uint32_t raised; /* how often; atomic */
};

/* A mapping of ordinary pages of 4 KiB. -1 with errno if there are too many guarded mappings already, or the handler could
 * not be installed. */
int cp_guard(void *start, size_t length, struct cp_alarm *alarm);
/* Before the memory is unmapped. */
void cp_unguard(void *start);
static inline bool cp_alarm_is_raised(const struct cp_alarm *alarm)
{ return __atomic_load_n(&alarm->raised, __ATOMIC_ACQUIRE) != 0; }

#endif
