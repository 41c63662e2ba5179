// SPDX-License-Identifier: Apache-2.0
/*
 * ram.c - where guest RAM is in QEMU's address space, and the page map.
 *
 * A file of guest RAM is found by its device and inode in /proc/self/maps, once, before anything in it is merged: later
 * the mappings there aren't all of that file. It must be mapped whole, linearly, and only once, for a second mapping of
 * the same page would see the hole that a merge leaves in the file.
 *
 * Regions (guest frame numbers on ranges of such files) may change with every attach, as the guest's memory map does.
 * They stand in a table that is replaced, never changed, because threads of QEMU read it without a lock at any time;
 * the few tables of a QEMU's life are kept. How they follow each other changes with the window lock held: a guest may go
 * to and fro between two maps as often as it likes, and the table that is there already comes to the front again.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "agent.h"

#define FILES_MAX QUIRE_AGENT_MAX_FILES
#define PAGES_PER_HUGE 512u

static struct ram_file files[FILES_MAX];
static _Atomic unsigned file_count;
static struct ram_table empty;
struct ram_table *_Atomic ram_now = &empty;

_Atomic(_Atomic uint64_t *) map_entries;
static uint8_t *map_base;
static int map_file = -1;
static uint64_t map_pages, map_locks;
static struct stat map_identity;

/* ---- QEMU's address space */

struct mapping {
	uintptr_t begin, end;
	uint64_t offset, inode;
	unsigned major, minor;
	char mode[5];
};

static bool parse(const char *line, struct mapping *m)
{
	unsigned long begin, end, offset, inode;
	if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu", &begin, &end, m->mode, &offset, &m->major, &m->minor, &inode) != 7)
		return false;
	m->begin = begin;
	m->end = end;
	m->offset = offset;
	m->inode = inode;
	return true;
}

size_t ram_count_mappings(void)
{
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	char *text = malloc(1 << 16);
	size_t count = 0;
	ssize_t n;
	while (fd >= 0 && text && (n = read(fd, text, 1 << 16)) > 0)
		for (char *at = text; (at = memchr(at, '\n', (size_t)(text + n - at))); at++) count++;
	free(text);
	if (fd >= 0) close(fd);
	return count;
}

/* Reads the flags of the mapping at `address`. False, with a sentence, if we can't live with them. */
static bool read_flags(struct ram_file *file, char *text)
{
	FILE *smaps = fopen("/proc/self/smaps", "re");
	char *line = NULL;
	size_t room = 0;
	struct mapping m;
	bool here = false, found = false, usable = true;
	while (smaps && !found && getline(&line, &room, smaps) > 0) {
		if (parse(line, &m)) here = m.begin <= file->begin && file->begin < m.end;
		if (!here || strncmp(line, "VmFlags:", 8)) continue;
		found = true;
		file->dont_fork = strstr(line, " dc");
		file->dont_dump = strstr(line, " dd");
		file->mergeable = strstr(line, " mg");
		file->no_reserve = strstr(line, " nr");
		const char *wrong = strstr(line, " ht") ? "in huge pages of a fixed pool"
				    : strstr(line, " lo") ? "locked"
				    : strstr(line, " um") || strstr(line, " uw") || strstr(line, " ui")
					    ? "registered with another userfaultfd" : NULL;
		if (wrong) {
			snprintf(text, 256, "guest RAM is %s: it can't be merged", wrong);
			usable = false;
		}
	}
	if (!found) snprintf(text, 256, "cannot read /proc/self/smaps");
	free(line);
	if (smaps) fclose(smaps);
	return found && usable;
}

static bool find_mapping(struct ram_file *file, char *text)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char *line = NULL;
	size_t room = 0;
	struct mapping m;
	const char *wrong = NULL;
	while (maps && getline(&line, &room, maps) > 0) {
		if (!parse(line, &m) || m.inode != file->inode || makedev(m.major, m.minor) != file->device) continue;
		if (strncmp(m.mode, "rw", 2) || m.mode[3] != 's') {
			wrong = "not mapped shared, readable and writable";
		} else if (!file->end) {
			file->begin = m.begin;
			file->end = m.end;
			file->offset = m.offset;
		} else if (m.begin == file->end && m.offset == file->offset + (file->end - file->begin)) {
			file->end = m.end;
		} else {
			wrong = "mapped more than once, or in parts";
		}
	}
	if (!maps) wrong = "not to be found: /proc/self/maps can't be read";
	else if (!file->end) wrong = "not mapped";
	free(line);
	if (maps) fclose(maps);
	if (wrong) snprintf(text, 256, "a file of guest RAM is %s in QEMU", wrong);
	return !wrong;
}

struct ram_file *ram_find_file(int fd, char *text)
{
	struct stat s;
	if (fstat(fd, &s) < 0) {
		snprintf(text, 256, "cannot stat a file of guest RAM");
		return NULL;
	}
	for (unsigned i = 0; i < file_count; i++) {
		if (files[i].device != s.st_dev || files[i].inode != s.st_ino || files[i].unmapped) continue;
		close(fd);
		return &files[i];
	}
	if (file_count == FILES_MAX) {
		snprintf(text, 256, "more than %u files of guest RAM", FILES_MAX);
		return NULL;
	}
	struct ram_file *file = &files[file_count];
	*file = (struct ram_file){ .fd = fd, .device = s.st_dev, .inode = s.st_ino };
	if (!find_mapping(file, text) || !read_flags(file, text)) return NULL;
	uint64_t pages = (file->offset + (file->end - file->begin)) / PAGE;
	file->small_pages = calloc(pages / PAGES_PER_HUGE / 8 + 1, 1);
	if (!file->small_pages) {
		snprintf(text, 256, "no memory in QEMU");
		return NULL;
	}
	atomic_fetch_add(&file_count, 1);
	return file;
}

bool ram_is_file(uint64_t device, uint64_t inode)
{
	for (unsigned i = 0; i < atomic_load(&file_count); i++)
		if (files[i].device == device && files[i].inode == inode) return true;
	return false;
}

bool ram_is_mapped(uintptr_t address, size_t bytes)
{
	for (unsigned i = 0; i < atomic_load(&file_count); i++)
		if (address < files[i].end && files[i].begin < address + bytes && !files[i].unmapped) return true;
	return false;
}

struct ram_file *ram_mapped_file(uint64_t device, uint64_t inode)
{
	for (unsigned i = 0; i < atomic_load(&file_count); i++)
		if (files[i].device == device && files[i].inode == inode && !files[i].unmapped) return &files[i];
	return NULL;
}

const struct ram *ram_last(uint64_t gfn)
{
	for (const struct ram_table *table = atomic_load(&ram_now); table; table = table->before)
		for (unsigned i = 0; i < table->count; i++)
			if (gfn - table->regions[i].gfn < table->regions[i].pages) return &table->regions[i];
	return NULL;
}

uint64_t ram_next(const struct ram_file *file, uint64_t gfn)
{
	uint64_t next = UINT64_MAX;
	for (const struct ram_table *table = atomic_load(&ram_now); table; table = table->before)
		for (unsigned i = 0; i < table->count; i++) {
			const struct ram *ram = &table->regions[i];
			if (ram->file != file || ram->gfn + ram->pages <= gfn) continue;
			uint64_t first = ram->gfn > gfn ? ram->gfn : gfn;
			if (first < next) next = first;
		}
	return next;
}

bool ram_has_merged(void)
{
	for (const struct ram_table *table = atomic_load(&ram_now); table; table = table->before)
		for (unsigned i = 0; i < table->count; i++)
			if (map_has_merged(table->regions[i].gfn, table->regions[i].pages)) return true;
	return false;
}

/* Of the region, what lies in the range. */
static void forget_merged(const struct ram *ram, uintptr_t begin, uintptr_t end)
{
	uintptr_t first = (uintptr_t)ram->address, last = first + ram->pages * PAGE;
	if (begin < first) begin = first;
	if (end > last) end = last;
	if (begin >= end || !map_has_merged(ram->gfn, ram->pages)) return;
	for (uint64_t gfn = ram->gfn + (begin - first) / PAGE; gfn < ram->gfn + (end - first + PAGE - 1) / PAGE; gfn++)
		/* Where the region was gone before, other memory may have come. */
		if (map_merged(map_load(gfn)) && ram_last(gfn)->file == ram->file) map_store(gfn, QUIRE_MAP_PRIVATE);
}

/*
 * Whoever could do I/O on these pages has been told that there is no such memory, or it is QEMU itself. So the range lock
 * isn't asked; munmap couldn't wait for it.
 */
void ram_unmapped(uintptr_t address, size_t bytes)
{
	for (unsigned i = 0; i < atomic_load(&file_count); i++) {
		struct ram_file *file = &files[i];
		if (file->unmapped || address >= file->end || file->begin >= address + bytes) continue;
		file->unmapped = true;
		/* Or the host would keep the memory for us. */
		close(file->fd);
		file->fd = -1;
		for (const struct ram_table *table = atomic_load(&ram_now); table; table = table->before)
			for (unsigned j = 0; j < table->count; j++)
				if (table->regions[j].file == file)
					forget_merged(&table->regions[j], address, address + bytes);
	}
}

bool ram_has_other(const struct ram *ram)
{
	for (const struct ram_table *table = atomic_load(&ram_now); table; table = table->before)
		for (unsigned i = 0; i < table->count; i++) {
			const struct ram *other = &table->regions[i];
			if (other->file != ram->file && !other->file->unmapped && other->gfn < ram->gfn + ram->pages
			    && ram->gfn < other->gfn + other->pages)
				return true;
		}
	return false;
}

bool ram_is_sealed(int fd)
{
	int seals = fcntl(fd, F_GET_SEALS);
	return seals >= 0 && seals & F_SEAL_SHRINK;
}

/* ---- regions */

bool ram_place(struct ram *ram, char *text)
{
	const struct ram_file *file = ram->file;
	uint64_t mapped = file->end - file->begin;
	if (ram->offset % PAGE || ram->offset < file->offset || ram->offset - file->offset > mapped
	    || ram->pages > (mapped - (ram->offset - file->offset)) / PAGE) {
		snprintf(text, 256, "QEMU doesn't map all of the guest RAM at 0x%llx", (unsigned long long)(ram->gfn * PAGE));
		return false;
	}
	ram->address = (char *)file->begin + (ram->offset - file->offset);
	return true;
}

/* Takes the table that says the same out of those before `now`, if there is one. */
static struct ram_table *take_same(struct ram_table *now, const struct ram_table *as)
{
	for (struct ram_table **at = &now->before; *at; at = &(*at)->before) {
		struct ram_table *same = *at;
		if (same->count != as->count || memcmp(same->regions, as->regions, sizeof as->regions)) continue;
		*at = same->before;
		return same;
	}
	return NULL;
}

bool ram_publish(const struct ram_table *table)
{
	struct ram_table *now = atomic_load(&ram_now); /* nobody else changes it */
	if (now->count == table->count && !memcmp(now->regions, table->regions, sizeof table->regions)) return true;
	struct ram_table *new = calloc(1, sizeof *new);
	if (!new) return false;
	sigset_t old;
	agent_lock(&old);
	struct ram_table *next = take_same(now, table);
	if (!next) {
		next = new;
		next->count = table->count;
		memcpy(next->regions, table->regions, sizeof next->regions);
	}
	next->before = now;
	atomic_store(&ram_now, next);
	agent_unlock(&old);
	if (next != new) free(new);
	return true;
}

const struct ram *ram_of_gfns(uint64_t gfn, uint64_t pages)
{
	const struct ram_table *table = atomic_load(&ram_now);
	for (unsigned i = 0; i < table->count; i++) {
		const struct ram *ram = &table->regions[i];
		if (gfn >= ram->gfn && gfn - ram->gfn < ram->pages && pages <= ram->pages - (gfn - ram->gfn)) return ram;
	}
	return NULL;
}

const struct ram *ram_of_addresses(const struct ram_table *table, uintptr_t address, size_t bytes, uint64_t *gfn,
				   uint64_t *pages)
{
	const struct ram *first = NULL;
	if (bytes == 0 || address + bytes < address) return NULL;
	for (unsigned i = 0; i < table->count; i++) {
		const struct ram *ram = &table->regions[i];
		uintptr_t begin = (uintptr_t)ram->address;
		if (address >= begin + ram->pages * PAGE || begin >= address + bytes) continue;
		if (!first || ram->address < first->address) first = ram;
	}
	if (!first) return NULL;
	uintptr_t begin = (uintptr_t)first->address, end = address + bytes;
	uint64_t from = address > begin ? (address - begin) / PAGE : 0;
	uint64_t to = end - begin < first->pages * PAGE ? (end - begin + PAGE - 1) / PAGE : first->pages;
	*gfn = first->gfn + from;
	*pages = to - from;
	return first;
}

/* ---- the page map */

bool map_attach(int fd, char *text, enum quire_agent_status *status)
{
	struct stat s;
	struct quire_map_header header;
	*status = QUIRE_AGENT_REFUSED;
	if (fstat(fd, &s) < 0 || pread(fd, &header, sizeof header, 0) != (ssize_t)sizeof header
	    || memcmp(header.magic, QUIRE_MAP_MAGIC, sizeof header.magic) || header.version != QUIRE_MAP_VERSION
	    || header.page_count % QUIRE_LOCK_PAGES || header.page_count > UINT64_MAX / 64
	    || header.locks_offset != sizeof header + header.page_count * sizeof(uint64_t)
	    || (uint64_t)s.st_size < header.locks_offset + header.page_count / QUIRE_LOCK_PAGES * sizeof(struct quire_lock)) {
		snprintf(text, 256, "the page map isn't one, or one of another version");
	} else if (map_base) {
		if (s.st_dev == map_identity.st_dev && s.st_ino == map_identity.st_ino) {
			close(fd);
			return true;
		}
		/* Where no page is merged any more its bytes are where another map says, too: it is only that there can't be two. */
		bool merged = ram_has_merged();
		if (merged) *status = QUIRE_AGENT_OTHER_MAP;
		snprintf(text, 256, "this is not the page map that QEMU's memory is described in so far%s: start the VM anew",
			 merged ? "" : ", so nothing is merged any more");
	} else if (!ram_is_sealed(fd)) {
		snprintf(text, 256, "the page map isn't sealed against shrinking");
	} else {
		void *base = mmap(NULL, (size_t)s.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
		if (base == MAP_FAILED) {
			snprintf(text, 256, "cannot map the page map: QEMU's address space is limited");
			close(fd);
			return false;
		}
		madvise(base, (size_t)s.st_size, MADV_DONTDUMP);
		madvise(base, (size_t)s.st_size, MADV_DONTFORK);
		map_base = base;
		map_pages = header.page_count;
		map_locks = header.locks_offset;
		map_identity = s;
		map_file = fd;
		atomic_store(&map_entries, (_Atomic uint64_t *)(map_base + sizeof header));
		return true;
	}
	close(fd);
	return false;
}

bool map_covers(uint64_t gfn, uint64_t pages) { return gfn < map_pages && pages <= map_pages - gfn; }

struct quire_lock *map_lock(uint64_t gfn) { return (struct quire_lock *)(map_base + map_locks) + gfn / QUIRE_LOCK_PAGES; }

uint32_t map_generation(void)
{
	return __atomic_load_n(&((struct quire_map_header *)map_base)->generation, __ATOMIC_SEQ_CST);
}

uint64_t map_count_unmerged(uint64_t gfn, uint64_t pages)
{
	/* Entries that the file has no memory for are 0; reading them through the mapping would give them some. */
	off_t begin = (off_t)(sizeof(struct quire_map_header) + gfn * sizeof(uint64_t)), at = begin;
	off_t end = begin + (off_t)(pages * sizeof(uint64_t));
	while (at < end && (at = lseek(map_file, at, SEEK_DATA)) >= 0 && at < end) {
		off_t hole = lseek(map_file, at, SEEK_HOLE);
		if (hole <= at || hole > end) hole = end;
		for (; at < hole; at += (off_t)sizeof(uint64_t))
			if (map_merged(atomic_load((_Atomic uint64_t *)(map_base + at))))
				return (uint64_t)(at - begin) / sizeof(uint64_t);
	}
	return pages;
}

bool map_has_merged(uint64_t gfn, uint64_t pages) { return map_count_unmerged(gfn, pages) < pages; }
