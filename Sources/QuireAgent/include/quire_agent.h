/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a program that links the agent (the tests' stand-in for QEMU) may call. libquire-agent.so exports none of it:
 * there the constructor does everything.
 */
#ifndef QUIRE_AGENT_H
#define QUIRE_AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Starts the agent's thread in this process, QEMU or not. 0 or an errno. */
int quire_agent_start(const char *socket_path);

/* The steps of a window, in their order. See window.c. */
enum quire_agent_step {
	/* merge and zero */
	QUIRE_STEP_REGISTER_MINOR,
	QUIRE_STEP_ZAPPED,           /* a place to wait, not a step */
	QUIRE_STEP_COMPARED,         /* a place */
	QUIRE_STEP_MAPPED,           /* a place */
	QUIRE_STEP_WAKE,
	QUIRE_STEP_PUNCH,
	QUIRE_STEP_UNREGISTER,       /* of an abort */
	/* fold */
	QUIRE_STEP_PROTECT,
	QUIRE_STEP_PROTECTED,        /* a place */
	QUIRE_STEP_COPIED,           /* a place */
	QUIRE_STEP_FOLDED,           /* a place */
	QUIRE_STEP_FOLD_WAKE,
	/* reset */
	QUIRE_STEP_RESET,            /* a place */
	/* recycle */
	QUIRE_STEP_EXCHANGE,         /* left out: claims by a plain store */
	QUIRE_STEP_EIGHT,            /* the same of eight pages at once, after the look at them */
	QUIRE_STEP_CLAIMED,          /* a place */
	QUIRE_STEP_RECYCLE_PUNCH,
	QUIRE_STEP_PUNCHED,          /* a place */
	/* the pin gate */
	QUIRE_STEP_SUSPECTED,        /* a place: it has been told of a reason; on the thread that has, before that goes on */
};

struct quire_agent_place {
	void *address;
	size_t bytes;
	int file;
	uint64_t offset;
};

/*
 * For tests: called at every step of every window, on the thread that opens it, and of the gate; it may take its time.
 * False leaves the step out, which is how a test shows that it would notice. NULL, as in QEMU, where nobody can set it:
 * every step is taken.
 */
extern bool (*quire_agent_test_step)(enum quire_agent_step, const struct quire_agent_place *);

#endif
