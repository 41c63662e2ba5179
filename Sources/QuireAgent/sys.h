/* SPDX-License-Identifier: Apache-2.0 */
/*
 * System calls without libc: no errno, no PLT, no lock, and above all past our own interposers. They return what the
 * kernel does: a negative errno, or the result. The window and the interposers use nothing else.
 */
#ifndef SYS_H
#define SYS_H

#include <errno.h>
#include <linux/falloc.h>
#include <linux/futex.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#ifndef __x86_64__
#error "Quire supports x86-64 hosts only"
#endif

static inline long sys6(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

static inline long sys3(long number, long a, long b, long c) { return sys6(number, a, b, c, 0, 0, 0); }

static inline long sys_ioctl(int fd, unsigned long request, void *argument)
{ return sys3(SYS_ioctl, fd, (long)request, (long)argument); }

static inline long sys_madvise(void *address, size_t bytes, int advice)
{ return sys3(SYS_madvise, (long)address, (long)bytes, advice); }

/* MAP_FIXED, readable and writable. 0 or a negative errno. */
static inline long sys_map(void *address, size_t bytes, int flags, int fd, uint64_t offset)
{
	long got = sys6(SYS_mmap, (long)address, (long)bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, (long)offset);
	return got < 0 && got > -4096 ? got : 0;
}

static inline long sys_punch(int fd, uint64_t offset, size_t bytes)
{ return sys6(SYS_fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (long)offset, (long)bytes, 0, 0); }

/* All of it, or an error: the end of the file is EIO. */
static inline long sys_transfer(long number, int fd, void *buffer, size_t bytes, uint64_t offset)
{
	for (size_t done = 0; done < bytes;) {
		long n = sys6(number, fd, (long)((char *)buffer + done), (long)(bytes - done), (long)(offset + done), 0, 0);
		if (n == -EINTR) continue;
		if (n <= 0) return n ? n : -EIO;
		done += (size_t)n;
	}
	return 0;
}

static inline long sys_read_at(int fd, void *buffer, size_t bytes, uint64_t offset)
{ return sys_transfer(SYS_pread64, fd, buffer, bytes, offset); }

static inline long sys_write_at(int fd, const void *buffer, size_t bytes, uint64_t offset)
{ return sys_transfer(SYS_pwrite64, fd, (void *)buffer, bytes, offset); }

/* CLOCK_MONOTONIC, without a call into the kernel where it need not. */
static inline int64_t clock_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static inline void sys_nap(long microseconds)
{
	struct timespec t = { microseconds / 1000000, microseconds % 1000000 * 1000 };
	sys3(SYS_nanosleep, (long)&t, 0, 0);
}

#endif
