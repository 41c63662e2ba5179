/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cprocess.h"
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>

char *const *cp_environment(void) { return environ; }
int cp_wait_exit_status(int status) { return WEXITSTATUS(status); }
int cp_wait_signal(int status) { return WIFSIGNALED(status) ? WTERMSIG(status) : 0; }
void cp_ignore_sigpipe(void) { signal(SIGPIPE, SIG_IGN); }

int cp_lock_try(int fd)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	return fcntl(fd, F_OFD_SETLK, &l);
}

int cp_lock_test(int fd)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	if (fcntl(fd, F_OFD_GETLK, &l) < 0) return -1;
	return l.l_type != F_UNLCK;
}

int cp_pipe(int ends[2]) { return pipe2(ends, O_CLOEXEC); }

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
int cp_pidfd(pid_t pid) { return (int)syscall(SYS_pidfd_open, pid, 0); }

#ifndef SYS_close_range
#define SYS_close_range 436
#endif

static void close_between(unsigned first, unsigned last)
{
	if (first > last) return;
	if (syscall(SYS_close_range, first, last, 0) == 0) return;
	/* Linux before 5.9. */
	struct rlimit limit;
	unsigned end = getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < 65536 ? (unsigned)limit.rlim_cur : 65536;
	for (unsigned fd = first; fd <= last && fd < end; fd++) close((int)fd);
}

static bool is_kept(const struct cp_spawn_request *what, int fd, int report)
{
	if (fd <= 2 || fd == report) return true;
	for (int i = 0; i < what->count; i++)
		if (what->to[i] == fd) return true;
	return false;
}

static void fail(int report)
{
	int code = errno;
	(void)!write(report, &code, sizeof code);
	_exit(127);
}

/* Runs in the child of a process that may have threads: async-signal-safe calls only, no allocation. */
static void child(const struct cp_spawn_request *what, int report, pid_t parent)
{
	int highest = 2;
	for (int i = 0; i < what->count; i++)
		if (what->to[i] > highest) highest = what->to[i];
	/* First everything out of the way of the target numbers, then to its place: no order of the two lists can clobber. */
	report = fcntl(report, F_DUPFD_CLOEXEC, highest + 1);
	if (report < 0) _exit(127);
	int moved[64];
	for (int i = 0; i < what->count; i++)
		if ((moved[i] = fcntl(what->from[i], F_DUPFD_CLOEXEC, highest + 1)) < 0) fail(report);
	for (int i = 0; i < what->count; i++)
		if (dup2(moved[i], what->to[i]) < 0) fail(report);
	if (what->close_others) {
		int start = 3;
		for (int fd = 3; fd <= highest; fd++)
			if (is_kept(what, fd, report)) {
				close_between((unsigned)start, (unsigned)fd - 1);
				start = fd + 1;
			}
		if (start < report) close_between((unsigned)start, (unsigned)report - 1);
		close_between((unsigned)report + 1, ~0u);
	}
	if (what->own_group) {
		setpgid(0, 0);
		/* It writes to the terminal from the background: `stty tostop` must not stop it. */
		signal(SIGTTOU, SIG_IGN);
	}
	if (what->parent_death_signal) {
		prctl(PR_SET_PDEATHSIG, what->parent_death_signal);
		if (getppid() != parent) _exit(127);
	}
	/* Handlers go by exec; what our own parent ignores (nohup) stays ignored; SIGPIPE is what we ignore ourselves. */
	signal(SIGPIPE, SIG_DFL);
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execvpe(what->argv[0], what->argv, what->environment ? what->environment : environ);
	fail(report);
}

int cp_spawn(const struct cp_spawn_request *what, pid_t *pid)
{
	int ends[2];
	if (what->count > 64) return E2BIG;
	if (pipe2(ends, O_CLOEXEC) < 0) return errno;
	/* No handler may run in the child before exec. */
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	pid_t parent = getpid();
	*pid = fork();
	int code = errno;
	if (*pid == 0) {
		close(ends[0]);
		child(what, ends[1], parent);
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	close(ends[1]);
	if (*pid < 0) {
		close(ends[0]);
		return code;
	}
	/* exec closes the pipe: end of file means that the new program runs. */
	ssize_t n;
	do n = read(ends[0], &code, sizeof code); while (n < 0 && errno == EINTR);
	close(ends[0]);
	if (n != (ssize_t)sizeof code) return 0;
	while (waitpid(*pid, NULL, 0) < 0 && errno == EINTR) { }
	return code;
}

int cp_signalfd(const int *signals, int count)
{
	sigset_t set;
	sigemptyset(&set);
	for (int i = 0; i < count; i++) sigaddset(&set, signals[i]);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

int cp_next_signal(int fd, bool *from_kernel)
{
	struct signalfd_siginfo info;
	if (read(fd, &info, sizeof info) != (ssize_t)sizeof info) return 0;
	*from_kernel = info.ssi_code == SI_KERNEL;
	return (int)info.ssi_signo;
}

int cp_reap(pid_t pid, bool block, int *status)
{
	for (;;) {
		pid_t got = waitpid(pid, status, block ? 0 : WNOHANG);
		if (got == pid) return 1;
		if (got == 0) return 0;
		if (errno != EINTR) return -1;
	}
}
