/* SPDX-License-Identifier: Apache-2.0 */
#include "include/cterminal.h"
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

static struct termios settings;
/* The other screen, no cursor (xterm's, which all of today's terminals know); and back. */
static const char begin[] = "\033[?1049h\033[?25l", end[] = "\033[?25h\033[?1049l";
static int terminal = -1;
static atomic_bool entered;

int cp_terminal_size(int fd, int *columns, int *rows)
{
	struct winsize size;

	if (ioctl(fd, TIOCGWINSZ, &size) < 0) return -1;
	*columns = size.ws_col;
	*rows = size.ws_row;
	return 0;
}

/* write and tcsetattr are safe in a handler (signal-safety(7)). */
void cp_terminal_leave(void)
{
	int saved = errno;

	if (atomic_exchange(&entered, false)) {
		ssize_t ignored = write(terminal, end, sizeof end - 1);
		(void)ignored;
		tcsetattr(terminal, TCSANOW, &settings);
	}
	errno = saved;
}

static void fault(int number)
{
	cp_terminal_leave();
	/* The handler is gone by now (SA_RESETHAND): this ends the process as it would have ended without us. */
	raise(number);
}

int cp_terminal_enter(int fd)
{
	static const int faults[] = { SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP };
	static bool prepared;
	struct termios raw;

	if (tcgetattr(fd, &settings) < 0) return -1;
	terminal = fd;
	if (!prepared) {
		struct sigaction action = { .sa_handler = fault, .sa_flags = SA_RESETHAND };
		for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigaction(faults[i], &action, NULL);
		atexit(cp_terminal_leave);
		prepared = true;
	}
	raw = settings;
	raw.c_lflag &= ~(tcflag_t)(ECHO | ICANON);
	raw.c_cc[VMIN] = 1;
	raw.c_cc[VTIME] = 0;
	atomic_store(&entered, true);
	if (tcsetattr(fd, TCSANOW, &raw) < 0 || write(fd, begin, sizeof begin - 1) < 0) {
		int code = errno;
		cp_terminal_leave();
		errno = code;
		return -1;
	}
	return 0;
}
