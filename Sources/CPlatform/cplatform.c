/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cplatform.h"
#include <linux/falloc.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/syscall.h>

int cp_memfd_create(const char *name, unsigned flags) { return (int)syscall(SYS_memfd_create, name, flags); }
int cp_seal_size(int fd) { return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW); }
int cp_seal_shrink(int fd) { return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK); }
off_t cp_seek_data(int fd, off_t offset) { return lseek(fd, offset, SEEK_DATA); }
off_t cp_seek_hole(int fd, off_t offset) { return lseek(fd, offset, SEEK_HOLE); }
int cp_accept(int fd) { return accept4(fd, NULL, NULL, SOCK_CLOEXEC); }
void cp_name_thread(const char *name) { pthread_setname_np(pthread_self(), name); }

int cp_punch_hole(int fd, off_t offset, off_t length)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
}

int cp_zero_range(int fd, off_t offset, off_t length, bool may_unmap)
{
	if (may_unmap && cp_punch_hole(fd, offset, length) == 0) return 0;
	return fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
}

ssize_t cp_recv_with_fds(int socket, void *buffer, size_t length, int *fds, int max_fds, int *fd_count, bool *truncated)
{
	union { struct cmsghdr align; char space[CMSG_SPACE(64 * sizeof(int))]; } control;
	struct iovec iov = { buffer, length };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;

	*fd_count = 0;
	*truncated = false;
	if (max_fds > 64) max_fds = 64;
	if (max_fds > 0) {
		msg.msg_control = control.space;
		msg.msg_controllen = CMSG_SPACE((size_t)max_fds * sizeof(int));
	}
	do n = recvmsg(socket, &msg, MSG_CMSG_CLOEXEC); while (n < 0 && errno == EINTR);
	if (n < 0) return n;
	*truncated = (msg.msg_flags & MSG_CTRUNC) != 0;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
		int count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		for (int i = 0; i < count; i++) {
			int fd;
			memcpy(&fd, CMSG_DATA(c) + (size_t)i * sizeof(int), sizeof fd);
			if (*fd_count < max_fds) fds[(*fd_count)++] = fd;
			else { close(fd); *truncated = true; }
		}
	}
	return n;
}

ssize_t cp_send_with_fds(int socket, const void *buffer, size_t length, const int *fds, int fd_count)
{
	union { struct cmsghdr align; char space[CMSG_SPACE(64 * sizeof(int))]; } control;
	struct iovec iov = { (void *)buffer, length };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;

	if (fd_count > 64) { errno = EINVAL; return -1; }
	if (fd_count > 0) {
		memset(&control, 0, sizeof control);
		msg.msg_control = control.space;
		msg.msg_controllen = CMSG_SPACE((size_t)fd_count * sizeof(int));
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN((size_t)fd_count * sizeof(int));
		memcpy(CMSG_DATA(c), fds, (size_t)fd_count * sizeof(int));
	}
	do n = sendmsg(socket, &msg, MSG_NOSIGNAL); while (n < 0 && errno == EINTR);
	return n;
}

static int unix_address(const char *path, struct sockaddr_un *address)
{
	memset(address, 0, sizeof *address);
	address->sun_family = AF_UNIX;
	if (strlen(path) >= sizeof address->sun_path) { errno = ENAMETOOLONG; return -1; }
	strcpy(address->sun_path, path);
	return 0;
}

int cp_unix_listen(const char *path, int type, int backlog)
{
	struct sockaddr_un address;
	if (unix_address(path, &address) < 0) return -1;
	int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
	if (fd < 0) return -1;
	if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, backlog) < 0) {
		int e = errno;
		close(fd);
		errno = e;
		return -1;
	}
	return fd;
}

int cp_unix_connect(const char *path, int type, int timeout_ms)
{
	struct sockaddr_un address;
	struct timeval timeout = { timeout_ms / 1000, timeout_ms % 1000 * 1000 };
	if (unix_address(path, &address) < 0) return -1;
	int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
	if (fd < 0) return -1;
	if ((timeout_ms > 0 && setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout) < 0)
	    || connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
		int e = errno;
		close(fd);
		errno = e;
		return -1;
	}
	return fd;
}

int cp_socket_pair(int ends[2]) { return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends); }

int cp_peer(int socket, pid_t *pid, uid_t *uid)
{
	struct ucred who;
	socklen_t size = sizeof who;
	if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &who, &size) < 0) return -1;
	*pid = who.pid;
	*uid = who.uid;
	return 0;
}

void cp_raise_file_limit(void)
{
	struct rlimit limit;
	if (getrlimit(RLIMIT_NOFILE, &limit) < 0) return;
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
}

int cp_epoll(void) { return epoll_create1(EPOLL_CLOEXEC); }

int cp_epoll_add(int epoll, int fd, uint64_t token)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLONESHOT, .data.u64 = token };
	return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

int cp_epoll_arm(int epoll, int fd, uint64_t token)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLONESHOT, .data.u64 = token };
	return epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event);
}

int cp_epoll_remove(int epoll, int fd) { return epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL); }

int cp_epoll_wait(int epoll, int timeout_ms, uint64_t *token)
{
	struct epoll_event event;
	int n;
	do n = epoll_wait(epoll, &event, 1, timeout_ms); while (n < 0 && errno == EINTR);
	if (n == 1) *token = event.data.u64;
	return n;
}

unsigned cp_census(const uint8_t *bytes, unsigned blocks, uint64_t *others)
{
	unsigned ones = 0;
	uint64_t found = 0;
	for (unsigned block = 0; block < blocks; block++, bytes += 64) {
		/* 0 becomes 1, 0xff becomes 0, everything else has a higher bit. At most 64 ones fit into a byte. */
		uint8_t other = 0, count = 0;
		for (unsigned i = 0; i < 64; i++) {
			uint8_t next = (uint8_t)(bytes[i] + 1);
			other |= next;
			count += next == 0;
		}
		ones += count;
		if (other > 1) found |= UINT64_C(1) << block;
	}
	*others = found;
	return ones;
}

long cp_pagemap_scan(int fd, uint64_t start, uint64_t end, bool protect, uint64_t inverted, uint64_t all, uint64_t any,
		     struct cp_page_range *found, size_t count, uint64_t *walked)
{
	struct page_region regions[512];
	struct pm_scan_arg scan = {
		.size = sizeof scan, .flags = protect ? PM_SCAN_WP_MATCHING : 0, .start = start, .end = end,
		.vec = (uintptr_t)regions, .vec_len = count < 512 ? count : 512, .category_inverted = inverted,
		.category_mask = all, .category_anyof_mask = any, .return_mask = PAGE_IS_PRESENT | PAGE_IS_WRITTEN,
	};
	long n;
	do n = ioctl(fd, PAGEMAP_SCAN, &scan); while (n < 0 && errno == EINTR);
	if (n < 0) return -1;
	for (long i = 0; i < n; i++) found[i] = (struct cp_page_range){ regions[i].start, regions[i].end };
	*walked = scan.walk_end;
	return n;
}

long cp_pagemap_read(int fd, uint64_t address, uint64_t *entries, size_t count)
{
	ssize_t n = pread(fd, entries, count * sizeof *entries, (off_t)(address / 4096 * sizeof *entries));
	return n < 0 ? -1 : n / (ssize_t)sizeof *entries;
}
