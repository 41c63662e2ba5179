// SPDX-License-Identifier: Apache-2.0
/*
 * standin.c - a process that has guest RAM and the agent, as QEMU has, and a guest that verifies what it reads.
 *
 * Threads own pages; each verifies a page before it rewrites it, in one of the ways that QEMU and the kernel touch
 * guest RAM. What they should read stands in a second file, which the test maps too. The test plays the backend on the
 * agent's socket, and tells this program by lines on stdin what to do; every line is answered by one on stdout.
 *
 *   agent-standin SOCKET [key=value]...
 *     fd 3  guest RAM, a memfd; mapped from its first page on
 *     fd 4  struct shared
 *     fd 5  a socket, for passing descriptors (only for `receive`, and `pass` without a number): to the test, which is the backend
 *     pages=N kinds=LETTERS write=N (one in N rounds writes) free=1 (pages are freed, for RESET) table=1 (their states
 *     are in the last page of guest RAM, for RECYCLE; not for m) delay=US (at each place in a window) leave=STEP (leaves that step out) punch_early=1 hang=SECONDS file=PATH (on a disk: for
 *     O_DIRECT) start=0
 *
 *   kinds: c stores  f pread  r preadv  k pipe  s socket  w write from the page into the memfd  m /proc/PID/mem of
 *                    another process
 *          d O_DIRECT pread  D the same past the interposer: what the pin gate is for
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "quire_agent.h"

#define PAGE 4096ul
#define VALUES 8
#define WORKERS 32
#define PAGES 65536

/* What the guest module and the host agree on by, with one epoch. */
enum { IN_USE = 0, FREE = 1, CLAIMED = 0xfe, RECYCLED = 0xff };

/* The test reads it by these offsets: counters at 0, then one byte a page. */
static struct shared {
	_Atomic uint64_t verified, written, lost, stop, ready, forks, reserved[2];
	_Atomic uint64_t progress[WORKERS];
	_Atomic uint8_t value[PAGES];
	_Atomic uint8_t state[PAGES];
} *shared;

static char *guest, *other_guest;
static _Atomic uint8_t *states; /* one a page */
static unsigned usable; /* pages that the guest has for itself */
static unsigned pages = 4096, workers, one_in = 8, hang_seconds = 20;
static bool frees, table;
static const char *kinds = "";
static const char *path;
static pid_t self;
static long delay;
static int leave = -1, punch_early;
static _Atomic int pause_at = -1, paused;
static _Atomic int running;

static void nap(long us)
{
	struct timespec t = { us / 1000000, us % 1000000 * 1000 };
	nanosleep(&t, NULL);
}

/* ---- the agent's windows */

static bool step(enum quire_agent_step step, const struct quire_agent_place *place)
{
	static unsigned seed = 3;
	switch (step) {
	case QUIRE_STEP_ZAPPED:
	case QUIRE_STEP_COMPARED:
	case QUIRE_STEP_PROTECTED:
	case QUIRE_STEP_COPIED:
	case QUIRE_STEP_MAPPED:
	case QUIRE_STEP_EXCHANGE:
	case QUIRE_STEP_EIGHT:
	case QUIRE_STEP_CLAIMED:
	case QUIRE_STEP_PUNCHED:
		if (delay && rand_r(&seed) & 16) nap(delay);
		break;
	default:
		break;
	}
	/* Past the interposer of fallocate, which would wait for the end of this very window. */
	if (step == QUIRE_STEP_MAPPED && punch_early)
		syscall(SYS_fallocate, place->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, place->offset, place->bytes);
	if ((int)step == pause_at) {
		pause_at = -1;
		paused = 1;
		while (paused) nap(1000);
	}
	return (int)step != leave;
}

/* ---- the guest */

static void fill(void *page, int value) { memset(page, value, PAGE); }

static bool is(const void *page, int value)
{
	const volatile uint64_t *words = page;
	uint64_t want = 0x0101010101010101ull * (unsigned)value;
	for (size_t i = 0; i < PAGE / 8; i++)
		if (words[i] != want) return false;
	return true;
}

static void expect(bool good, unsigned page, int value, char kind, const unsigned char *seen)
{
	if (good) return;
	uint64_t n = atomic_fetch_add(&shared->lost, 1);
	if (n >= 3) return;
	fprintf(stderr, "page %u: want %02x, saw %02x..%02x, by '%c'\n", page, value, seen[0], seen[PAGE - 1], kind);
}

static bool through(int in, int out, const void *from, void *to)
{
	return write(in, from, PAGE) == (ssize_t)PAGE && read(out, to, PAGE) == (ssize_t)PAGE;
}

static bool read_memory(int fd, void *to, const void *from)
{
	/* A page in a window is EIO for now. */
	while (!shared->stop)
		if (pread(fd, to, PAGE, (off_t)from) == (ssize_t)PAGE) return true;
	return false;
}

static bool write_memory(int fd, const char *from, const char *to)
{
	for (size_t done = 0; done < PAGE;) {
		ssize_t n = pwrite(fd, from + done, PAGE - done, (off_t)to + (off_t)done);
		if (n > 0) done += (size_t)n;
		else if (shared->stop) return false;
	}
	return true;
}

/* Takes the page if it was freed; what it reads then may be zeros. */
static bool allocate(unsigned page)
{
	uint8_t state = states[page];
	if (state == IN_USE) return true;
	if (state == FREE && atomic_compare_exchange_strong(&states[page], &state, IN_USE)) return true;
	while ((state = states[page]) == CLAIMED)
		if (shared->stop) return false;
	if (state != RECYCLED || !atomic_compare_exchange_strong(&states[page], &state, IN_USE)) return false;
	shared->value[page] = 0;
	return true;
}

static void work(unsigned worker)
{
	char kind = kinds[worker], *buffer = aligned_alloc(PAGE, PAGE);
	unsigned seed = worker * 7919 + 1;
	int pipes[2], sockets[2], patterns = -1, memory = -1;
	char name[64];
	if (pipe(pipes) || socketpair(AF_UNIX, SOCK_STREAM, 0, sockets)) _exit(2);
	if (strchr("frdD", kind)) patterns = open(path, O_RDONLY | (kind == 'd' || kind == 'D' ? O_DIRECT : 0));
	if (kind == 'm') {
		snprintf(name, sizeof name, "/proc/%d/mem", self);
		memory = open(name, O_RDWR);
	}
	if ((strchr("frdD", kind) && patterns < 0) || (kind == 'm' && memory < 0)) {
		fprintf(stderr, "'%c': %s\n", kind, strerror(errno));
		_exit(2);
	}
	while (!shared->stop) {
		unsigned page = (unsigned)rand_r(&seed) % (usable / workers) * workers + worker;
		char *at = guest + page * PAGE;
		struct iovec halves[2] = { { at, PAGE / 2 }, { at + PAGE / 2, PAGE / 2 } };
		shared->progress[worker]++;
		if (frees && !allocate(page)) continue;

		int value = shared->value[page];
		const void *seen = buffer;
		bool read = true;
		switch (kind) {
		case 'k': read = through(pipes[1], pipes[0], at, buffer); break;
		case 's': read = through(sockets[1], sockets[0], at, buffer); break;
		case 'm': read = read_memory(memory, buffer, at); break;
		default: seen = at;
		}
		if (read) expect(is(seen, value), page, value, kind, seen);
		shared->verified++;

		if ((unsigned)rand_r(&seed) % one_in == 0) {
			int next = rand_r(&seed) % VALUES;
			bool written = true;
			off_t offset = next * (off_t)PAGE;
			switch (kind) {
			case 'f':
			case 'd': written = pread(patterns, at, PAGE, offset) == (ssize_t)PAGE; break;
			case 'r': written = preadv(patterns, halves, 2, offset) == (ssize_t)PAGE; break;
			case 'D': {
				long n;
				/* Neither pread nor syscall: both are the interposer's. */
				__asm__ volatile("mov %5, %%r10; syscall"
						 : "=a"(n)
						 : "0"(SYS_pread64), "D"((long)patterns), "S"(at), "d"(PAGE), "r"((long)offset)
						 : "rcx", "r10", "r11", "memory");
				written = n == (long)PAGE;
				break;
			}
			case 'k': fill(buffer, next); written = through(pipes[1], pipes[0], buffer, at); break;
			case 's': fill(buffer, next); written = through(sockets[1], sockets[0], buffer, at); break;
			case 'm': fill(buffer, next); written = write_memory(memory, buffer, at); break;
			case 'w':
				fill(at, next);
				/*
				 * Into a page of its own behind the guest's, with the memfd's inode locked while it
				 * faults. Past the interposer of pwrite, which keeps windows away.
				 */
				written = syscall(SYS_pwrite64, 3, at, PAGE, (pages + worker) * PAGE) == (long)PAGE;
				break;
			default: fill(at, next);
			}
			if (!written) {
				if (!shared->stop) expect(false, page, next, kind, (unsigned char *)at);
				break;
			}
			shared->value[page] = (uint8_t)next;
			shared->written++;
		}
		if (frees && rand_r(&seed) % 4 == 0) states[page] = FREE;
	}
}

static void *worker_thread(void *number)
{
	work((unsigned)(uintptr_t)number);
	running--;
	return NULL;
}

static void say(const char *text)
{
	printf("%s\n", text);
	fflush(stdout);
}

static void *watch(void *nothing)
{
	uint64_t last[WORKERS] = { 0 };
	unsigned still[WORKERS] = { 0 };
	for (;;) {
		nap(250000);
		for (unsigned i = 0; i < workers; i++) {
			uint64_t now = shared->progress[i];
			still[i] = now == last[i] ? still[i] + 1 : 0;
			last[i] = now;
			if (still[i] < hang_seconds * 4 || shared->stop) continue;
			fprintf(stderr, "'%c' makes no progress\n", kinds[i]);
			say("hang");
			_exit(3);
		}
	}
	return nothing;
}

/* Forks now and then, as QEMU does for its scripts: the child is gone at once. */
static void *forker(void *nothing)
{
	while (!shared->stop) {
		pid_t child = fork();
		if (child == 0) _exit(0);
		if (child > 0) waitpid(child, NULL, 0);
		shared->forks++;
		nap(2000);
	}
	return nothing;
}

static void start_guest(void)
{
	pthread_t thread;
	for (unsigned i = 0; i < workers; i++) {
		if (kinds[i] == 'm') {
			/* Another process, without this mapping: the backend. */
			pid_t child = fork();
			if (child == 0) {
				prctl(PR_SET_PDEATHSIG, SIGKILL);
				prctl(PR_SET_NAME, "standin-memory");
				work(i);
				_exit(0);
			}
		} else {
			running++;
			pthread_create(&thread, NULL, worker_thread, (void *)(uintptr_t)i);
		}
	}
	if (workers) pthread_create(&thread, NULL, watch, NULL);
	if (workers) pthread_create(&thread, NULL, forker, NULL);
}

/* All pages as they should be? */
static int finish(void)
{
	shared->stop = 1;
	while (wait(NULL) > 0 || errno == EINTR) { }
	for (int i = 0; running && i < (int)hang_seconds * 1000; i++) nap(1000);
	if (running) {
		say("hang");
		_exit(3);
	}
	for (unsigned i = 0; workers && i < usable; i++) {
		char *at = guest + i * PAGE;
		int value = shared->value[i];
		if (states[i] == IN_USE) expect(is(at, value), i, value, '.', (unsigned char *)at);
	}
	printf("%s\n", shared->lost ? "lost" : "good");
	fflush(stdout);
	return shared->lost ? 1 : 0;
}

/* ---- descriptors */

static int pass(int socket, int fd)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control = { .header = { .cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
	struct iovec part = { "x", 1 };
	struct msghdr m = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
	return (int)sendmsg(socket, &m, 0);
}

static int receive(int socket)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	char byte;
	int fd = -1;
	struct iovec part = { &byte, 1 };
	struct msghdr m = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	if (recvmsg(socket, &m, 0) > 0 && m.msg_controllen) memcpy(&fd, CMSG_DATA(&control.header), sizeof fd);
	return fd;
}

static int failing(long result) { return result < 0 ? -errno : (int)result; }

/* Somebody who is no backend: takes guest RAM, and looks at once at what is there. */
struct stranger {
	int end;
	long page;
	int seen;
};

static void *be_stranger(void *pointer)
{
	struct stranger *me = pointer;
	unsigned char byte;
	int fd = receive(me->end);
	me->seen = fd >= 0 && pread(fd, &byte, 1, me->page * (off_t)PAGE) == 1 ? byte : -EIO;
	return NULL;
}

/* The first byte of the page, as the stranger finds it. The connection stays. */
static int pass_to_stranger(long page)
{
	int ends[2];
	pthread_t thread;
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends)) return -errno;
	struct stranger stranger = { .end = ends[1], .page = page };
	pthread_create(&thread, NULL, be_stranger, &stranger);
	int result = failing(pass(ends[0], 3));
	if (result < 0) shutdown(ends[0], SHUT_RDWR);
	pthread_join(thread, NULL);
	return result < 0 ? result : stranger.seen;
}

/* A listener in a process of its own: its number. Who connects is served here, whether that lives or not. */
static int listener = -1, served = -1;
static int listen_apart(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	socklen_t size = sizeof(int);
	int listens = 0;
	listener = socket(AF_UNIX, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&address, sizeof address.sun_family)) return -errno;
	pid_t child = fork();
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (listen(listener, 1) == 0) pause();
		_exit(1);
	}
	for (int i = 0; child > 0 && !listens && i < 50000; i++) {
		if (getsockopt(listener, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size)) return -errno;
		nap(100);
	}
	return failing(child);
}

static int end_listener(pid_t child) { return kill(child, SIGKILL) || waitpid(child, NULL, 0) != child ? -errno : 0; }

/* Our end of a connection to it. */
static int connect_apart(void)
{
	struct sockaddr_un address;
	socklen_t size = sizeof address;
	int end = socket(AF_UNIX, SOCK_STREAM, 0);
	if (getsockname(listener, (struct sockaddr *)&address, &size)) return -errno;
	if (connect(end, (struct sockaddr *)&address, size)) return -errno;
	served = accept(listener, NULL, NULL);
	return served < 0 ? -errno : end;
}

/* To one whose listener is dead, as when it was told to daemonize, or when libvirt has listened for it. */
static int pass_to_orphan(void)
{
	int child = listen_apart(), ended = child < 0 ? child : end_listener(child), end = ended < 0 ? ended : connect_apart();
	return end < 0 ? end : failing(pass(end, 3));
}

/* Room for so many descriptors more; negative: for as many as at first. */
static int limit_descriptors(long more)
{
	static rlim_t first;
	struct rlimit limit;
	int next = dup(0); /* the lowest that is free */
	syscall(SYS_close, next);
	if (getrlimit(RLIMIT_NOFILE, &limit)) return -errno;
	if (!first) first = limit.rlim_cur;
	limit.rlim_cur = more < 0 ? first : (rlim_t)(next + more);
	return failing(setrlimit(RLIMIT_NOFILE, &limit));
}

/* A file system of one empty file, which is never in the page cache. */
static void serve_fuse(int fuse)
{
	static char request[1 << 17];
	while (read(fuse, request, sizeof request) > 0) {
		struct fuse_in_header *in = (struct fuse_in_header *)request;
		struct fuse_out_header out = { .unique = in->unique };
		struct fuse_init_out init = { .major = FUSE_KERNEL_VERSION, .minor = 31, .max_write = PAGE };
		struct fuse_attr_out attributes = { .attr = { .ino = 1, .mode = S_IFREG | 0644, .nlink = 1 } };
		struct fuse_open_out opened = { .open_flags = FOPEN_DIRECT_IO };
		struct iovec parts[2] = { { &out, sizeof out }, { NULL, 0 } };
		switch (in->opcode) {
		case FUSE_INIT: parts[1] = (struct iovec){ &init, sizeof init }; break;
		case FUSE_GETATTR: parts[1] = (struct iovec){ &attributes, sizeof attributes }; break;
		case FUSE_OPEN: parts[1] = (struct iovec){ &opened, sizeof opened }; break;
		case FUSE_RELEASE: break;
		default: out.error = -ENOSYS;
		}
		out.len = (uint32_t)(sizeof out + parts[1].iov_len);
		if (writev(fuse, parts, 2) < 0) break;
	}
}

/* Opens that file, mounted on another. */
static int open_fuse(const char *place)
{
	char options[64];
	int fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	close(open(place, O_WRONLY | O_CREAT, 0600));
	snprintf(options, sizeof options, "fd=%d,rootmode=%o,user_id=0,group_id=0", fuse, S_IFREG);
	if (mount("quire", place, "fuse", 0, options)) return -errno;
	pid_t server = fork();
	if (server == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		serve_fuse(fuse);
		_exit(0);
	}
	close(fuse);
	return failing(open(place, O_RDONLY));
}

/* All the mappings that there are: every other page of a reservation, until it fails. */
static int spend_mappings(bool one_more)
{
	char *room = mmap(NULL, 1ul << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int count = 0;
	if (room == MAP_FAILED) return -errno;
	while (count < 100000 && mprotect(room + (2 * count + 1) * PAGE, PAGE, PROT_READ) == 0) count++;
	/* mmap is refused only above the limit: one may be had when nothing can be split any more. */
	if (one_more) mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return count;
}

/* Another thread obeys, which can be paused; `join` has its answer. */
static int obey(const char *line);
static pthread_t apart;
static void *obey_apart(void *order) { return (void *)(intptr_t)obey(order); }

static int begin_apart(const char *line)
{
	static char order[512];
	const char *space = strchr(line, ' ');
	snprintf(order, sizeof order, "%s", space ? space + 1 : "");
	return -pthread_create(&apart, NULL, obey_apart, order);
}

static int join(void)
{
	void *answer;
	int error = pthread_join(apart, &answer);
	return error ? -error : (int)(intptr_t)answer;
}

/* Answers with a number: a result, or a negative errno. */
static int obey(const char *line)
{
	char word[32], text[256] = "";
	long a = 0, b = 0;
	sscanf(line, "%31s %ld %ld", word, &a, &b);
	sscanf(line, "%*s %255s", text);
#define IS(name) (!strcmp(word, name))
	if (IS("start")) return quire_agent_start(text);
	if (IS("guest")) { start_guest(); return 0; }
	if (IS("pause")) { pause_at = (int)a; return 0; }
	if (IS("paused")) { for (int i = 0; !paused && i < 5000; i++) nap(1000); return paused; }
	if (IS("go")) { pause_at = -1; paused = 0; return 0; }
	if (IS("delay")) { delay = a; return 0; }
	if (IS("fill")) { fill(guest + a * (long)PAGE, (int)b); return 0; }
	if (IS("is")) return is(guest + a * (long)PAGE, (int)b);
	if (IS("byte")) return (unsigned char)guest[a * (long)PAGE];
	if (IS("punch")) return failing(fallocate(3, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, a, b));
	if (IS("dontneed")) return failing(madvise(guest + a, (size_t)b, MADV_DONTNEED));
	if (IS("remove")) return failing(madvise(guest + a, (size_t)b, MADV_REMOVE));
	if (IS("map")) {
		other_guest = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, (int)a, 0);
		return other_guest == MAP_FAILED ? -errno : 0;
	}
	if (IS("use")) { guest = other_guest; return 0; }
	if (IS("munmap")) return failing(munmap(guest + a, (size_t)b));
	if (IS("direct")) return failing(open(text, O_RDONLY | O_DIRECT));
	if (IS("open")) return failing(open(text, O_RDONLY));
	if (IS("close")) return failing(close((int)a));
	if (IS("setfl")) return failing(fcntl((int)a, F_SETFL, b ? O_DIRECT : 0));
	if (IS("pass")) return failing(pass(a ? (int)a : 5, 3));
	if (IS("stranger")) return pass_to_stranger(a);
	if (IS("orphan")) return pass_to_orphan();
	if (IS("listen")) return listen_apart();
	if (IS("end")) return end_listener((pid_t)a);
	if (IS("connect")) return connect_apart();
	if (IS("hang_up")) return failing(close(served));
	if (IS("apart")) return begin_apart(line);
	if (IS("join")) return join();
	if (IS("dup")) return failing(dup((int)a));
	if (IS("limit")) return limit_descriptors(a);
	if (IS("fuse")) return open_fuse(text);
	if (IS("spend")) return spend_mappings(a);
	if (IS("receive")) return receive(5);
	/* Their arguments are nonsense: what counts is that they were tried. */
	if (IS("io_submit")) { syscall(SYS_io_submit, 0, 0, 0); return 0; }
	if (IS("uring_enter")) { syscall(SYS_io_uring_enter, -1, 1, 0, 0, 0, 0); return 0; }
	if (IS("uring_buffers")) { syscall(SYS_io_uring_register, -1, 0, 0, 0); return 0; }
	if (IS("uring_poll")) { syscall(SYS_io_uring_enter, -1, 0, 0, 0, 0, 0); return 0; }
	return -ENOSYS;
}

int main(int count, char **arguments)
{
	if (count < 2) return 2;
	bool start = true;
	for (int i = 2; i < count; i++) {
		char *value = strchr(arguments[i], '=');
		if (!value) return 2;
		*value++ = 0;
		const char *key = arguments[i];
		if (!strcmp(key, "pages")) pages = (unsigned)atoi(value);
		else if (!strcmp(key, "kinds")) kinds = value;
		else if (!strcmp(key, "write")) one_in = (unsigned)atoi(value);
		else if (!strcmp(key, "free")) frees = atoi(value);
		else if (!strcmp(key, "table")) table = atoi(value);
		else if (!strcmp(key, "delay")) delay = atol(value);
		else if (!strcmp(key, "leave")) leave = atoi(value);
		else if (!strcmp(key, "punch_early")) punch_early = atoi(value);
		else if (!strcmp(key, "hang")) hang_seconds = (unsigned)atoi(value);
		else if (!strcmp(key, "file")) path = value;
		else if (!strcmp(key, "start")) start = atoi(value);
		else return 2;
	}
	self = getpid();
	workers = (unsigned)strlen(kinds);
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, 4, 0);
	/* As QEMU maps it: a reservation, then the file over it, then advice. */
	size_t bytes = pages * PAGE, huge = 2ul << 20;
	char *room = mmap(NULL, bytes + 2 * huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	guest = (char *)(((uintptr_t)room + huge - 1) & ~(huge - 1)) + 4 * PAGE;
	guest = mmap(guest, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, 3, 0);
	if (guest == MAP_FAILED || shared == MAP_FAILED || workers > WORKERS || pages > 1u << 20) return 2;
	madvise(guest, bytes, MADV_HUGEPAGE);
	madvise(guest, bytes, MADV_DONTFORK);
	madvise(guest, bytes, MADV_MERGEABLE);
	usable = table ? pages - 1 : pages;
	states = table ? (_Atomic uint8_t *)(guest + usable * PAGE) : shared->state;
	if (workers)
		for (unsigned i = 0; i < usable; i++) {
			shared->value[i] = (uint8_t)(i / 3 % VALUES);
			fill(guest + i * PAGE, shared->value[i]);
		}
	if (path) {
		int fd = open(path, O_WRONLY | O_CREAT, 0600);
		static char page[PAGE];
		for (int value = 0; value < VALUES; value++) {
			fill(page, value);
			if (pwrite(fd, page, PAGE, value * (off_t)PAGE) < 0) return 2;
		}
		fsync(fd);
		close(fd);
	}
	quire_agent_test_step = step;
	if (start && quire_agent_start(arguments[1])) return 2;
	if (workers) start_guest();
	shared->ready = 1;

	static char line[512];
	while (fgets(line, sizeof line, stdin) && strncmp(line, "stop", 4)) {
		printf("%d\n", obey(line));
		fflush(stdout);
	}
	_exit(finish());
}
