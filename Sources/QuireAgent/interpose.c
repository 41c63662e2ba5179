// SPDX-License-Identifier: Apache-2.0
/*
 * interpose.c - the calls of QEMU that the agent must know of, in the thread that makes them.
 *
 *   may pin guest RAM          pread and its like: hold the range lock while the call runs
 *   may begin what pins        open, dup, fcntl, ioctl, io_submit, io_uring, syscall; descriptors that arrive: the pin gate
 *   gives guest RAM away       sendmsg: the pin gate; merged pages are brought back first, or the call fails (gate.c)
 *   discards guest RAM         fallocate, madvise: merged pages are mapped back first, or the call would discard
 *                              nothing (a hole in a memfd that isn't mapped here), or fail
 *   unmaps guest RAM           munmap: no window there ever again
 *
 * They do nothing where no agent is: another program, a child of QEMU that has yet to exec. They allocate nothing, and
 * take no lock but the window lock, with signals blocked, where something changes that is rare.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <scsi/sg.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include "agent.h"
#include "sys.h"

#undef open
#undef openat
#undef fcntl
#undef fallocate
#undef pread
#undef pwrite
#undef preadv
#undef pwritev

#define EXPORT __attribute__((visibility("default")))

/*
 * The functions as they were before us, each looked up once. A thread that comes before the constructor looks for
 * itself, and finds the same.
 */
static inline void *find(void *_Atomic *slot, const char *name)
{
	void *found = atomic_load_explicit(slot, memory_order_relaxed);
	if (found) return found;
	found = dlsym(RTLD_NEXT, name);
	atomic_store_explicit(slot, found, memory_order_relaxed);
	return found;
}
#define SLOT(name) static void *_Atomic slot_##name
#define REAL(name) ((__typeof__(&name))find(&slot_##name, #name))

/* ---- I/O that may pin */

/* Guest pages that a call holds; where it has more ranges than fit, the last covers all of the rest. */
#define HELD_MAX 256
struct held {
	struct ram_table *table;
	unsigned count;
	struct {
		uint64_t gfn, pages;
	} ranges[HELD_MAX];
};

/* Locks are counted, so that two ranges under the same lock do no harm. */
static void add_range(struct held *held, uint64_t gfn, uint64_t pages)
{
	if (held->count < HELD_MAX) {
		held->ranges[held->count].gfn = gfn;
		held->ranges[held->count++].pages = pages;
		return;
	}
	uint64_t begin = held->ranges[HELD_MAX - 1].gfn, end = begin + held->ranges[HELD_MAX - 1].pages;
	if (gfn < begin) begin = gfn;
	if (gfn + pages > end) end = gfn + pages;
	held->ranges[HELD_MAX - 1].gfn = begin;
	held->ranges[HELD_MAX - 1].pages = end - begin;
}

static void add_buffer(struct held *held, uintptr_t address, size_t bytes)
{
	uint64_t gfn, pages;
	const struct ram *ram;
	while ((ram = ram_of_addresses(held->table, address, bytes, &gfn, &pages))) {
		add_range(held, gfn, pages);
		uintptr_t end = (uintptr_t)ram->address + (gfn + pages - ram->gfn) * PAGE;
		if (end >= address + bytes) break;
		bytes -= end - address;
		address = end;
	}
}

/*
 * A call that may pin is counted in the table that it looked at, so that the agent can tell when all of those that
 * didn't know of a region are over. That is every call on guest RAM, and every one on an O_DIRECT file: its buffer may
 * be guest RAM that is attached later. And every one without a file, which discards.
 */
static void hold(struct held *held, int fd, const struct iovec *parts, int count)
{
	held->count = 0;
	if (!agent_is_here()) {
		held->table = NULL;
		return;
	}
	for (;;) {
		held->table = atomic_load(&ram_now);
		atomic_fetch_add(&held->table->calls, 1);
		if (held->table == atomic_load(&ram_now)) break;
		atomic_fetch_sub(&held->table->calls, 1);
	}
	if (held->table->count)
		for (int i = 0; i < count; i++) add_buffer(held, (uintptr_t)parts[i].iov_base, parts[i].iov_len);
	if (held->count == 0 && fd >= 0 && !gate_is_direct(fd)) {
		atomic_fetch_sub(&held->table->calls, 1);
		held->table = NULL;
	}
	for (unsigned i = 0; i < held->count; i++) lock_begin_io(held->ranges[i].gfn, held->ranges[i].pages);
}

static void let_go(struct held *held)
{
	if (!held->table) return;
	for (unsigned i = 0; i < held->count; i++) lock_end_io(held->ranges[i].gfn, held->ranges[i].pages);
	atomic_fetch_sub(&held->table->calls, 1);
}

#define HOLDING(result_type, fd, parts, count, call)                                                            \
	struct held held;                                                                                       \
	hold(&held, fd, parts, count);                                                                          \
	result_type result = call;                                                                              \
	let_go(&held);                                                                                          \
	return result

#define INTERPOSE_BUFFER(name, pointer, offset_type)                                                            \
	SLOT(name);                                                                                             \
	EXPORT ssize_t name(int fd, pointer buffer, size_t bytes, offset_type offset)                           \
	{                                                                                                       \
		struct iovec part = { (void *)buffer, bytes };                                                  \
		HOLDING(ssize_t, fd, &part, 1, REAL(name)(fd, buffer, bytes, offset));                          \
	}

#define INTERPOSE_PARTS(name, offset_type)                                                                      \
	SLOT(name);                                                                                             \
	EXPORT ssize_t name(int fd, const struct iovec *parts, int count, offset_type offset)                   \
	{                                                                                                       \
		HOLDING(ssize_t, fd, parts, count, REAL(name)(fd, parts, count, offset));                       \
	}

#define INTERPOSE_PARTS2(name, offset_type)                                                                     \
	SLOT(name);                                                                                             \
	EXPORT ssize_t name(int fd, const struct iovec *parts, int count, offset_type offset, int flags)        \
	{                                                                                                       \
		HOLDING(ssize_t, fd, parts, count, REAL(name)(fd, parts, count, offset, flags));                \
	}

INTERPOSE_BUFFER(pread, void *, off_t)
INTERPOSE_BUFFER(pread64, void *, off64_t)
INTERPOSE_BUFFER(pwrite, const void *, off_t)
INTERPOSE_BUFFER(pwrite64, const void *, off64_t)
INTERPOSE_PARTS(preadv, off_t)
INTERPOSE_PARTS(preadv64, off64_t)
INTERPOSE_PARTS(pwritev, off_t)
INTERPOSE_PARTS(pwritev64, off64_t)
INTERPOSE_PARTS2(preadv2, off_t)
INTERPOSE_PARTS2(preadv64v2, off64_t)
INTERPOSE_PARTS2(pwritev2, off_t)
INTERPOSE_PARTS2(pwritev64v2, off64_t)

/* These block for ever on a socket or an eventfd: they hold nothing unless the file is one that can pin. */
static bool is_direct(int fd)
{
	return gate_suspects(GATE_DIRECT) && agent_is_here() && gate_is_direct(fd);
}

SLOT(read);
EXPORT ssize_t read(int fd, void *buffer, size_t bytes)
{
	if (!is_direct(fd)) return REAL(read)(fd, buffer, bytes);
	struct iovec part = { buffer, bytes };
	HOLDING(ssize_t, fd, &part, 1, REAL(read)(fd, buffer, bytes));
}

SLOT(write);
EXPORT ssize_t write(int fd, const void *buffer, size_t bytes)
{
	if (!is_direct(fd)) return REAL(write)(fd, buffer, bytes);
	struct iovec part = { (void *)buffer, bytes };
	HOLDING(ssize_t, fd, &part, 1, REAL(write)(fd, buffer, bytes));
}

SLOT(readv);
EXPORT ssize_t readv(int fd, const struct iovec *parts, int count)
{
	if (!is_direct(fd)) return REAL(readv)(fd, parts, count);
	HOLDING(ssize_t, fd, parts, count, REAL(readv)(fd, parts, count));
}

SLOT(writev);
EXPORT ssize_t writev(int fd, const struct iovec *parts, int count)
{
	if (!is_direct(fd)) return REAL(writev)(fd, parts, count);
	HOLDING(ssize_t, fd, parts, count, REAL(writev)(fd, parts, count));
}

/* ---- descriptors that may pin */

/* Of a descriptor that was just opened: nobody else knows its number yet. */
static int opened(int fd)
{
	if (fd >= 0 && agent_is_here()) {
		int saved = errno;
		gate_suspect_descriptor(fd);
		errno = saved;
	}
	return fd;
}

#define MODE_OF(flags)                                                                                          \
	mode_t mode = 0;                                                                                        \
	if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) {                                          \
		va_list list;                                                                                   \
		va_start(list, flags);                                                                          \
		mode = va_arg(list, mode_t);                                                                    \
		va_end(list);                                                                                   \
	}

#define INTERPOSE_OPEN(name)                                                                                    \
	SLOT(name);                                                                                             \
	EXPORT int name(const char *path, int flags, ...)                                                       \
	{                                                                                                       \
		MODE_OF(flags)                                                                                  \
		return opened(REAL(name)(path, flags, mode));                                                   \
	}

#define INTERPOSE_OPENAT(name)                                                                                  \
	SLOT(name);                                                                                             \
	EXPORT int name(int folder, const char *path, int flags, ...)                                           \
	{                                                                                                       \
		MODE_OF(flags)                                                                                  \
		return opened(REAL(name)(folder, path, flags, mode));                                           \
	}

INTERPOSE_OPEN(open)
INTERPOSE_OPEN(open64)
INTERPOSE_OPENAT(openat)
INTERPOSE_OPENAT(openat64)

/* What they become with _FORTIFY_SOURCE. */
#define INTERPOSE_OPEN_2(name)                                                                                  \
	int name(const char *path, int flags);                                                                  \
	SLOT(name);                                                                                             \
	EXPORT int name(const char *path, int flags) { return opened(REAL(name)(path, flags)); }

#define INTERPOSE_OPENAT_2(name)                                                                                \
	int name(int folder, const char *path, int flags);                                                      \
	SLOT(name);                                                                                             \
	EXPORT int name(int folder, const char *path, int flags) { return opened(REAL(name)(folder, path, flags)); }

INTERPOSE_OPEN_2(__open_2)
INTERPOSE_OPEN_2(__open64_2)
INTERPOSE_OPENAT_2(__openat_2)
INTERPOSE_OPENAT_2(__openat64_2)

SLOT(close);
EXPORT int close(int fd)
{
	int result = REAL(close)(fd);
	gate_look_again();
	return result;
}

/* Whoever looks at every descriptor from the lowest on sees neither, if the one is closed that it has yet to come to. */
#define INTERPOSE_DUP(name, parameters, arguments)                                                              \
	SLOT(name);                                                                                             \
	EXPORT int name parameters { return opened(REAL(name)arguments); }

INTERPOSE_DUP(dup, (int fd), (fd))
INTERPOSE_DUP(dup2, (int fd, int to), (fd, to))
INTERPOSE_DUP(dup3, (int fd, int to, int flags), (fd, to, flags))

/*
 * O_DIRECT by F_SETFL: a suspicion before, because the descriptor is in use; and after, because the agent may have looked at it
 * in between.
 */
static long argument_of_fcntl(int fd, int command, long argument)
{
	if (command == F_SETFL && argument & O_DIRECT && agent_is_here()) {
		struct stat s;
		if (fstat(fd, &s) == 0 && (S_ISREG(s.st_mode) || S_ISBLK(s.st_mode))) gate_suspect(GATE_DIRECT);
	}
	return argument;
}

#define INTERPOSE_FCNTL(name)                                                                                   \
	SLOT(name);                                                                                             \
	EXPORT int name(int fd, int command, ...)                                                               \
	{                                                                                                       \
		va_list list;                                                                                   \
		va_start(list, command);                                                                        \
		long argument = argument_of_fcntl(fd, command, va_arg(list, long));                             \
		va_end(list);                                                                                   \
		int result = REAL(name)(fd, command, argument);                                                 \
		if (command == F_DUPFD || command == F_DUPFD_CLOEXEC) return opened(result);                    \
		if (command == F_SETFL && argument & O_DIRECT) opened(fd);                                      \
		else if (command == F_SETFL) gate_look_again();                                                 \
		return result;                                                                                  \
	}

INTERPOSE_FCNTL(fcntl)
INTERPOSE_FCNTL(fcntl64)

#define EACH_DESCRIPTOR(message, fd, body)                                                                      \
	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR((struct msghdr *)(message), c)) {   \
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;                        \
		for (size_t at = CMSG_LEN(0); at + sizeof(int) <= c->cmsg_len; at += sizeof(int)) {             \
			int fd;                                                                                 \
			memcpy(&fd, (char *)c + at, sizeof fd);                                                 \
			body;                                                                                   \
		}                                                                                               \
	}

SLOT(recvmsg);
EXPORT ssize_t recvmsg(int socket, struct msghdr *message, int flags)
{
	ssize_t n = REAL(recvmsg)(socket, message, flags);
	if (n >= 0 && message->msg_controllen && agent_is_here()) EACH_DESCRIPTOR(message, fd, opened(fd));
	return n;
}

SLOT(sendmsg);
EXPORT ssize_t sendmsg(int socket, const struct msghdr *message, int flags)
{
	bool safe = true;
	if (message->msg_controllen && agent_is_here()) EACH_DESCRIPTOR(message, fd, safe = safe && gate_passed(socket, fd));
	if (!safe) {
		/* The device does not start. */
		errno = EBUSY;
		return -1;
	}
	return REAL(sendmsg)(socket, message, flags);
}

/* ---- asynchronous I/O */

struct iocb;
int io_submit(void *context, long count, struct iocb **blocks);
SLOT(io_submit);
EXPORT int io_submit(void *context, long count, struct iocb **blocks)
{
	gate_suspect(GATE_NATIVE_AIO);
	return REAL(io_submit)(context, count, blocks);
}

/*
 * liburing's ring as far as it is needed: what waits to be submitted. QEMU polls its descriptors by io_uring as well as
 * it does I/O, so not every use is one that may pin.
 */
struct io_uring {
	unsigned *head, *tail, *mask, *entries, *flags, *dropped, *array;
	struct io_uring_sqe *sqes;
	unsigned sqe_head, sqe_tail;
};

static bool transfers(const struct io_uring *ring)
{
	for (unsigned i = ring->sqe_head; i != ring->sqe_tail; i++) {
		switch (ring->sqes[i & *ring->mask].opcode) {
		case IORING_OP_NOP:
		case IORING_OP_POLL_ADD:
		case IORING_OP_POLL_REMOVE:
		case IORING_OP_TIMEOUT:
		case IORING_OP_TIMEOUT_REMOVE:
		case IORING_OP_ASYNC_CANCEL:
			break;
		default:
			return true;
		}
	}
	return false;
}

static void before_submit(const struct io_uring *ring)
{
	if (!gate_suspects(GATE_URING) && transfers(ring)) gate_suspect(GATE_URING);
}

#define INTERPOSE_SUBMIT(name, parameters, arguments)                                                           \
	int name parameters;                                                                                    \
	SLOT(name);                                                                                             \
	EXPORT int name parameters                                                                              \
	{                                                                                                       \
		before_submit(ring);                                                                            \
		return REAL(name)arguments;                                                                     \
	}

struct io_uring_cqe;
INTERPOSE_SUBMIT(io_uring_submit, (struct io_uring *ring), (ring))
INTERPOSE_SUBMIT(io_uring_submit_and_wait, (struct io_uring *ring, unsigned wait), (ring, wait))
INTERPOSE_SUBMIT(io_uring_submit_and_get_events, (struct io_uring *ring), (ring))
INTERPOSE_SUBMIT(io_uring_submit_and_wait_timeout,
		 (struct io_uring *ring, struct io_uring_cqe **cqe, unsigned wait, void *timeout, sigset_t *mask),
		 (ring, cqe, wait, timeout, mask))
INTERPOSE_SUBMIT(io_uring_wait_cqes,
		 (struct io_uring *ring, struct io_uring_cqe **cqe, unsigned wait, void *timeout, sigset_t *mask),
		 (ring, cqe, wait, timeout, mask))
INTERPOSE_SUBMIT(io_uring_wait_cqe_timeout, (struct io_uring *ring, struct io_uring_cqe **cqe, void *timeout),
		 (ring, cqe, timeout))

/* Entries of another size than `transfers` knows, or a kernel thread that takes them by itself: in doubt, transfers. */
static void before_setup(unsigned flags)
{
	if (flags & ~(unsigned)(IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | IORING_SETUP_ATTACH_WQ | IORING_SETUP_IOPOLL
				| 1u << 8 /* COOP_TASKRUN */ | 1u << 9 /* TASKRUN_FLAG */ | 1u << 12 /* SINGLE_ISSUER */
				| 1u << 13 /* DEFER_TASKRUN */))
		gate_suspect(GATE_URING);
}

int io_uring_queue_init(unsigned entries, struct io_uring *ring, unsigned flags);
SLOT(io_uring_queue_init);
EXPORT int io_uring_queue_init(unsigned entries, struct io_uring *ring, unsigned flags)
{
	before_setup(flags);
	return REAL(io_uring_queue_init)(entries, ring, flags);
}

int io_uring_queue_init_params(unsigned entries, struct io_uring *ring, struct io_uring_params *p);
SLOT(io_uring_queue_init_params);
EXPORT int io_uring_queue_init_params(unsigned entries, struct io_uring *ring, struct io_uring_params *p)
{
	before_setup(p->flags);
	return REAL(io_uring_queue_init_params)(entries, ring, p);
}

#define INTERPOSE_BUFFERS(name, parameters, arguments)                                                          \
	int name parameters;                                                                                    \
	SLOT(name);                                                                                             \
	EXPORT int name parameters                                                                              \
	{                                                                                                       \
		gate_suspect(GATE_FIXED_BUFFERS);                                                               \
		return REAL(name)arguments;                                                                     \
	}

INTERPOSE_BUFFERS(io_uring_register_buffers, (struct io_uring *ring, const struct iovec *parts, unsigned count),
		  (ring, parts, count))
INTERPOSE_BUFFERS(io_uring_register_buffers_tags,
		  (struct io_uring *ring, const struct iovec *parts, const uint64_t *tags, unsigned count),
		  (ring, parts, tags, count))
INTERPOSE_BUFFERS(io_uring_register_buffers_sparse, (struct io_uring *ring, unsigned count), (ring, count))
INTERPOSE_BUFFERS(io_uring_register_buffers_update_tag,
		  (struct io_uring *ring, unsigned at, const struct iovec *parts, const uint64_t *tags, unsigned count),
		  (ring, at, parts, tags, count))

/* libblkio, which registers guest RAM with io_uring, or maps it for a device. */
struct blkio;
struct blkio_mem_region;
INTERPOSE_BUFFERS(blkio_map_mem_region, (struct blkio *b, const struct blkio_mem_region *region), (b, region))

static void before_register(unsigned operation)
{
	/* IORING_REGISTER_BUFFERS, _BUFFERS2, _BUFFERS_UPDATE, _CLONE_BUFFERS; bit 31 says how the ring is named. */
	operation &= ~(1u << 31);
	if (operation == 0 || operation == 15 || operation == 16 || operation == 30) gate_suspect(GATE_FIXED_BUFFERS);
}

int io_uring_enter(unsigned fd, unsigned submit, unsigned wait, unsigned flags, sigset_t *mask);
SLOT(io_uring_enter);
EXPORT int io_uring_enter(unsigned fd, unsigned submit, unsigned wait, unsigned flags, sigset_t *mask)
{
	if (submit) gate_suspect(GATE_URING);
	return REAL(io_uring_enter)(fd, submit, wait, flags, mask);
}

int io_uring_enter2(unsigned fd, unsigned submit, unsigned wait, unsigned flags, void *argument, size_t size);
SLOT(io_uring_enter2);
EXPORT int io_uring_enter2(unsigned fd, unsigned submit, unsigned wait, unsigned flags, void *argument, size_t size)
{
	if (submit) gate_suspect(GATE_URING);
	return REAL(io_uring_enter2)(fd, submit, wait, flags, argument, size);
}

int io_uring_register(unsigned fd, unsigned operation, const void *argument, unsigned count);
SLOT(io_uring_register);
EXPORT int io_uring_register(unsigned fd, unsigned operation, const void *argument, unsigned count)
{
	before_register(operation);
	return REAL(io_uring_register)(fd, operation, argument, count);
}

SLOT(syscall);
EXPORT long syscall(long number, ...)
{
	long a[6];
	va_list list;
	va_start(list, number);
	for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
	va_end(list);
	switch (number) {
	case SYS_io_submit:
		gate_suspect(GATE_NATIVE_AIO);
		break;
	case SYS_io_uring_setup:
		/* A ring that polls its own queue never enters the kernel again. */
		if (a[1]) before_setup(((struct io_uring_params *)a[1])->flags);
		break;
	case SYS_io_uring_enter:
		if (a[1]) gate_suspect(GATE_URING);
		break;
	case SYS_io_uring_register:
		before_register((unsigned)a[1]);
		break;
	}
	long result = REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (number == SYS_open || number == SYS_openat || number == SYS_openat2 || number == SYS_pidfd_getfd)
		opened((int)result);
	return result;
}

/* ---- ioctl: SCSI commands passed through; QEMU's own userfaultfd */

/* What we have registered goes, for a mapping takes one userfaultfd only. Merged pages have no registration. */
static void before_register_userfault(const struct uffdio_register *r)
{
	const struct ram_table *table = atomic_load(&ram_now);
	uint64_t gfn, pages;
	if (!ram_of_addresses(table, r->range.start, r->range.len, &gfn, &pages)) return;
	gate_suspect(GATE_USERFAULT);
	for (unsigned i = 0; i < table->count; i++)
		userfault_unregister(userfault_track, table->regions[i].address, table->regions[i].pages * PAGE);
}

SLOT(ioctl);
EXPORT int ioctl(int fd, unsigned long request, ...)
{
	va_list list;
	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);
	if (request == SG_IO) gate_suspect(GATE_PASSTHROUGH);
	else if (request == UFFDIO_REGISTER && argument && agent_is_here()) before_register_userfault(argument);
	return REAL(ioctl)(fd, request, argument);
}

/* ---- guest RAM that is discarded or unmapped */

static bool any_merged(const struct held *held)
{
	for (unsigned i = 0; i < held->count; i++)
		for (uint64_t n = 0; n < held->ranges[i].pages; n++)
			if (map_merged(map_load(held->ranges[i].gfn + n))) return true;
	return false;
}

/* Maps merged pages of the range back. False, with errno: the call must not be made. Meanwhile nothing is held. */
static bool bring_back(const struct held *held)
{
	long error = 0;
	/* Until none is merged when it is held again. */
	while (!error && any_merged(held)) {
		for (unsigned i = 0; i < held->count; i++) lock_end_io(held->ranges[i].gfn, held->ranges[i].pages);
		for (unsigned i = 0; i < held->count && !error; i++)
			error = window_reset(held->ranges[i].gfn, held->ranges[i].pages);
		for (unsigned i = 0; i < held->count; i++) lock_begin_io(held->ranges[i].gfn, held->ranges[i].pages);
	}
	errno = (int)-error;
	return !error;
}

/* Only ranges of a few pieces are discarded; a table that has more would have been split by the caller. */
static void hold_range(struct held *held, const void *address, size_t bytes)
{
	struct iovec part = { (void *)address, bytes };
	hold(held, -1, &part, 1);
}

SLOT(madvise);
EXPORT int madvise(void *address, size_t bytes, int advice)
{
	agent_start_in_qemu();
	if ((advice != MADV_DONTNEED && advice != MADV_REMOVE) || atomic_load(&ram_now)->count == 0)
		return REAL(madvise)(address, bytes, advice);
	struct held held;
	int result = 0;
	hold_range(&held, address, bytes);
	/*
	 * On a shared mapping DONTNEED loses no byte; on a merged page it would lose what the guest has written. There
	 * it is left out: whoever means to discard has punched before, and then nothing is merged any more.
	 */
	if (advice == MADV_REMOVE ? bring_back(&held) : !any_merged(&held)) result = REAL(madvise)(address, bytes, advice);
	else if (advice == MADV_REMOVE) result = -1;
	int saved = errno;
	let_go(&held);
	errno = saved;
	return result;
}

/* The guest pages that a range of a file is, whole ones and parts. */
static void hold_file(struct held *held, int fd, uint64_t offset, uint64_t bytes)
{
	struct stat s;
	const struct ram_table *table = atomic_load(&ram_now);
	held->table = NULL;
	held->count = 0;
	if (!agent_is_here() || table->count == 0 || bytes == 0) return;
	if (fstat(fd, &s) < 0 || !ram_is_file(s.st_dev, s.st_ino)) return;
	held->table = (struct ram_table *)table;
	atomic_fetch_add(&held->table->calls, 1);
	for (unsigned i = 0; i < table->count; i++) {
		const struct ram *ram = &table->regions[i];
		uint64_t begin = ram->offset, end = begin + ram->pages * PAGE;
		if (ram->file->device != s.st_dev || ram->file->inode != s.st_ino) continue;
		if (offset >= end || begin >= offset + bytes) continue;
		uint64_t from = (offset > begin ? offset - begin : 0) / PAGE;
		uint64_t to = offset + bytes < end ? (offset + bytes - begin + PAGE - 1) / PAGE : ram->pages;
		add_range(held, ram->gfn + from, to - from);
	}
	for (unsigned i = 0; i < held->count; i++) lock_begin_io(held->ranges[i].gfn, held->ranges[i].pages);
}

/* The rest of a page that is punched in part must survive, so a merged one can't be just mapped back. */
static bool splits_merged(const struct held *held, uint64_t offset, uint64_t bytes)
{
	return (offset % PAGE || bytes % PAGE) && any_merged(held);
}

#define INTERPOSE_FALLOCATE(name, offset_type)                                                                  \
	SLOT(name);                                                                                             \
	EXPORT int name(int fd, int mode, offset_type offset, offset_type bytes)                                \
	{                                                                                                       \
		if (!(mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) || offset < 0 || bytes <= 0)        \
			return REAL(name)(fd, mode, offset, bytes);                                             \
		struct held held;                                                                               \
		int result = -1;                                                                                \
		hold_file(&held, fd, (uint64_t)offset, (uint64_t)bytes);                                        \
		if (splits_merged(&held, (uint64_t)offset, (uint64_t)bytes)) errno = EINVAL;                    \
		else if (bring_back(&held)) result = REAL(name)(fd, mode, offset, bytes);                       \
		int saved = errno;                                                                              \
		let_go(&held);                                                                                  \
		errno = saved;                                                                                  \
		return result;                                                                                  \
	}

INTERPOSE_FALLOCATE(fallocate, off_t)
INTERPOSE_FALLOCATE(fallocate64, off64_t)

SLOT(munmap);
EXPORT int munmap(void *address, size_t bytes)
{
	/* Not by the table: the backend may have heard already that these regions are gone. */
	if (ram_is_mapped((uintptr_t)address, bytes) && agent_is_here()) {
		sigset_t old;
		agent_lock(&old);
		ram_unmapped((uintptr_t)address, bytes);
		agent_unlock(&old);
	}
	return REAL(munmap)(address, bytes);
}

void interpose_resolve(void)
{
	static const struct {
		void *_Atomic *slot;
		const char *name;
	} all[] = {
#define ENTRY(name) { &slot_##name, #name }
		ENTRY(pread), ENTRY(pread64), ENTRY(pwrite), ENTRY(pwrite64), ENTRY(preadv), ENTRY(preadv64), ENTRY(pwritev),
		ENTRY(pwritev64), ENTRY(preadv2), ENTRY(preadv64v2), ENTRY(pwritev2), ENTRY(pwritev64v2), ENTRY(read),
		ENTRY(write), ENTRY(readv), ENTRY(writev), ENTRY(open), ENTRY(open64), ENTRY(openat), ENTRY(openat64),
		ENTRY(__open_2), ENTRY(__open64_2), ENTRY(__openat_2), ENTRY(__openat64_2), ENTRY(close), ENTRY(dup),
		ENTRY(dup2), ENTRY(dup3), ENTRY(fcntl), ENTRY(fcntl64), ENTRY(recvmsg), ENTRY(sendmsg), ENTRY(io_submit), ENTRY(io_uring_submit),
		ENTRY(io_uring_submit_and_wait), ENTRY(io_uring_submit_and_wait_timeout), ENTRY(syscall), ENTRY(ioctl),
		ENTRY(madvise), ENTRY(fallocate), ENTRY(fallocate64), ENTRY(munmap),
	};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) find(all[i].slot, all[i].name);
}
