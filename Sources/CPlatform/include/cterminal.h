/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A terminal that is drawn on, and that gets its settings back however the process ends: by leaving, by exit(3), or by a
 * fault. Nothing can do so for SIGKILL. One terminal a process.
 */
#ifndef CTERMINAL_H
#define CTERMINAL_H

/* Columns and rows; -1 if fd is no terminal. */
int cp_terminal_size(int fd, int *columns, int *rows);
/* A screen of its own without a cursor, no echo, keys at once; Ctrl-C and Ctrl-Z are signals as before. 0, or -1 with
 * errno. */
int cp_terminal_enter(int fd);
/* Does nothing if it was left already. Safe in a signal handler. */
void cp_terminal_leave(void);

#endif
