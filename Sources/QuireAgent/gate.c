// SPDX-License-Identifier: Apache-2.0
/*
 * gate.c - the pin gate: may anything in QEMU pin guest memory for DMA?
 *
 * A pinned page is written by a device whatever the page tables say, so no window can stop it, and user space can't see
 * pins. It can see how they begin. While any way is open that isn't under our eyes, nothing is merged, zeroed or
 * folded:
 *
 *   O_DIRECT      a file or block device that is open for it, if native AIO or transfers by io_uring were ever seen in
 *                 this process: those run on after the call that began them. Direct I/O by preadv and its like is over
 *                 when the call returns, and the interposer holds the range lock over it, so that alone leaves the gate
 *                 open. Files of FUSE, CIFS and 9p count as well: their servers may leave the page cache out, unseen
 *   devices       VFIO, iommufd, vhost-vdpa, RDMA, vhost-scsi, SCSI generic, udmabuf, SEV: open means closed. The first four are
 *                 told where all of guest RAM is, and go on using that when the guest has freed a page and taken it again: as
 *                 long as one is open nothing is recycled either (recycle.c)
 *   SG_IO         direct, whatever the descriptor. Once seen, for good
 *   buffers       registered with io_uring: pinned until the ring goes, whatever the file. Once seen, for good. QEMU registers
 *                 none of its own; where it uses libblkio that is told of all of guest RAM, so nothing is recycled either
 *   peers         guest RAM was passed to a process that isn't ours: another vhost-user back end does as it likes with
 *                 it. For as long as that process lives, or the connection that it was passed on: who listened there is not
 *                 always who serves, and may be gone long before
 *   userfault     QEMU registered guest RAM itself (postcopy, a background snapshot). Not even a reset then
 *   strict        vm.overcommit_memory is 2: mapping a store is then charged to the host's limit, and before Linux 6.12 the kernel
 *                 refuses that only after it has unmapped what was there. Whoever touches the page meanwhile ends QEMU
 *
 * A peer sees the memfd, not what QEMU maps: it must have every byte. So before the message that takes the file away every merged
 * page is brought back, in the thread that sends it; and where that can't be done QEMU is told that its message can't be sent.
 * From then on no page is merged. What a peer pins is in the memfd already, so of all reasons this one (with `strict`) is none
 * against bringing pages back. A process is ours when a backend has attached that names it, with the page map that describes this
 * memory: what is ours looks up each page there. A backend with another map is a peer like any other.
 *
 * Reasons are added by the interposers, before the first transfer can begin and under the window lock, so that no
 * window is open that began without knowing. They are taken away only by the agent's thread, which looks at every
 * descriptor that is open. A reason that is added while it looks stays: the generation says so. So does what it found before if
 * it can't look at all of them.
 *
 * A disk that is closed has no transfer in flight: QEMU drains it before, for the buffers are its own to give back.
 *
 * What is seen here once and can't be seen to end stays for QEMU's life. Nested KVM can't be seen from here at all: the
 * backend knows the command line.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <time.h>
#include <unistd.h>
#include "agent.h"
#include "sys.h"

/* Newer than the headers of Debian 12. */
#ifndef CIFS_SUPER_MAGIC
#define CIFS_SUPER_MAGIC 0xFF534D42
#endif
#ifndef SMB2_SUPER_MAGIC
#define SMB2_SUPER_MAGIC 0xFE534D42
#endif

#define OF_DESCRIPTORS   ((unsigned)(GATE_DIRECT | GATE_DEVICE | GATE_ASSIGNED))
#define FOUND_BY_LOOKING (OF_DESCRIPTORS | GATE_PEER | GATE_STARTING | GATE_STRICT)

static _Atomic unsigned reasons;
static _Atomic uint64_t generation;
static time_t looked;

/*
 * Three tables, for what happens when one is full differs. Of ours, and of connections to them, the oldest is forgotten: it is a
 * stranger's then, and the gate closes when it is passed guest RAM. Who has guest RAM is never forgotten: the gate closes for good.
 */

/* Who was passed which file, and isn't ours. Guest RAM or not: that may be known only later. */
#define PASSED_MAX 128
static struct passed {
	int pid;
	uint64_t device, inode;
	uint64_t socket; /* inode of QEMU's end of the connection; 0: that is over */
} passed[PASSED_MAX];
static unsigned passed_count;
static uint32_t ours[64];
static unsigned ours_count;

/* QEMU's ends of connections to ours: who listened for them may die, and whoever serves them goes on. */
static struct { uint64_t socket; int pid; } our_ends[64];
static unsigned our_ends_next;

static bool closed_by(unsigned r)
{
	return (r & GATE_DIRECT && r & (GATE_NATIVE_AIO | GATE_URING))
	       || r & (GATE_DEVICE | GATE_FIXED_BUFFERS | GATE_PASSTHROUGH | GATE_PEER | GATE_STARTING | GATE_UNKNOWN
		       | GATE_USERFAULT | GATE_STRICT);
}

/* Calls that looked at another table than the one that there is now. With the window lock, or in the agent's thread. */
static unsigned look_at_calls(void)
{
	for (const struct ram_table *table = atomic_load(&ram_now)->before; table; table = table->before)
		if (atomic_load(&table->calls)) return GATE_STARTING;
	return 0;
}

bool gate_closed(void) { return closed_by(atomic_load(&reasons)); }
bool gate_suspects(unsigned some) { return atomic_load(&reasons) & some; }

bool gate_pins(void) { return closed_by(atomic_load(&reasons) & ~(unsigned)(GATE_PEER | GATE_STRICT | GATE_STARTING)); }
bool gate_starts(void) { return look_at_calls(); }

void gate_text(char text[256])
{
	unsigned r = atomic_load(&reasons);
	const char *why = "";
	if (r & GATE_USERFAULT) why = "QEMU uses userfaultfd on guest RAM (postcopy or a background snapshot)";
	else if (r & GATE_DEVICE) why = "a device that pins memory is open in QEMU (VFIO, vDPA, RDMA, SCSI generic, ...)";
	else if (r & GATE_FIXED_BUFFERS) why = "QEMU has registered fixed buffers with io_uring";
	else if (r & GATE_PASSTHROUGH) why = "QEMU passes SCSI commands through (SG_IO)";
	else if (r & GATE_PEER) why = "guest RAM was passed to a process that isn't Quire's: another vhost-user back end";
	else if (r & GATE_UNKNOWN) why = "QEMU has passed guest RAM to more processes, or uses more file systems, than the agent keeps in mind";
	else if (r & GATE_STRICT) why = "the host overcommits no memory: vm.overcommit_memory is 2";
	else if (closed_by(r & (GATE_DIRECT | GATE_NATIVE_AIO)))
		why = "QEMU has a file open with O_DIRECT and uses native AIO: choose aio=threads, or not cache=none";
	else if (closed_by(r & (GATE_DIRECT | GATE_URING)))
		why = "QEMU has a file open with O_DIRECT and uses io_uring: choose aio=threads, or not cache=none "
		      "(on FUSE, CIFS or 9p aio=threads)";
	else if (r & GATE_STARTING) why = "I/O that began before the agent was attached is still running";
	memset(text, 0, 256);
	snprintf(text, 256, "%s", why);
}

void gate_suspect(unsigned some)
{
	if (!agent_is_here()) return;
	/* Already known, and not to be forgotten: no window can be open that doesn't know. The way of every io_submit. */
	if (!(some & FOUND_BY_LOOKING) && gate_suspects(some)) return;
	sigset_t old;
	agent_lock(&old);
	unsigned before = atomic_fetch_or(&reasons, some);
	atomic_fetch_add(&generation, 1);
	unsigned after = before | some;
	agent_unlock(&old);
	if (closed_by(before) != closed_by(after) || (before ^ after) & GATE_ALL_OF_RAM) agent_wake();
	step(QUIRE_STEP_SUSPECTED, NULL);
}

void gate_look_again(void)
{
	if (gate_suspects(GATE_DIRECT | GATE_DEVICE) && agent_is_here()) agent_wake();
}

/* ---- descriptors */

static bool begins(const char *text, const char *with) { return !strncmp(text, with, strlen(with)); }

static unsigned reasons_of_device(const char *path)
{
	static const char *const assigned[] = {
		"/dev/vfio", "/dev/iommu", "/dev/vhost-vdpa", "/dev/infiniband/", "anon_inode:[vfio", "anon_inode:vfio",
		"anon_inode:[iommufd",
	};
	static const char *const others[] = {
		"/dev/vhost-scsi", "/dev/sg", "/dev/bsg/", "/dev/ng", "/dev/udmabuf", "/dev/sev",
	};
	for (size_t i = 0; i < sizeof assigned / sizeof *assigned; i++)
		if (begins(path, assigned[i])) return GATE_DEVICE | GATE_ASSIGNED;
	for (size_t i = 0; i < sizeof others / sizeof *others; i++)
		if (begins(path, others[i])) return GATE_DEVICE;
	return 0;
}

/* File systems that may leave the page cache out without O_DIRECT. What has been one is taken for one for good. */
static _Atomic uint64_t uncached[16];

static bool is_uncached(uint64_t device)
{
	for (size_t i = 0; i < sizeof uncached / sizeof *uncached; i++)
		if (atomic_load_explicit(&uncached[i], memory_order_relaxed) == device) return true;
	return false;
}

/* Of a file that was just opened: a server may have to answer, so it isn't asked at each look. */
static void note_file_system(int fd, uint64_t device)
{
	struct statfs fs;
	if (is_uncached(device)) return;
	if (fstatfs(fd, &fs) == 0) {
		uint32_t magic = (uint32_t)fs.f_type;
		if (magic != FUSE_SUPER_MAGIC && magic != CIFS_SUPER_MAGIC && magic != SMB2_SUPER_MAGIC && magic != V9FS_MAGIC) return;
	}
	for (size_t i = 0; i < sizeof uncached / sizeof *uncached; i++) {
		uint64_t none = 0;
		if (atomic_compare_exchange_strong(&uncached[i], &none, device) || none == device) return;
	}
	gate_suspect(GATE_UNKNOWN);
}

static bool is_direct(const struct stat *s, int flags)
{
	if (S_ISREG(s->st_mode)) return flags & O_DIRECT || is_uncached(s->st_dev);
	return S_ISBLK(s->st_mode) && flags & O_DIRECT;
}

bool gate_is_direct(int fd)
{
	struct stat s;
	long flags = sys3(SYS_fcntl, fd, F_GETFL, 0);
	return flags >= 0 && fstat(fd, &s) == 0 && is_direct(&s, (int)flags);
}

/* What a descriptor is reason for. `flags`: of the open file. */
static unsigned reasons_of(int fd, const struct stat *s, int flags)
{
	char link[64], path[128];
	if (is_direct(s, flags)) return GATE_DIRECT;
	/* An anonymous inode has no type at all. */
	if (!S_ISCHR(s->st_mode) && s->st_mode & S_IFMT) return 0;
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, sizeof path - 1);
	if (n < 0) return 0;
	path[n] = 0;
	return reasons_of_device(path);
}

void gate_suspect_descriptor(int fd)
{
	struct stat s;
	long flags = sys3(SYS_fcntl, fd, F_GETFL, 0);
	if (flags < 0 || fstat(fd, &s) < 0) return;
	if (S_ISREG(s.st_mode)) note_file_system(fd, s.st_dev);
	unsigned found = reasons_of(fd, &s, (int)flags);
	if (found) gate_suspect(found);
}

/* An io_uring that got its buffers in a way that no interposer saw. */
static bool has_fixed_buffers(const char *info)
{
	const char *line = strstr(info, "UserBufs:");
	return line && strtoul(line + strlen("UserBufs:"), NULL, 10) > 0;
}

/* One look at every descriptor that is open. */
struct look {
	unsigned found;
	unsigned count;
	uint64_t sockets[PASSED_MAX]; /* of those in `passed` */
	bool open[PASSED_MAX];        /* and whether their connections are */
};

static void look_at_socket(struct look *look, int fd, uint64_t inode)
{
	struct pollfd p = { .fd = fd };
	for (unsigned i = 0; i < look->count; i++) {
		if (look->sockets[i] != inode) continue;
		look->open[i] = !(sys3(SYS_poll, (long)&p, 1, 0) == 1 && p.revents & POLLHUP);
	}
}

/* What the kernel says of an open file, and ends it with a 0. How much, or a negative errno. */
static long read_info(const char *number, char *info, size_t room)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%.20s", number);
	long fd = sys6(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0, 0, 0);
	if (fd < 0) return fd;
	long n = sys3(SYS_read, fd, (long)info, (long)room - 1);
	sys3(SYS_close, fd, 0, 0);
	info[n < 0 ? 0 : n] = 0;
	return n;
}

/* False: not all of them could be looked at. */
static bool look_at_descriptors(struct look *look, bool first)
{
	DIR *folder = opendir("/proc/self/fdinfo");
	bool whole = folder;
	while (whole) {
		char info[4096];
		struct stat s;
		errno = 0;
		struct dirent *entry = readdir(folder);
		if (!entry) {
			whole = errno == 0;
			break;
		}
		if (!isdigit((unsigned char)entry->d_name[0])) continue;
		int fd = atoi(entry->d_name);
		long n = read_info(entry->d_name, info, sizeof info);
		if (n == -ENOENT || (n > 0 && fstat(fd, &s) < 0)) continue; /* closed since */
		if (n <= 0) {
			whole = false;
			break;
		}
		const char *flags = strstr(info, "flags:");
		if (S_ISSOCK(s.st_mode)) look_at_socket(look, fd, s.st_ino);
		if (S_ISREG(s.st_mode) && first) note_file_system(fd, s.st_dev);
		look->found |= reasons_of(fd, &s, flags ? (int)strtoul(flags + strlen("flags:"), NULL, 8) : 0);
		if (has_fixed_buffers(info)) look->found |= GATE_FIXED_BUFFERS;
	}
	if (folder) closedir(folder);
	return whole;
}

/* ---- peers. All of it with the window lock. */

static bool is_ours(int pid)
{
	for (unsigned i = 0; i < ours_count; i++)
		if (pid > 0 && ours[i] == (uint32_t)pid) return true;
	return false;
}

static bool is_our_end(uint64_t socket, int pid)
{
	for (unsigned i = 0; i < sizeof our_ends / sizeof *our_ends; i++)
		if (socket && our_ends[i].socket == socket && our_ends[i].pid == pid) return true;
	return false;
}

/* There are a few for each device and no more: the oldest is of a connection that is over. */
static void note_our_end(uint64_t socket, int pid)
{
	if (!socket || is_our_end(socket, pid)) return;
	our_ends[our_ends_next].socket = socket;
	our_ends[our_ends_next].pid = pid;
	our_ends_next = (our_ends_next + 1) % (sizeof our_ends / sizeof *our_ends);
}

static bool is_dead(int pid) { return pid > 0 && sys3(SYS_kill, pid, 0, 0) == -ESRCH; }

/* Their numbers may be somebody else's soon. */
static void forget_our_dead(void)
{
	unsigned kept = 0;
	for (unsigned i = 0; i < ours_count; i++)
		if (!is_dead((int)ours[i])) ours[kept++] = ours[i];
	ours_count = kept;
}

/*
 * Forgets who turns out to be ours, for good: a backend that has died doesn't become a stranger. And who is gone, with the
 * connection. `open`: for each whether that is there; NULL: as far as anybody knows it is.
 */
static unsigned look_at_peers(const bool *open)
{
	unsigned found = 0, kept = 0;
	for (unsigned i = 0; i < passed_count; i++) {
		struct passed p = passed[i];
		if (open && !open[i]) p.socket = 0;
		if (is_ours(p.pid)) note_our_end(p.socket, p.pid);
		if (is_ours(p.pid) || (!p.socket && is_dead(p.pid))) continue;
		if (ram_is_file(p.device, p.inode)) found |= GATE_PEER;
		passed[kept++] = p;
	}
	passed_count = kept;
	return found;
}

/* False: no room. */
static bool note_passed(const struct passed *new)
{
	unsigned i = 0;
	while (i < passed_count
	       && (passed[i].pid != new->pid || passed[i].device != new->device || passed[i].inode != new->inode
		   || (passed[i].socket && passed[i].socket != new->socket)))
		i++;
	if (i == PASSED_MAX) return false;
	passed[i] = *new;
	if (i == passed_count) passed_count++;
	return true;
}

void gate_allow_peers(const uint32_t *pids, unsigned count)
{
	sigset_t old;
	agent_lock(&old);
	forget_our_dead();
	for (unsigned i = 0; i < count; i++) {
		if (is_ours((int)pids[i])) continue;
		if (ours_count == sizeof ours / sizeof *ours) memmove(ours, ours + 1, sizeof *ours * --ours_count);
		ours[ours_count++] = pids[i];
	}
	look_at_peers(NULL);
	agent_unlock(&old);
}

bool gate_passed(int socket, int fd)
{
	struct stat file, end;
	struct ucred peer = { .pid = 0 };
	socklen_t size = sizeof peer;
	if (!agent_is_here() || fstat(fd, &file) < 0 || !S_ISREG(file.st_mode) || fstat(socket, &end) < 0) return true;
	/* Who isn't connected to a process of this machine, or not of this namespace, is pid 0: nobody that we know. */
	getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size);
	struct passed new = { peer.pid, file.st_dev, file.st_ino, end.st_ino };
	sigset_t old;
	agent_lock(&old);
	if (is_ours(new.pid)) note_our_end(new.socket, new.pid);
	bool foreign = !is_our_end(new.socket, new.pid), ram = foreign && ram_is_file(new.device, new.inode);
	if (foreign) {
		bool noted = note_passed(&new);
		atomic_fetch_or(&reasons, (ram ? GATE_PEER : 0) | (noted ? 0 : GATE_UNKNOWN));
		atomic_fetch_add(&generation, 1);
	}
	agent_unlock(&old);
	if (foreign) agent_wake();
	/* Before anybody else has it; nothing of it is merged any more. */
	return !ram || window_bring_back(new.device, new.inode) == 0;
}

/* ---- the agent's thread */

/* 0 and 1 are fine, and so is a host that doesn't say. */
static unsigned look_at_overcommit(void)
{
	char mode = 0;
	long fd = sys6(SYS_openat, AT_FDCWD, (long)"/proc/sys/vm/overcommit_memory", O_RDONLY | O_CLOEXEC, 0, 0, 0);
	if (fd < 0) return atomic_load(&reasons) & GATE_STRICT;
	sys3(SYS_read, fd, (long)&mode, 1);
	sys3(SYS_close, fd, 0, 0);
	return mode == '2' ? GATE_STRICT : 0;
}

void gate_refresh(bool force)
{
	static struct look look;
	static bool looked_at_all;
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (!force && now.tv_sec == looked && !gate_suspects(GATE_STARTING)) return;
	looked = now.tv_sec;

	sigset_t old;
	agent_lock(&old);
	uint64_t before = atomic_load(&generation);
	look = (struct look){ .count = passed_count };
	for (unsigned i = 0; i < passed_count; i++) look.sockets[i] = passed[i].socket;
	agent_unlock(&old);

	bool whole = look_at_descriptors(&look, !looked_at_all);
	/* Nothing may be known of what was open before anybody looked. */
	if (!whole && !looked_at_all) look.found |= OF_DESCRIPTORS;
	looked_at_all |= whole;
	unsigned found = look.found | look_at_calls() | look_at_overcommit();

	agent_lock(&old);
	bool same = before == atomic_load(&generation);
	forget_our_dead();
	found |= look_at_peers(same && whole ? look.open : NULL);
	unsigned forget = !same ? 0 : whole ? FOUND_BY_LOOKING : FOUND_BY_LOOKING & ~OF_DESCRIPTORS;
	atomic_store(&reasons, (atomic_load(&reasons) & ~forget) | found);
	agent_unlock(&old);
	if (!same) agent_wake();
}
