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
 *                 open
 *   devices       VFIO, iommufd, vhost-vdpa, vhost-scsi, RDMA, SCSI generic, udmabuf, SEV: open means closed
 *   SG_IO         direct, whatever the descriptor. Once seen, for good
 *   buffers       registered with io_uring: pinned until the ring goes, whatever the file. Once seen, for good
 *   peers         guest RAM was passed to a process that isn't ours: another vhost-user back end does as it likes with
 *                 it. For as long as that process lives
 *   userfault     QEMU registered guest RAM itself (postcopy, a background snapshot). Not even a reset then
 *
 * Reasons are added by the interposers, before the first transfer can begin and under the window lock, so that no
 * window is open that began without knowing. They are taken away only by the agent's thread, which looks at every
 * descriptor that is open. A reason that is added while it looks stays: the generation says so.
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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "agent.h"
#include "sys.h"

#define FOUND_BY_LOOKING (GATE_DIRECT | GATE_DEVICE | GATE_PEER | GATE_STARTING)

static _Atomic unsigned reasons;
static _Atomic uint64_t generation;
static time_t looked;

/* Who was passed which file. Guest RAM or not: that may be known only later. */
#define PASSED_MAX 128
static struct passed {
	int pid;
	uint64_t device, inode;
	bool ours;
} passed[PASSED_MAX];
static unsigned passed_count;
static uint32_t ours[64];
static unsigned ours_count;

static bool closed_by(unsigned r)
{
	return (r & GATE_DIRECT && r & (GATE_NATIVE_AIO | GATE_URING))
	       || r & (GATE_DEVICE | GATE_FIXED_BUFFERS | GATE_PASSTHROUGH | GATE_PEER | GATE_STARTING | GATE_UNKNOWN
		       | GATE_USERFAULT);
}

bool gate_closed(void) { return closed_by(atomic_load(&reasons)); }
bool gate_suspects(enum gate_reason reason) { return atomic_load(&reasons) & reason; }

void gate_text(char text[256])
{
	unsigned r = atomic_load(&reasons);
	const char *why = "";
	if (r & GATE_USERFAULT) why = "QEMU uses userfaultfd on guest RAM (postcopy or a background snapshot)";
	else if (r & GATE_DEVICE) why = "a device that pins memory is open in QEMU (VFIO, vDPA, RDMA, SCSI generic, ...)";
	else if (r & GATE_FIXED_BUFFERS) why = "QEMU has registered fixed buffers with io_uring";
	else if (r & GATE_PASSTHROUGH) why = "QEMU passes SCSI commands through (SG_IO)";
	else if (r & GATE_PEER) why = "guest RAM was passed to a process that isn't Quire's: another vhost-user back end";
	else if (r & GATE_UNKNOWN) why = "guest RAM may have been passed to more processes than the agent keeps in mind";
	else if (closed_by(r & (GATE_DIRECT | GATE_NATIVE_AIO)))
		why = "QEMU has a file open with O_DIRECT and uses native AIO: choose aio=threads, or not cache=none";
	else if (closed_by(r & (GATE_DIRECT | GATE_URING)))
		why = "QEMU has a file open with O_DIRECT and uses io_uring: choose aio=threads, or not cache=none";
	else if (r & GATE_STARTING) why = "I/O that began before the agent was attached is still running";
	memset(text, 0, 256);
	snprintf(text, 256, "%s", why);
}

void gate_suspect(enum gate_reason reason)
{
	if (!agent_is_here()) return;
	/* Already known, and not to be forgotten: no window can be open that doesn't know. The way of every io_submit. */
	if (!(reason & FOUND_BY_LOOKING) && gate_suspects(reason)) return;
	sigset_t old;
	agent_lock(&old);
	bool before = gate_closed();
	atomic_fetch_or(&reasons, reason);
	atomic_fetch_add(&generation, 1);
	bool after = gate_closed();
	agent_unlock(&old);
	if (before != after) agent_wake();
}

void gate_look_again(void)
{
	if (gate_suspects(GATE_DIRECT | GATE_DEVICE) && agent_is_here()) agent_wake();
}

/* ---- descriptors */

static bool begins(const char *text, const char *with) { return !strncmp(text, with, strlen(with)); }

static bool pins_memory(const char *path)
{
	static const char *const devices[] = {
		"/dev/vfio", "/dev/iommu", "/dev/vhost-vdpa", "/dev/vhost-scsi", "/dev/infiniband/", "/dev/sg", "/dev/bsg/",
		"/dev/ng", "/dev/udmabuf", "/dev/sev", "anon_inode:[vfio", "anon_inode:vfio", "anon_inode:[iommufd",
	};
	for (size_t i = 0; i < sizeof devices / sizeof *devices; i++)
		if (begins(path, devices[i])) return true;
	return false;
}

/* What a descriptor is reason for. `flags`: of the open file. */
static unsigned reasons_of(int fd, int flags)
{
	struct stat s;
	char link[64], path[128];
	if (fstat(fd, &s) < 0) return 0;
	if (flags & O_DIRECT && (S_ISREG(s.st_mode) || S_ISBLK(s.st_mode))) return GATE_DIRECT;
	/* An anonymous inode has no type at all. */
	if (!S_ISCHR(s.st_mode) && s.st_mode & S_IFMT) return 0;
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, sizeof path - 1);
	if (n < 0) return 0;
	path[n] = 0;
	return pins_memory(path) ? GATE_DEVICE : 0;
}

void gate_suspect_descriptor(int fd)
{
	long flags = sys3(SYS_fcntl, fd, F_GETFL, 0);
	if (flags < 0) return;
	unsigned found = reasons_of(fd, (int)flags);
	if (found) gate_suspect(found);
}

/* An io_uring that got its buffers in a way that no interposer saw. */
static bool has_fixed_buffers(const char *info)
{
	const char *line = strstr(info, "UserBufs:");
	return line && strtoul(line + strlen("UserBufs:"), NULL, 10) > 0;
}

static unsigned look_at_descriptors(void)
{
	DIR *folder = opendir("/proc/self/fdinfo");
	unsigned found = 0;
	if (!folder) return GATE_UNKNOWN;
	for (struct dirent *entry; (entry = readdir(folder));) {
		if (!isdigit((unsigned char)entry->d_name[0])) continue;
		char path[64], info[4096];
		snprintf(path, sizeof path, "/proc/self/fdinfo/%.20s", entry->d_name);
		int fd = (int)sys6(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0, 0, 0);
		if (fd < 0) continue;
		long n = sys3(SYS_read, fd, (long)info, sizeof info - 1);
		sys3(SYS_close, fd, 0, 0);
		if (n <= 0) continue;
		info[n] = 0;
		const char *flags = strstr(info, "flags:");
		found |= reasons_of(atoi(entry->d_name), flags ? (int)strtoul(flags + strlen("flags:"), NULL, 8) : 0);
		if (has_fixed_buffers(info)) found |= GATE_FIXED_BUFFERS;
	}
	closedir(folder);
	return found;
}

/* ---- peers. All of it with the window lock. */

static bool is_ours(int pid)
{
	for (unsigned i = 0; i < ours_count; i++)
		if (pid > 0 && ours[i] == (uint32_t)pid) return true;
	return false;
}

static bool is_foreign(const struct passed *p)
{
	return !p->ours && ram_is_file(p->device, p->inode) && !(p->pid > 0 && sys3(SYS_kill, p->pid, 0, 0) == -ESRCH);
}

static unsigned look_at_peers(void)
{
	unsigned found = 0;
	for (unsigned i = 0; i < passed_count; i++) {
		/* Once ours, always: a backend that has died doesn't become a stranger. */
		passed[i].ours |= is_ours(passed[i].pid);
		if (is_foreign(&passed[i])) found |= GATE_PEER;
	}
	return found;
}

void gate_allow_peers(const uint32_t *pids, unsigned count)
{
	sigset_t old;
	agent_lock(&old);
	for (unsigned i = 0; i < count; i++) {
		if (is_ours((int)pids[i])) continue;
		/* The oldest is dead long since, and what it was passed is marked. */
		if (ours_count == sizeof ours / sizeof *ours) memmove(ours, ours + 1, sizeof *ours * --ours_count);
		ours[ours_count++] = pids[i];
	}
	look_at_peers();
	agent_unlock(&old);
}

void gate_passed(int socket, int fd)
{
	struct stat s;
	struct ucred peer = { .pid = 0 };
	socklen_t size = sizeof peer;
	if (!agent_is_here() || fstat(fd, &s) < 0 || !S_ISREG(s.st_mode)) return;
	/* Who isn't connected to a process of this machine, or not of this namespace, is pid 0: nobody that we know. */
	getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size);
	struct passed new = { peer.pid, s.st_dev, s.st_ino, false };
	sigset_t old;
	agent_lock(&old);
	unsigned i = 0;
	while (i < passed_count
	       && (passed[i].pid != new.pid || passed[i].device != new.device || passed[i].inode != new.inode))
		i++;
	if (i == PASSED_MAX) {
		atomic_fetch_or(&reasons, GATE_UNKNOWN);
	} else {
		if (i == passed_count) passed[passed_count++] = new;
		atomic_fetch_or(&reasons, look_at_peers());
	}
	atomic_fetch_add(&generation, 1);
	agent_unlock(&old);
	agent_wake();
}

/* ---- the agent's thread */

static unsigned look_at_calls(void)
{
	for (const struct ram_table *table = atomic_load(&ram_now)->before; table; table = table->before)
		if (atomic_load(&table->calls)) return GATE_STARTING;
	return 0;
}

void gate_refresh(bool force)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (!force && now.tv_sec == looked && !gate_suspects(GATE_STARTING)) return;
	looked = now.tv_sec;

	uint64_t before = atomic_load(&generation);
	unsigned found = look_at_descriptors() | look_at_calls();
	sigset_t old;
	agent_lock(&old);
	found |= look_at_peers();
	bool same = before == atomic_load(&generation);
	unsigned keep = atomic_load(&reasons) & (same ? ~(unsigned)FOUND_BY_LOOKING : ~0u);
	atomic_store(&reasons, keep | found);
	agent_unlock(&old);
	if (!same) agent_wake();
}
