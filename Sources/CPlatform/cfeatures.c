/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cplatform.h"
#include "pagemap_scan.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int cp_userfault_features(uint64_t *features)
{
	int fd = -1;
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (device >= 0) {
		fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);
		close(device);
	}
	if (fd < 0) fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	if (fd < 0) return errno;
	struct uffdio_api api = { .api = UFFD_API };
	int error = ioctl(fd, UFFDIO_API, &api) == 0 ? 0 : errno;
	close(fd);
	*features = api.features;
	return error;
}

bool cp_has_pagemap_scan(void)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (fd < 0) return false;
	struct pm_scan_arg scan = { .size = sizeof scan };
	/* Nothing of an empty range; a kernel that doesn't know it says ENOTTY. */
	bool known = ioctl(fd, PAGEMAP_SCAN, &scan) >= 0 || errno != ENOTTY;
	close(fd);
	return known;
}
