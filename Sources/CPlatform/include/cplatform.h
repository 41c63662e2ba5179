/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Thin shims for what Swift cannot import: atomic access to memory that another process or the guest changes, the
 * control-message macros, and Linux calls that glibc declares as macros or variadic functions. No policy, no state.
 */
#ifndef CPLATFORM_H
#define CPLATFORM_H

/* No _GNU_SOURCE here: it changes types of the system's headers, and Swift imports those a second time without it. What
 * needs it is in cplatform.c. */
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/magic.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "pagemap_scan.h"

/* Atomics on memory shared with the guest or another process. Acquire loads, release stores, sequentially consistent
 * read-modify-write: what the virtio and state-table protocols ask for, and free on x86-64. */
#define CP_ATOMIC(bits)                                                                                          \
	static inline uint##bits##_t cp_load_u##bits(const void *p)                                              \
	{ return __atomic_load_n((const uint##bits##_t *)p, __ATOMIC_ACQUIRE); }                                 \
	static inline void cp_store_u##bits(void *p, uint##bits##_t v)                                           \
	{ __atomic_store_n((uint##bits##_t *)p, v, __ATOMIC_RELEASE); }                                          \
	static inline bool cp_cas_u##bits(void *p, uint##bits##_t expected, uint##bits##_t desired)              \
	{ return __atomic_compare_exchange_n((uint##bits##_t *)p, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }
CP_ATOMIC(8)
CP_ATOMIC(16)
CP_ATOMIC(32)
CP_ATOMIC(64)
static inline uint8_t cp_load_sequential_u8(const void *p)
{ return __atomic_load_n((const uint8_t *)p, __ATOMIC_SEQ_CST); }
static inline void cp_or_u8(void *p, uint8_t bits) { __atomic_fetch_or((uint8_t *)p, bits, __ATOMIC_SEQ_CST); }
static inline uint16_t cp_fetch_add_u16(void *p, uint16_t n) { return __atomic_fetch_add((uint16_t *)p, n, __ATOMIC_SEQ_CST); }
static inline void cp_add_u64(void *p, uint64_t n) { __atomic_fetch_add((uint64_t *)p, n, __ATOMIC_RELAXED); }
/* Looks at 64 * blocks bytes (at most 4096), which others may change meanwhile, so it is a hint. Returns how many of them
 * are 0xff; bit i of *others says that block i holds a byte that is neither 0 nor 0xff. Compiled C: this loop is what an
 * idle backend does, and the compiler makes vectors of it. */
unsigned cp_census(const uint8_t *bytes, unsigned blocks, uint64_t *others);
static inline void cp_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Whether two secrets are equal; looks at all bytes, whatever it finds. */
static inline bool cp_equal_secret(const uint8_t *a, const uint8_t *b, size_t count)
{
	volatile uint8_t difference = 0;
	for (size_t i = 0; i < count; i++) difference |= a[i] ^ b[i];
	return difference == 0;
}

static inline int cp_open(const char *path, int flags, mode_t mode) { return open(path, flags, mode); }
int cp_memfd_create(const char *name, unsigned flags);
int cp_seal_size(int fd);                          /* F_SEAL_SHRINK | F_SEAL_GROW */
int cp_seal_shrink(int fd);                        /* F_SEAL_SHRINK */
off_t cp_seek_data(int fd, off_t offset);          /* SEEK_DATA */
off_t cp_seek_hole(int fd, off_t offset);          /* SEEK_HOLE */
int cp_punch_hole(int fd, off_t offset, off_t length);
int cp_zero_range(int fd, off_t offset, off_t length, bool may_unmap);
int cp_accept(int fd);                             /* close-on-exec */
void cp_name_thread(const char *name);             /* at most 15 bytes */
static inline int cp_set_nonblocking(int fd, bool on)
{
	int flags = fcntl(fd, F_GETFL);
	return flags < 0 ? -1 : fcntl(fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK);
}
static inline int cp_set_cloexec(int fd, bool on) { return fcntl(fd, F_SETFD, on ? FD_CLOEXEC : 0); }
void cp_raise_file_limit(void);                    /* RLIMIT_NOFILE as far as the hard limit allows */
static inline int cp_dup_cloexec(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, 3); }
static inline int cp_eventfd(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }
static inline void *cp_map_shared(int fd, off_t offset, size_t length, bool writable)
{
	void *p = mmap(NULL, length, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, offset);
	return p == MAP_FAILED ? NULL : p;
}
static inline void *cp_map_anonymous(size_t length)
{
	void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}
static inline int cp_is_listening(int fd)
{
	int value = 0;
	socklen_t size = sizeof value;
	return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &value, &size) < 0 ? -1 : value;
}
static inline bool cp_is_socket(const char *path)
{
	struct stat s;
	return lstat(path, &s) == 0 && S_ISSOCK(s.st_mode);
}
static inline int cp_errno(void) { return errno; }
static inline uint64_t cp_clock_ns(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* recvmsg with descriptors. Returns what recvmsg returns; *fd_count descriptors (close-on-exec) are in fds, all of them
 * owned by the caller. *truncated says that more came than max_fds; the surplus was closed by the kernel. */
ssize_t cp_recv_with_fds(int socket, void *buffer, size_t length, int *fds, int max_fds, int *fd_count, bool *truncated);
/* sendmsg with descriptors, MSG_NOSIGNAL. */
ssize_t cp_send_with_fds(int socket, const void *buffer, size_t length, const int *fds, int fd_count);
/* `type` is SOCK_STREAM or SOCK_SEQPACKET. -1 with errno; ENAMETOOLONG if the path does not fit. */
int cp_unix_listen(const char *path, int type, int backlog);
/* Above 0: how long it, and each send after it, waits for a peer that takes nothing; then EAGAIN. */
int cp_unix_connect(const char *path, int type, int timeout_ms);
int cp_socket_pair(int ends[2]);                   /* SOCK_SEQPACKET, close-on-exec */
int cp_peer(int socket, pid_t *pid, uid_t *uid);   /* SO_PEERCRED: who connected, as the kernel says */
static inline int cp_seqpacket(void) { return SOCK_SEQPACKET; }
static inline int cp_stream(void) { return SOCK_STREAM; }

/* PAGEMAP_SCAN of [start, end) through a descriptor of /proc/PID/pagemap: at most `count` regions of pages that have all
 * categories of `all` (those of `inverted` the other way round) and, unless it is 0, one of `any`. `protect` protects what
 * is found (PM_SCAN_WP_MATCHING). Returns how many regions; *walked is where it stopped. -1 with errno. */
struct cp_page_range { uint64_t start, end; };
long cp_pagemap_scan(int fd, uint64_t start, uint64_t end, bool protect, uint64_t inverted, uint64_t all, uint64_t any,
		     struct cp_page_range *found, size_t count, uint64_t *walked);

/* What /proc/PID/pagemap says of `count` pages from `address` on, without PAGEMAP_SCAN (admin-guide/mm/pagemap.rst):
 * bit 61: of a file or shared; 62: swapped; 63: present. Returns how many, or -1. */
long cp_pagemap_read(int fd, uint64_t address, uint64_t *entries, size_t count);

/* Epoll where a descriptor is reported once and then rests until it is armed again, so that of several threads one
 * deals with it. `token` is the caller's. */
int cp_epoll(void);
int cp_epoll_add(int epoll, int fd, uint64_t token);
int cp_epoll_remove(int epoll, int fd);
int cp_epoll_arm(int epoll, int fd, uint64_t token);
int cp_epoll_wait(int epoll, int timeout_ms, uint64_t *token); /* 1: *token is ready; 0: nothing; -1: errno */

/* What this kernel can do, by trying (cfeatures.c).
 * 0 and the features (UFFD_FEATURE_*) of a userfaultfd for the whole address space; or the errno of getting one. */
int cp_userfault_features(uint64_t *features);
bool cp_has_pagemap_scan(void);

enum {
	CP_UFFD_MINOR_SHMEM = 1 << 10,
	CP_UFFD_WP_SHMEM = 1 << 12,
	CP_UFFD_WP_UNPOPULATED = 1 << 13,
	CP_UFFD_WP_ASYNC = 1 << 15,
};

#endif
