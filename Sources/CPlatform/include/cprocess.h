/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Starting processes, waiting for signals, and locks: what a supervisor needs and Swift cannot import or must not do
 * between fork and exec, where only async-signal-safe calls are allowed.
 */
#ifndef CPROCESS_H
#define CPROCESS_H

#include "cplatform.h"
#include <dirent.h>
#include <stdlib.h>
#include <sys/types.h>

struct cp_spawn_request {
	char *const *argv;       /* argv[0] is looked up in PATH unless it has a slash; NULL-terminated */
	char *const *environment; /* NULL-terminated; NULL: ours */
	const int *from;         /* descriptors of ours ... */
	const int *to;           /* ... and their numbers in the child; distinct */
	int count;
	bool close_others;       /* only 0, 1, 2 and `to` stay open; otherwise also what is not close-on-exec */
	bool own_group;          /* a process group of its own: the terminal's Ctrl-C does not reach it */
	int parent_death_signal; /* 0: the child outlives its parent */
};

char *const *cp_environment(void);

/* Returns 0 and *pid, or an errno (of fork, of a dup, or of exec in the child, which is then gone already). */
int cp_spawn(const struct cp_spawn_request *what, pid_t *pid);

/* A signalfd for `count` signals, which are blocked in the calling thread and in every thread that it starts later. */
int cp_signalfd(const int *signals, int count);
/* The next pending signal of a signalfd, or 0. *from_kernel: a terminal or the kernel sent it, not a process. */
int cp_next_signal(int fd, bool *from_kernel);
/* waitpid. 1: ended, *status is set; 0: still running (only without `block`); -1: errno. */
int cp_reap(pid_t pid, bool block, int *status);
int cp_wait_exit_status(int status);
int cp_wait_signal(int status);                    /* 0: it was not killed by one */
int cp_pidfd(pid_t pid);                           /* close-on-exec; readable once the process has ended */
void cp_ignore_sigpipe(void);

/* Open-file-description locks: they belong to the open file, so a child that inherits the descriptor keeps the lock,
 * and unlike flock they can be tested without being taken. */
int cp_lock_try(int fd);
/* 1: somebody holds it, 0: nobody does, -1: errno. Says 0 on the holder's own open file. */
int cp_lock_test(int fd);
int cp_pipe(int ends[2]);                          /* close-on-exec */
static inline int cp_dup_at_least(int fd, int lowest) { return fcntl(fd, F_DUPFD_CLOEXEC, lowest); }
static inline const char *cp_entry_name(const struct dirent *entry) { return entry->d_name; }

#endif
