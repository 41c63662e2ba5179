// SPDX-License-Identifier: Apache-2.0
/*
 * window.c - merge, zero, fold, reset: what changes QEMU's mappings of guest RAM while the guest runs. What the guest
 * has freed is given back in recycle.c.
 *
 * What must hold: a guest reads what it wrote last, and nothing waits for ever. Threads of QEMU (vCPUs, I/O threads,
 * the kernel on behalf of either) read and write the pages at every instant of what follows, from user space and from
 * inside system calls. Nobody is asked to stop.
 *
 * Merge and zero. A page may be replaced only while nobody can write it, by bytes that are proved to be its own.
 *
 *   1 register   MISSING|MINOR|WP with the tracking userfaultfd. MINOR alone doesn't catch a page that the memfd
 *                doesn't have; MISSING alone not one that it has; without WP khugepaged may put a huge page there
 *   2 zap        MADV_DONTNEED. From here on every access waits: no page table entry is left, and a fault finds the
 *                registration
 *   3 drain      register once more, which changes nothing but takes mmap_lock for writing. Somebody who found the page
 *                before the zap and copies into it holding mmap_lock for reading (/proc/PID/mem) is done when it
 *                returns
 *   4 compare    all bytes, by read from both files: a read through a mapping would allocate what is missing
 *   5 map        the store (or zeros) MAP_PRIVATE over it. The registration goes with the old mapping, the waiters
 *                stay: they wait in the userfaultfd, by address
 *   6 entry      the page map says where the bytes are now
 *   7 wake       they fault again, on the new mapping. A write copies the page in the kernel, with no help from anybody
 *   8 punch      the memfd's page goes back to the host. Never before the wake: a thread that waits inside a write to
 *                the memfd holds the inode's lock, which punching takes
 *
 * If the bytes differ, nothing has happened yet: unregister, register WP, wake. Registering again alone would not do,
 * for it never removes a mode: whoever woke would be trapped again, with nobody to wake it.
 *
 * What no zap can stop is a page that is pinned for DMA. So windows begin only while the pin gate is open (gate.c), and
 * only where no I/O that may pin is in flight (the range lock, lock.c).
 *
 * Fold. A page that the guest has written since (or any merged page) goes back to the memfd. Writes wait; reads go on.
 *
 *   1 register   WP with the folding userfaultfd, which is synchronous: a writer waits
 *   2 unmerge    MADV_UNMERGEABLE: ksmd, where it is on for all of QEMU, would drop the write-protect bit
 *   3 protect    UFFDIO_WRITEPROTECT. It marks also what has no page yet
 *   4 drain      as above: mmap_lock for writing
 *   5 copy       by write to the memfd, through the mapping
 *   6 map        the memfd, MAP_SHARED, over it; tracked again, which tells the backend that these pages were written
 *   7 entry      the page map says where the bytes are now
 *   8 wake
 *
 * Reset. The guest has freed the pages, so their bytes may go: the memfd is mapped and nothing is copied. Nobody has to
 * wait, but for I/O: whoever holds the range lock finds a page where he was told that it is. And the lock ends what a
 * dead backend had asked for: its successor may have given the pages back to the guest.
 *
 * QEMU resets pages itself, before it discards them (interpose.c): there is no backend to ask for it, and none to refuse.
 * It waits for the I/O, which no thread of QEMU's has to help to its end, but not for ever: the counts of a dead backend
 * stay until it has a successor.
 *
 * It folds pages itself, too, all that are merged of a file, before that goes to somebody who sees nothing else (gate.c). The
 * thread that does so may hold QEMU's own locks. So it waits for such I/O only, and for one window of the agent's at a time: those
 * are system calls, whoever opens them. After some seconds it gives up.
 *
 * A page that becomes a ring or a table is in no transfer, so most of what closes the gate is nothing to it: FOLD_HELD is refused only
 * where somebody was told of all of guest RAM.
 *
 * Deaths. The page map is written after the mapping and before anyone can write through it, while `busy` keeps the
 * backend's I/O away. So whoever holds the range lock finds: an entry says PRIVATE only while the memfd has the page's
 * bytes, and ZERO or SHARED only while QEMU's mapping has them. The backend may die at any time: it has no part in a
 * window. The agent's thread doesn't die without QEMU, and then there is no guest that could read. That is also why the
 * userfaultfds are opened here, and neither passed on nor closed: one that closes in a window loses a write.
 *
 * Between zap (or protect) and wake there are system calls only, made without libc: no allocation, no stdio, no lock
 * that a waiter could hold; and the thread has every signal blocked. Writes to the page map in between touch pages of
 * it that were read just before.
 *
 * Mappings. A mapping that is replaced gets the flags that QEMU had given it, and so joins with its neighbours again.
 * That costs splits on the way; when vm.max_map_count forbids those, a merge is not begun, and a fold takes the whole
 * run, from where its mapping begins to where it ends, which needs none (and if even that is refused, the ballast:
 * budget.c).
 */
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/stat.h>
#include "agent.h"
#include "sys.h"

bool (*quire_agent_test_step)(enum quire_agent_step, const struct quire_agent_place *);
struct store stores[QUIRE_AGENT_MAX_STORES];
unsigned store_count;

static uint8_t *ours, *theirs; /* what the memfd has, what the store has */
static const uint8_t zero_page[QUIRE_PAGE_BYTES];

#define PAGES_PER_HUGE 512u

bool window_prepare(void)
{
	if (ours) return true;
	size_t bytes = WINDOW_PAGES * PAGE;
	void *both = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (both == MAP_FAILED) return false;
	ours = both;
	theirs = ours + bytes;
	return true;
}

/* The flags of a new mapping. None of them decides over a byte, so one that fails costs a VMA at worst. */
static void dress(const struct quire_agent_place *p, const struct ram_file *file)
{
	sys_madvise(p->address, p->bytes, MADV_NOHUGEPAGE);
	if (file->dont_fork) sys_madvise(p->address, p->bytes, MADV_DONTFORK);
	if (file->dont_dump) sys_madvise(p->address, p->bytes, MADV_DONTDUMP);
}

/* KSM takes anonymous pages only: MERGEABLE is restored where QEMU gave it, but not set on what we share ourselves. */
static void dress_memfd(const struct quire_agent_place *p, const struct ram_file *file)
{
	dress(p, file);
	if (file->mergeable) sys_madvise(p->address, p->bytes, MADV_MERGEABLE);
	userfault_register(userfault_track, p->address, p->bytes, UFFDIO_REGISTER_MODE_WP);
}

static long map_memfd(const struct quire_agent_place *p, const struct ram_file *file)
{
	return sys_map(p->address, p->bytes, MAP_SHARED | (file->no_reserve ? MAP_NORESERVE : 0), p->file, p->offset);
}

/* Ends a window of merge in which nothing was changed. */
static void release(const struct quire_agent_place *p, const struct ram_file *file)
{
	/* An unregister that fails leaves a trap behind; a new mapping of the same bytes has none. */
	if (step(QUIRE_STEP_UNREGISTER, p) && userfault_unregister(userfault_track, p->address, p->bytes) < 0
	    && map_memfd(p, file) == 0)
		dress_memfd(p, file);
	userfault_register(userfault_track, p->address, p->bytes, UFFDIO_REGISTER_MODE_WP);
	userfault_wake(userfault_track, p->address, p->bytes);
}

/* Where from: a store, or zeros (store -1). */
struct source {
	int store;
	uint64_t offset;
	uint64_t entry, entry_step; /* what the page map says of the first page, and how much more of each next one */
};

/* The first page that differs; the number of pages if none does; or a negative errno. */
static long first_difference(const struct quire_agent_place *p, const struct source *from)
{
	long pages = (long)(p->bytes / PAGE);
	long error = sys_read_at(p->file, ours, p->bytes, p->offset);
	if (!error && from->store >= 0) error = sys_read_at(from->store, theirs, p->bytes, from->offset);
	if (error) return error;
	for (long i = 0; i < pages; i++)
		if (memcmp(ours + i * PAGE, from->store >= 0 ? theirs + i * PAGE : zero_page, PAGE)) return i;
	return pages;
}

static long merge(const struct quire_agent_place *p, const struct ram *ram, uint64_t gfn, const struct source *from,
		  long *differs)
{
	long pages = (long)(p->bytes / PAGE);
	uint64_t modes = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING;
	if (step(QUIRE_STEP_REGISTER_MINOR, p)) modes |= UFFDIO_REGISTER_MODE_MINOR;
	int flags = MAP_PRIVATE | MAP_NORESERVE | (from->store < 0 ? MAP_ANONYMOUS : 0);

	long error = userfault_register(userfault_track, p->address, p->bytes, modes);
	if (!error) error = sys_madvise(p->address, p->bytes, MADV_DONTNEED);
	if (!error) error = userfault_register(userfault_track, p->address, p->bytes, modes);
	if (error) goto out;
	step(QUIRE_STEP_ZAPPED, p);
	*differs = first_difference(p, from);
	step(QUIRE_STEP_COMPARED, p);
	if (*differs < pages) {
		error = *differs < 0 ? *differs : 0;
		goto out;
	}
	error = sys_map(p->address, p->bytes, flags, from->store, from->store < 0 ? 0 : from->offset);
	if (error) goto out;
	dress(p, ram->file);
	for (long i = 0; i < pages; i++) map_store(gfn + (uint64_t)i, from->entry + (uint64_t)i * from->entry_step);
	step(QUIRE_STEP_MAPPED, p);
	if (step(QUIRE_STEP_WAKE, p)) userfault_wake(userfault_track, p->address, p->bytes);
	/* A page that is not given back costs memory, no bytes. */
	if (step(QUIRE_STEP_PUNCH, p)) sys_punch(p->file, p->offset, p->bytes);
	return 0;
out:
	release(p, ram->file);
	return error;
}

static long fold(const struct quire_agent_place *p, const struct ram *ram, uint64_t gfn)
{
	long error = 0;
	if (step(QUIRE_STEP_PROTECT, p)) {
		error = userfault_register(userfault_fold, p->address, p->bytes, UFFDIO_REGISTER_MODE_WP);
		if (!error) sys_madvise(p->address, p->bytes, MADV_UNMERGEABLE); /* a kernel without KSM says EINVAL */
		if (!error) error = userfault_protect(userfault_fold, p->address, p->bytes);
		if (!error)
			error = userfault_register(userfault_fold, p->address, p->bytes, UFFDIO_REGISTER_MODE_WP);
	}
	step(QUIRE_STEP_PROTECTED, p);
	if (!error) error = sys_write_at(p->file, p->address, p->bytes, p->offset);
	step(QUIRE_STEP_COPIED, p);
	if (!error) error = map_memfd(p, ram->file);
	if (error) {
		userfault_unregister(userfault_fold, p->address, p->bytes);
		userfault_wake(userfault_fold, p->address, p->bytes);
		sys_punch(p->file, p->offset, p->bytes); /* what was copied for nothing */
		return error;
	}
	dress_memfd(p, ram->file);
	for (uint64_t i = 0; i < p->bytes / PAGE; i++) map_store(gfn + i, QUIRE_MAP_PRIVATE);
	step(QUIRE_STEP_FOLDED, p);
	if (step(QUIRE_STEP_FOLD_WAKE, p)) userfault_wake(userfault_fold, p->address, p->bytes);
	return 0;
}

long window_map_back(const struct ram *ram, uint64_t gfn, uint64_t pages)
{
	struct quire_agent_place p = place_of(ram, gfn, pages);
	long error = map_memfd(&p, ram->file);
	if (error == -ENOMEM && budget_drop_ballast()) error = map_memfd(&p, ram->file);
	if (error) return error;
	dress_memfd(&p, ram->file);
	for (uint64_t i = 0; i < pages; i++) map_store(gfn + i, QUIRE_MAP_PRIVATE);
	step(QUIRE_STEP_RESET, &p);
	return 0;
}

/* How many of the pages from `gfn` on, at most `max`, are merged (or are not). */
static uint64_t alike(uint64_t gfn, uint64_t max, bool merged)
{
	uint64_t n = 0;
	while (n < max && map_merged(map_load(gfn + n)) == merged) n++;
	return n;
}

/* How much more than its predecessor's an entry is where the mapping goes on. */
static uint64_t entry_step(uint64_t entry)
{
	return (entry & 0xff) == QUIRE_MAP_SHARED ? 1ull << QUIRE_MAP_SLOT_SHIFT : 0;
}

/*
 * The run that a merged page is in: neighbours with the same content, slot after slot. It begins and ends where
 * mappings do, so nothing is split when all of it is mapped anew.
 */
static void whole_run(const struct ram *ram, uint64_t *gfn, uint64_t *pages)
{
	uint64_t first = *gfn, last = *gfn + *pages - 1, end = ram->gfn + ram->pages - 1;
	while (first > ram->gfn && map_merged(map_load(first - 1)) && ram_last(first - 1) == ram
	       && map_load(first) == map_load(first - 1) + entry_step(map_load(first - 1)))
		first--;
	while (last < end && map_merged(map_load(last + 1)) && ram_last(last + 1) == ram
	       && map_load(last + 1) == map_load(last) + entry_step(map_load(last)))
		last++;
	*gfn = first;
	*pages = last + 1 - first;
}

/* Folds pages that are all merged. Takes the range lock. */
static struct quire_agent_outcome fold_window(const struct ram *ram, uint64_t gfn, uint64_t pages,
					      bool try_open(uint64_t, uint64_t))
{
	struct quire_agent_outcome result = { .done = 0 };
	uint64_t first = gfn, count = pages;
	for (bool whole = false;; whole = true) {
		if (!try_open(first, count)) {
			result.reason = QUIRE_AGENT_BUSY;
			return result;
		}
		struct quire_agent_place p = place_of(ram, first, count);
		long error = fold(&p, ram, first);
		lock_close_window(first, count);
		if (!error) {
			budget_spend(2); /* if it was the middle of a run; a recount knows better */
			result.done = (uint32_t)pages;
			return result;
		}
		if (error != -ENOMEM || (whole && !budget_drop_ballast())) {
			result.reason = QUIRE_AGENT_FAILED;
			result.detail = (uint32_t)-error;
			return result;
		}
		/* Its neighbours may be in a transfer, where a page that becomes a ring is in none. */
		if (!gate_pins() && !gate_starts()) whole_run(ram, &first, &count);
	}
}

/* No huge pages any more in what the window touches: khugepaged would fill holes again. */
static long keep_small(const struct ram *ram, uint64_t gfn, uint64_t pages)
{
	struct ram_file *file = ram->file;
	uint64_t first = ram->offset / PAGE + (gfn - ram->gfn);
	for (uint64_t huge = first / PAGES_PER_HUGE; huge <= (first + pages - 1) / PAGES_PER_HUGE; huge++) {
		if (file->small_pages[huge / 8] >> huge % 8 & 1) continue;
		uint64_t begin = huge * PAGES_PER_HUGE * PAGE, end = begin + PAGES_PER_HUGE * PAGE;
		uint64_t file_end = file->offset + (file->end - file->begin);
		if (begin < file->offset) begin = file->offset;
		if (end > file_end) end = file_end;
		long error = sys_madvise((char *)file->begin + (begin - file->offset), end - begin, MADV_NOHUGEPAGE);
		/* A kernel without transparent huge pages says EINVAL, and needs no advice. */
		if (error && error != -EINVAL) return error;
		file->small_pages[huge / 8] |= (uint8_t)(1u << huge % 8);
		budget_spend(2);
	}
	return 0;
}

static struct quire_agent_outcome failed(uint64_t done, long error)
{
	return error == -ENOMEM ? refuse(done, QUIRE_AGENT_BUDGET, 0) : refuse(done, QUIRE_AGENT_FAILED, (uint64_t)-error);
}

/* How many of the pages, from the first on, may be merged. */
static uint64_t private_pages(uint64_t gfn, uint64_t pages)
{
	uint64_t n = 0;
	while (n < pages && map_load(gfn + n) == QUIRE_MAP_PRIVATE) n++;
	return n;
}

static struct quire_agent_outcome merge_window(const struct ram *ram, uint64_t gfn, uint64_t pages,
					       const struct source *from, bool first)
{
	uint64_t is_private = private_pages(gfn, pages);
	if (is_private < pages) return refuse(0, QUIRE_AGENT_STATE, is_private);
	if (first && !budget_allows(2)) return refuse(0, QUIRE_AGENT_BUDGET, 0);
	long error = keep_small(ram, gfn, pages);
	if (error) return failed(0, error);
	if (!lock_open_window(gfn, pages)) return refuse(0, QUIRE_AGENT_BUSY, 0);
	/* Once more: until the window was open the backend could recycle a page. */
	is_private = private_pages(gfn, pages);
	if (is_private < pages) {
		lock_close_window(gfn, pages);
		return refuse(0, QUIRE_AGENT_STATE, is_private);
	}
	lock_note_merge(gfn, pages);
	struct quire_agent_place p = place_of(ram, gfn, pages);
	long differs = (long)pages;
	error = merge(&p, ram, gfn, from, &differs);
	lock_close_window(gfn, pages);
	if (error) return failed(0, error);
	if (differs < (long)pages) return refuse(0, QUIRE_AGENT_DIFFERS, (uint64_t)differs);
	if (first) budget_spend(2); /* what follows in the run joins it */
	return refuse(pages, QUIRE_AGENT_DONE, 0);
}

/* Folds the next pages of a run that there is something to do for. `done` counts also those that needed nothing. */
static struct quire_agent_outcome fold_some(const struct ram *ram, uint64_t gfn, uint64_t pages, bool diverged)
{
	uint64_t merged = alike(gfn, pages, true);
	if (merged == 0) return refuse(alike(gfn, pages, false), QUIRE_AGENT_DONE, 0);
	uint64_t skip = 0;
	if (diverged) {
		/* One kind of mapping at a time: what counts as diverged depends on it. */
		uint64_t kind = map_load(gfn) & 0xff, n = 1;
		while (n < merged && (map_load(gfn + n) & 0xff) == kind) n++;
		struct quire_agent_place p = place_of(ram, gfn, n);
		struct range found;
		long count = userfault_diverged(p.address, p.bytes, kind == QUIRE_MAP_ZERO, &found, 1);
		if (count < 0) return refuse(0, QUIRE_AGENT_FAILED, (uint64_t)-count);
		if (count == 0) return refuse(n, QUIRE_AGENT_DONE, 0);
		skip = (found.begin - (uintptr_t)p.address) / PAGE;
		merged = (found.end - found.begin) / PAGE;
	}
	if (merged > WINDOW_PAGES) merged = WINDOW_PAGES;
	struct quire_agent_outcome result = fold_window(ram, gfn + skip, merged, lock_open_window);
	result.done += (uint32_t)skip;
	return result;
}

/* One window: as many merged pages from `gfn` on as a range lock is for, and all in one mapping. */
static long reset_window(const struct ram *ram, uint64_t gfn, uint64_t *pages, bool try_open(uint64_t, uint64_t))
{
	/* A new mapping would drop QEMU's own registration. */
	if (gate_suspects(GATE_USERFAULT)) return -EBUSY;
	*pages = alike(gfn, *pages < QUIRE_LOCK_PAGES ? *pages : QUIRE_LOCK_PAGES, true);
	if (!try_open(gfn, *pages)) return -EAGAIN;
	long error = window_map_back(ram, gfn, *pages);
	lock_close_window(gfn, *pages);
	return error;
}

/* A request of a guest that lasts so long is stuck, or was a dead backend's. */
#define RESET_PATIENCE_US 100000
#define RESET_NAP_US      50

long window_reset(uint64_t gfn, uint64_t pages)
{
	long waited = 0, error = 0;
	while (pages && !error) {
		sigset_t old;
		agent_lock(&old);
		uint64_t n = alike(gfn, pages, false);
		if (n == 0) {
			const struct ram *ram = ram_of_gfns(gfn, 1);
			uint64_t left = ram ? ram->gfn + ram->pages - gfn : 0;
			n = pages < left ? pages : left;
			error = !ram || ram->file->unmapped ? -EINVAL : reset_window(ram, gfn, &n, lock_open_own_window);
		}
		agent_unlock(&old);
		if (error == -EAGAIN) {
			error = (waited += RESET_NAP_US) > RESET_PATIENCE_US ? -EBUSY : 0;
			sys_nap(RESET_NAP_US);
			continue;
		}
		gfn += n;
		pages -= n;
	}
	return error;
}

/*
 * The next turn of bringing a file back, from the page *gfn on, which moves behind what was dealt with. With the window lock.
 * Regions of long ago count, too: their pages may be merged yet. But a page that came into another region since is there.
 */
static long bring_back_some(const struct ram_file *file, uint64_t *gfn)
{
	const struct ram *ram = ram_last(*gfn);
	uint64_t left = ram->gfn + ram->pages - *gfn, most = left < QUIRE_AGENT_MAX_PAGES ? left : QUIRE_AGENT_MAX_PAGES;
	uint64_t unmerged = map_count_unmerged(*gfn, most);
	if (unmerged || ram->file != file) {
		*gfn += unmerged ? unmerged : 1;
		return 0;
	}
	uint64_t n = 1;
	while (n < left && n < WINDOW_PAGES && map_merged(map_load(*gfn + n)) && ram_last(*gfn + n) == ram) n++;
	if (gate_pins()) return -EBUSY;
	if (gate_starts()) return -EAGAIN;
	struct quire_agent_outcome outcome = fold_window(ram, *gfn, n, lock_open_own_window);
	*gfn += outcome.done;
	return outcome.reason == QUIRE_AGENT_DONE ? 0 : outcome.reason == QUIRE_AGENT_BUSY ? -EAGAIN : -(long)outcome.detail;
}

/* The host copies some GiB a second. Who holds a page for longer than the second of these is stuck, or was a dead backend. */
#define BRING_BACK_NS      10000000000ll
#define BRING_BACK_BUSY_NS 2000000000ll
#define BRING_BACK_NAP_US  200

long window_bring_back(uint64_t device, uint64_t inode)
{
	int64_t began = clock_ns(), moved = began;
	long error = 0;
	for (uint64_t gfn = 0, before = 0; !error; before = gfn) {
		sigset_t old;
		agent_lock(&old);
		/* Looked up each time: QEMU may unmap it meanwhile, and then nothing of it is merged. */
		const struct ram_file *file = ram_mapped_file(device, inode);
		gfn = file ? ram_next(file, gfn) : UINT64_MAX;
		if (gfn != UINT64_MAX) error = bring_back_some(file, &gfn);
		agent_unlock(&old);
		if (gfn == UINT64_MAX) break;
		int64_t now = clock_ns();
		if (gfn != before) moved = now;
		if (error == -EAGAIN) {
			error = now - moved > BRING_BACK_BUSY_NS ? -EBUSY : 0;
			sys_nap(BRING_BACK_NAP_US);
		}
		if (!error && now - began > BRING_BACK_NS) error = -EBUSY;
	}
	return error;
}

/* A reset needs no permission but mappings: if there are none left, the whole run is folded, and then it needs none. */
static struct quire_agent_outcome reset_some(const struct ram *ram, uint64_t gfn, uint64_t pages)
{
	uint64_t n = alike(gfn, pages, false);
	if (n) return refuse(n, QUIRE_AGENT_DONE, 0);
	n = pages;
	long error = reset_window(ram, gfn, &n, lock_open_window);
	if (error == -EAGAIN) return refuse(0, QUIRE_AGENT_BUSY, 0);
	if (error == -ENOMEM && !gate_closed()) {
		uint64_t first = gfn, count = 1;
		whole_run(ram, &first, &count);
		struct quire_agent_outcome folded = fold_window(ram, first, count, lock_open_window);
		if (folded.reason != QUIRE_AGENT_DONE) return refuse(0, folded.reason, folded.detail);
		n = first + count - gfn < pages ? first + count - gfn : pages;
		error = 0;
	}
	return error ? failed(0, error) : refuse(n, QUIRE_AGENT_DONE, 0);
}

void window_track(const struct ram *ram)
{
	if (!map_has_merged(ram->gfn, ram->pages)) {
		userfault_register(userfault_track, ram->address, ram->pages * PAGE, UFFDIO_REGISTER_MODE_WP);
		return;
	}
	for (uint64_t i = 0; i < ram->pages;) {
		uint64_t n = alike(ram->gfn + i, ram->pages - i, false);
		if (n) userfault_register(userfault_track, ram->address + i * PAGE, n * PAGE, UFFDIO_REGISTER_MODE_WP);
		i += n;
		if (i < ram->pages) i += alike(ram->gfn + i, ram->pages - i, true);
	}
}

static bool store_has(const struct quire_agent_run *run)
{
	if (run->store >= store_count || run->slot >> QUIRE_MAP_SLOT_BITS) return false;
	return run->slot <= stores[run->store].pages && run->page_count <= stores[run->store].pages - run->slot;
}

/* One window of the run, from its page `done` on. With the window lock. */
static struct quire_agent_outcome next_window(enum quire_agent_operation operation, const struct quire_agent_run *run,
					      uint64_t done)
{
	uint64_t gfn = run->gfn + done, pages = run->page_count - done;
	/* Looked up each time: what the region is in may have been unmapped since. */
	const struct ram *ram = ram_of_gfns(run->gfn, run->page_count);
	if (!ram || atomic_load(&ram->file->unmapped)) return refuse(0, QUIRE_AGENT_INVALID, 0);
	bool closed = operation == QUIRE_AGENT_FOLD_HELD ? gate_suspects(GATE_USERFAULT | GATE_ALL_OF_RAM)
		      : operation == QUIRE_AGENT_RESET	 ? gate_suspects(GATE_ALL_OF_RAM)
							 : gate_closed();
	if (closed) return refuse(0, QUIRE_AGENT_GATE_CLOSED, 0);
	if (operation == QUIRE_AGENT_RESET) return reset_some(ram, gfn, pages);

	struct source from = { .store = -1, .entry = QUIRE_MAP_ZERO };
	uint64_t window = pages < WINDOW_PAGES ? pages : WINDOW_PAGES;
	switch (operation) {
	case QUIRE_AGENT_MERGE:
		from.store = stores[run->store].file;
		from.offset = (run->slot + done) * PAGE;
		from.entry = QUIRE_MAP_SHARED | (run->slot + done) << QUIRE_MAP_SLOT_SHIFT
			     | (uint64_t)run->store << QUIRE_MAP_STORE_SHIFT;
		from.entry_step = entry_step(from.entry);
		return merge_window(ram, gfn, window, &from, done == 0);
	case QUIRE_AGENT_ZERO:
		return merge_window(ram, gfn, window, &from, done == 0);
	case QUIRE_AGENT_FOLD:
	case QUIRE_AGENT_FOLD_HELD:
	case QUIRE_AGENT_FOLD_DIVERGED:
		return fold_some(ram, gfn, pages, operation == QUIRE_AGENT_FOLD_DIVERGED);
	default:
		return refuse(0, QUIRE_AGENT_INVALID, 0);
	}
}

struct quire_agent_outcome window_run(enum quire_agent_operation operation, const struct quire_agent_run *run)
{
	struct quire_agent_outcome result = { .done = 0 };
	if (run->page_count == 0 || run->page_count > QUIRE_AGENT_MAX_PAGES || !ram_of_gfns(run->gfn, run->page_count)
	    || (operation == QUIRE_AGENT_MERGE && !store_has(run)))
		return refuse(0, QUIRE_AGENT_INVALID, 0);
	while (result.done < run->page_count && result.reason == QUIRE_AGENT_DONE) {
		sigset_t old;
		agent_lock(&old);
		struct quire_agent_outcome window = next_window(operation, run, result.done);
		agent_unlock(&old);
		if (window.reason == QUIRE_AGENT_DIFFERS || window.reason == QUIRE_AGENT_STATE) window.detail += result.done;
		result.done += window.done;
		result.reason = window.reason;
		result.detail = window.detail;
	}
	return result;
}
