// SPDX-License-Identifier: Apache-2.0
/*
 * userfault.c - the two userfaultfds, and what the kernel must be able to do.
 *
 * Both are opened in QEMU and stay open for its life: one that closes inside a window loses a write, one that another
 * process holds and does not serve hangs the guest. Nobody reads them: whoever waits is woken by the end of the window.
 * No EVENT_* feature is asked for, because with one of those fork, mremap and madvise of QEMU would wait for a reader.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <string.h>
#include <unistd.h>
#include "agent.h"
#include "pagemap_scan.h"
#include "sys.h"

/* Newer than the headers of Debian 12. */
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#define FOR_FOLD (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED)
#define FOR_MERGE (FOR_FOLD | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM)

int userfault_track = -1, userfault_fold = -1;
static uint64_t features_open; /* of the kernel, as the two have shown */
static int pagemap = -1;

/* A new userfaultfd without its handshake, or -1. */
static int new_userfaultfd(int device)
{
	int flags = O_CLOEXEC | O_NONBLOCK;
	long fd = -1;
	if (device >= 0) fd = sys_ioctl(device, USERFAULTFD_IOC_NEW, (void *)(long)flags);
	/* Not UFFD_USER_MODE_ONLY: I/O of the guest faults inside the kernel. */
	if (fd < 0) fd = sys3(SYS_userfaultfd, flags, 0, 0);
	if (fd < 0) {
		long own = sys6(SYS_openat, AT_FDCWD, (long)"/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0, 0, 0);
		if (own >= 0) {
			fd = sys_ioctl((int)own, USERFAULTFD_IOC_NEW, (void *)(long)flags);
			sys3(SYS_close, own, 0, 0);
		}
	}
	return fd < 0 ? -1 : (int)fd;
}

/* All features of the kernel; 0 if it doesn't give us a userfaultfd. */
static uint64_t features_of(int device)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = new_userfaultfd(device);
	if (fd < 0) return 0;
	if (sys_ioctl(fd, UFFDIO_API, &api) < 0) api.features = 0;
	sys3(SYS_close, fd, 0, 0);
	return api.features;
}

static bool can_scan(void)
{
	if (pagemap < 0) {
		long fd = sys6(SYS_openat, AT_FDCWD, (long)"/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0, 0, 0);
		pagemap = fd < 0 ? -1 : (int)fd;
	}
	struct pm_scan_arg nothing = { .size = sizeof nothing };
	return pagemap >= 0 && sys_ioctl(pagemap, PAGEMAP_SCAN, &nothing) >= 0;
}

uint64_t userfault_capabilities(void)
{
	uint64_t own = features_of(-1), features = features_open ? features_open : own;
	return (own ? QUIRE_AGENT_CAN_USERFAULTFD : 0) | ((features & FOR_MERGE) == FOR_MERGE ? QUIRE_AGENT_CAN_MERGE : 0)
	       | (features & UFFD_FEATURE_WP_ASYNC ? QUIRE_AGENT_CAN_WP_ASYNC : 0)
	       | (can_scan() ? QUIRE_AGENT_CAN_PAGEMAP_SCAN : 0);
}

static int open_with(int device, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = new_userfaultfd(device);
	if (fd < 0 || sys_ioctl(fd, UFFDIO_API, &api) == 0) return fd;
	sys3(SYS_close, fd, 0, 0);
	return -1;
}

enum quire_agent_status userfault_open(int device, char *text)
{
	if (userfault_track >= 0) return QUIRE_AGENT_OK;
	uint64_t features = features_of(device);
	if (features == 0) {
		snprintf(text, 256, "QEMU may not open a userfaultfd, and none was passed that it may use: "
			 "give the backend access to /dev/userfaultfd");
		return QUIRE_AGENT_NO_USERFAULTFD;
	}
	if ((features & FOR_MERGE) != FOR_MERGE) {
		snprintf(text, 256, "the kernel's userfaultfd has features 0x%llx, merging needs 0x%llx: Linux 6.4 or later",
			 (unsigned long long)features, (unsigned long long)FOR_MERGE);
		return QUIRE_AGENT_OLD_KERNEL;
	}
	can_scan();
	/* Without asynchronous write-protect nobody protects anything here, and registering for it changes nothing. */
	int track = open_with(device, FOR_MERGE | (features & UFFD_FEATURE_WP_ASYNC));
	int fold = open_with(device, FOR_FOLD);
	if (track < 0 || fold < 0) {
		if (track >= 0) sys3(SYS_close, track, 0, 0);
		if (fold >= 0) sys3(SYS_close, fold, 0, 0);
		snprintf(text, 256, "cannot open a userfaultfd: QEMU has too many descriptors, or the kernel no memory");
		return QUIRE_AGENT_NO_USERFAULTFD;
	}
	features_open = features;
	userfault_fold = fold;
	userfault_track = track;
	return QUIRE_AGENT_OK;
}

long userfault_register(int fd, void *address, size_t bytes, uint64_t modes)
{
	struct uffdio_register r = { .range = { (uintptr_t)address, bytes }, .mode = modes };
	return sys_ioctl(fd, UFFDIO_REGISTER, &r);
}

long userfault_unregister(int fd, void *address, size_t bytes)
{
	struct uffdio_range r = { (uintptr_t)address, bytes };
	return sys_ioctl(fd, UFFDIO_UNREGISTER, &r);
}

long userfault_wake(int fd, void *address, size_t bytes)
{
	struct uffdio_range r = { (uintptr_t)address, bytes };
	return sys_ioctl(fd, UFFDIO_WAKE, &r);
}

long userfault_protect(int fd, void *address, size_t bytes)
{
	struct uffdio_writeprotect w = {
		.range = { (uintptr_t)address, bytes }, .mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	return sys_ioctl(fd, UFFDIO_WRITEPROTECT, &w);
}

/*
 * A copy of QEMU's own is (PRESENT or SWAPPED) and not FILE, on a mapping that is not registered for write-protect; on
 * zeros also not the zero page. A kernel that can't say: everything.
 */
long userfault_diverged(void *address, size_t bytes, bool zeros, struct range *found, size_t max)
{
	struct page_region regions[64];
	struct pm_scan_arg scan = {
		.size = sizeof scan, .start = (uintptr_t)address, .end = (uintptr_t)address + bytes,
		.vec = (uintptr_t)regions, .vec_len = max < 64 ? max : 64,
		.category_mask = PAGE_IS_FILE | (zeros ? PAGE_IS_PFNZERO : 0),
		.category_inverted = PAGE_IS_FILE | (zeros ? PAGE_IS_PFNZERO : 0),
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_PRESENT,
	};
	long n = pagemap < 0 ? -ENOTTY : sys_ioctl(pagemap, PAGEMAP_SCAN, &scan);
	if (n == -ENOTTY || n == -EINVAL) {
		found[0] = (struct range){ (uintptr_t)address, (uintptr_t)address + bytes };
		return 1;
	}
	for (long i = 0; i < n; i++) found[i] = (struct range){ regions[i].start, regions[i].end };
	return n;
}
