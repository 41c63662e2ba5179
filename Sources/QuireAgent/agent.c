// SPDX-License-Identifier: Apache-2.0
/*
 * agent.c - the constructor, the thread, the connection.
 *
 * In a process that isn't QEMU, or that no socket was named to, the constructor returns and nothing else ever happens.
 * In QEMU the thread is started by the first madvise. QEMU calls it on memory that it has just allocated: by then it
 * has daemonized, if it does. Guest RAM may not be mapped yet; an attach is refused until it is, and tried again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include "agent.h"
#include "sys.h"

static char socket_path[sizeof((struct sockaddr_un *)0)->sun_path];
static pthread_mutex_t window = PTHREAD_MUTEX_INITIALIZER;
static _Atomic unsigned window_waiters;
static _Atomic int owner;      /* the process that this is about; 0: none */
static _Atomic bool started;
static int wakeup = -1;

bool agent_is_here(void)
{
	int pid = atomic_load_explicit(&owner, memory_order_relaxed);
	return pid && pid == sys3(SYS_getpid, 0, 0, 0);
}

void agent_lock(sigset_t *old)
{
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, old);
	atomic_fetch_add(&window_waiters, 1);
	pthread_mutex_lock(&window);
	atomic_fetch_sub(&window_waiters, 1);
}

void agent_unlock(const sigset_t *old)
{
	pthread_mutex_unlock(&window);
	/* The agent comes back at once, and a mutex isn't fair. */
	if (atomic_load(&window_waiters)) sys_nap(50);
	pthread_sigmask(SIG_SETMASK, old, NULL);
}

void agent_wake(void)
{
	uint64_t one = 1;
	if (wakeup >= 0) sys3(SYS_write, wakeup, (long)&one, sizeof one);
}

static int connect_backend(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	memcpy(address.sun_path, socket_path, sizeof socket_path);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0) return -1;
	if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0) return fd;
	sys3(SYS_close, fd, 0, 0);
	return -1;
}

static void serve(int fd)
{
	struct connection connection;
	connection_begin(&connection, fd);
	struct pollfd events[2] = { { .fd = fd, .events = POLLIN }, { .fd = wakeup, .events = POLLIN } };
	for (bool open = true; open;) {
		/* A gate that is closed may open by itself: calls return, a process dies, a descriptor goes with a thread. */
		int patience = !connection.attached || !gate_closed() ? -1 : gate_suspects(GATE_STARTING) ? 20 : 5000;
		int n = poll(events, 2, patience);
		if (n < 0) continue;
		if (events[1].revents) {
			uint64_t count;
			sys3(SYS_read, wakeup, (long)&count, sizeof count);
		}
		if (n == 0 || events[1].revents) {
			gate_refresh(true);
			open = connection_tell_gate(&connection);
		}
		if (events[0].revents) open = open && connection_serve(&connection);
	}
	sys3(SYS_close, fd, 0, 0);
}

static void *run(void *nothing)
{
	pthread_setname_np(pthread_self(), "quire-agent");
	for (long wait = 10000;; wait = wait < 500000 ? wait * 2 : 1000000) {
		int fd = connect_backend();
		if (fd >= 0) {
			serve(fd);
			wait = 10000;
		}
		sys_nap(wait);
	}
	return nothing;
}

static void in_child(void)
{
	/* A QEMU that daemonizes goes on in a child. With guest RAM there is none that goes on: RAM isn't inherited. */
	if (atomic_load(&started)) atomic_store(&owner, 0);
	else if (atomic_load(&owner)) atomic_store(&owner, (int)sys3(SYS_getpid, 0, 0, 0));
}

static void begin(const char *path)
{
	strncpy(socket_path, path, sizeof socket_path - 1);
	interpose_resolve();
	pthread_atfork(NULL, NULL, in_child);
	atomic_store(&owner, (int)sys3(SYS_getpid, 0, 0, 0));
}

static int start(void)
{
	bool first = false;
	if (!atomic_compare_exchange_strong(&started, &first, true)) return 0;
	pthread_t thread;
	pthread_attr_t attributes;
	sigset_t all, old;
	wakeup = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (wakeup < 0) return errno;
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, 256 << 10);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int error = pthread_create(&thread, &attributes, run, NULL);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attributes);
	return error;
}

void agent_start_in_qemu(void)
{
	if (atomic_load_explicit(&owner, memory_order_relaxed) && !atomic_load_explicit(&started, memory_order_relaxed)
	    && agent_is_here())
		start();
}

int quire_agent_start(const char *path)
{
	if (strlen(path) >= sizeof socket_path) return ENAMETOOLONG;
	begin(path);
	return start();
}

__attribute__((constructor)) static void construct(void)
{
	char exe[4096];
	const char *path = getenv("QUIRE_AGENT_SOCKET");
	ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
	if (!path || !*path || n <= 0) return;
	exe[n] = 0;
	const char *slash = strrchr(exe, '/');
	if (strncmp(slash ? slash + 1 : exe, "qemu-system", 11) || strlen(path) >= sizeof socket_path) return;
	begin(path);
}
