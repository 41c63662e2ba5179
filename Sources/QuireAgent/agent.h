/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's rooms and what each gives to the others.
 *
 *   agent.c       the constructor, the thread, the connection
 *   protocol.c    messages: what is believed and what isn't
 *   ram.c         where guest RAM is mapped, and how
 *   window.c      merge, zero, fold, reset
 *   recycle.c     what the guest has freed: claim, punch, release
 *   userfault.c   the two userfaultfds
 *   lock.c        the range lock, QEMU's side
 *   budget.c      how many mappings may be spent
 *   gate.c        may anything be pinned?
 *   interpose.c   the calls of QEMU that the above must know of
 *
 * One thread of ours, the agent's, does everything but what an interposer does in the calling thread. `agent_window` is
 * held over each window and over each change of what a window relies on (the gate, a region that goes); it is never
 * waited for inside a window. A thread of QEMU takes it with signals blocked, through agent_lock().
 */
#ifndef AGENT_H
#define AGENT_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include "quire_agent.h"
#include "quire_layout.h"

/* The page map and the states of a guest's pages are shared with other processes. */
_Static_assert(sizeof(_Atomic uint8_t) == 1 && sizeof(_Atomic uint64_t) == 8, "no lock may be hidden in them");

#define PAGE ((size_t)QUIRE_PAGE_BYTES)
/* A window is at most this long: the comparing of it is what a guest may wait for. */
#define WINDOW_PAGES 64u

/* ---- agent.c */
bool agent_is_here(void);      /* this process is the agent's: not a child of QEMU that has yet to exec */
void agent_start_in_qemu(void); /* does nothing but the first time, and only if the constructor said so */
void agent_wake(void);         /* makes the thread look at the gate */
void agent_lock(sigset_t *old);
void agent_unlock(const sigset_t *old);

/* ---- protocol.c */
struct connection {
	int socket;
	bool attached;
	bool told, told_closed, told_assigned; /* what the backend knows of the gate */
	char told_text[256];
};
void connection_begin(struct connection *, int socket);
bool connection_serve(struct connection *); /* one message; false: the connection is over */
bool connection_tell_gate(struct connection *);

/* ---- ram.c */
/* A file that guest RAM is in, and where QEMU maps it: linearly, once. Lives as long as QEMU. */
struct ram_file {
	int fd;
	uint64_t device, inode;
	uintptr_t begin, end;  /* the mapping */
	uint64_t offset;       /* in the file, of `begin` */
	bool dont_fork, dont_dump, mergeable, no_reserve; /* flags that the mapping had */
	uint8_t *small_pages;  /* a bit for each 2 MiB of the file from offset 0: no huge pages there any more */
	_Atomic bool unmapped; /* by QEMU. No window ever again */
};

struct ram {
	uint64_t gfn, pages;
	uint64_t offset;       /* in the file, bytes */
	char *address;
	struct ram_file *file;
};

/* The regions of one attach. Interposers read it without a lock, so it doesn't change, and lives as long as QEMU. */
struct ram_table {
	unsigned count;
	struct ram regions[QUIRE_AGENT_MAX_REGIONS];
	_Atomic unsigned calls; /* of QEMU, running, that may pin memory and looked at this table */
	struct ram_table *before;
};
extern struct ram_table *_Atomic ram_now;

/* The file, found in QEMU's address space; takes `fd` over. NULL and a sentence in text[256]. */
struct ram_file *ram_find_file(int fd, char *text);
/* Whether the file has the region; then its address is filled in. */
bool ram_place(struct ram *, char *text);
bool ram_publish(const struct ram_table *); /* copies it, unless nothing changed. False: no memory */
/* The region that all of these pages are in, or NULL. */
const struct ram *ram_of_gfns(uint64_t gfn, uint64_t pages);
/* The first region of the table that has a part of [address, address+bytes), and which part. */
const struct ram *ram_of_addresses(const struct ram_table *, uintptr_t address, size_t bytes, uint64_t *gfn,
				   uint64_t *pages);
bool ram_is_file(uint64_t device, uint64_t inode);
/* The file of guest RAM, as long as QEMU maps it; else NULL. */
struct ram_file *ram_mapped_file(uint64_t device, uint64_t inode);
bool ram_is_sealed(int fd);    /* against shrinking: a mapping of it never raises SIGBUS */
/* Whether a file of guest RAM that is, or was, attached is mapped in a part of the range. */
bool ram_is_mapped(uintptr_t address, size_t bytes);
/* QEMU unmaps the range, for good: what was merged there is not any more. With the window lock. */
void ram_unmapped(uintptr_t address, size_t bytes);
/* Whether another file, of which a part isn't unmapped yet, has pages among these in this table or one before. */
bool ram_has_other(const struct ram *);
/* The region that the page is in, or was in last; NULL if it never was in one. With the window lock. */
const struct ram *ram_last(uint64_t gfn);
/* The first page, from this one on, that is in the file or ever was; UINT64_MAX: none. With the window lock. */
uint64_t ram_next(const struct ram_file *, uint64_t gfn);
/* Whether any page is merged, of this table or one before. */
bool ram_has_merged(void);
size_t ram_count_mappings(void);

/* The page map. NULL until the first attach. */
extern _Atomic(_Atomic uint64_t *) map_entries;
bool map_attach(int file, char *text, enum quire_agent_status *); /* takes file over */
bool map_covers(uint64_t gfn, uint64_t pages);
/* Whether any of these pages is merged: for a QEMU that has merged nothing yet, an old map. */
bool map_has_merged(uint64_t gfn, uint64_t pages);
uint64_t map_count_unmerged(uint64_t gfn, uint64_t pages); /* those before the first that is merged */
struct quire_lock *map_lock(uint64_t gfn);
uint32_t map_generation(void);

static inline uint64_t map_load(uint64_t gfn) { return atomic_load(&atomic_load(&map_entries)[gfn]); }
static inline void map_store(uint64_t gfn, uint64_t entry) { atomic_store(&atomic_load(&map_entries)[gfn], entry); }
static inline bool map_move(uint64_t gfn, uint64_t from, uint64_t to)
{ return atomic_compare_exchange_strong(&atomic_load(&map_entries)[gfn], &from, to); }
static inline bool map_merged(uint64_t entry)
{ return (entry & 0xff) == QUIRE_MAP_ZERO || (entry & 0xff) == QUIRE_MAP_SHARED; }

/* ---- window.c */
struct store {
	int file;
	uint64_t pages;
};
extern struct store stores[QUIRE_AGENT_MAX_STORES];
extern unsigned store_count;

bool window_prepare(void);     /* the buffers; once */
void window_track(const struct ram *); /* dirty tracking of what isn't merged */
struct quire_agent_outcome window_run(enum quire_agent_operation, const struct quire_agent_run *);
/* In a window: maps the memfd where all of these pages are merged, and says so in the page map. 0 or a negative errno. */
long window_map_back(const struct ram *, uint64_t gfn, uint64_t pages);
/*
 * Maps the memfd again where these pages are merged, for a call of QEMU's own; waits for I/O there, but not for long.
 * Any thread that holds no range lock. 0 or a negative errno.
 */
long window_reset(uint64_t gfn, uint64_t pages);
/*
 * Brings back every merged page of a file of guest RAM, for a call of QEMU's own; takes some seconds at most. The gate must
 * keep merges away. Any thread that holds no range lock. 0 or a negative errno; what was done by then stays done.
 */
long window_bring_back(uint64_t device, uint64_t inode);

static inline bool step(enum quire_agent_step which, const struct quire_agent_place *place)
{ return !quire_agent_test_step || quire_agent_test_step(which, place); }

static inline struct quire_agent_place place_of(const struct ram *ram, uint64_t gfn, uint64_t pages)
{
	uint64_t from = (gfn - ram->gfn) * PAGE;
	return (struct quire_agent_place){
		.address = ram->address + from, .bytes = pages * PAGE,
		.file = ram->file->fd, .offset = ram->offset + from,
	};
}

static inline struct quire_agent_outcome refuse(uint64_t done, enum quire_agent_reason reason, uint64_t detail)
{ return (struct quire_agent_outcome){ (uint32_t)done, reason, (uint32_t)detail }; }

/* ---- recycle.c */
struct quire_agent_outcome recycle_run(const struct quire_agent_command *, const struct quire_agent_run *);

/* ---- userfault.c */
extern int userfault_track;    /* asynchronous write-protect, and what waits in a window of merge */
extern int userfault_fold;     /* synchronous write-protect: what waits in a window of fold */
/* Opens both, once for QEMU's life. `device`: /dev/userfaultfd, or -1. */
enum quire_agent_status userfault_open(int device, char *text);
uint64_t userfault_capabilities(void);
long userfault_register(int fd, void *address, size_t bytes, uint64_t modes);
long userfault_unregister(int fd, void *address, size_t bytes);
long userfault_wake(int fd, void *address, size_t bytes);
long userfault_protect(int fd, void *address, size_t bytes);
/* The pages of the range that have a copy of QEMU's own: fills at most `max` ranges. How many, or a negative errno. */
struct range { uintptr_t begin, end; };
long userfault_diverged(void *address, size_t bytes, bool zeros, struct range *, size_t max);

/* ---- lock.c */
/* With the window lock. False: I/O is in flight, or the backend that asked for it isn't the one that has the map now. */
bool lock_open_window(uint64_t gfn, uint64_t pages);
bool lock_open_own_window(uint64_t gfn, uint64_t pages); /* the same for QEMU itself, whatever backend there is */
void lock_close_window(uint64_t gfn, uint64_t pages);
void lock_begin_io(uint64_t gfn, uint64_t pages);     /* waits while a window is open */
void lock_end_io(uint64_t gfn, uint64_t pages);
void lock_forget_agent(const struct ram_table *);     /* a new QEMU: nothing of the last one's is in flight */
void lock_serve_backend(void);                        /* windows are opened for the backend that has the map now */
bool lock_serves_backend(void);                       /* which it still is */
void lock_note_merge(uint64_t gfn, uint64_t pages);   /* in a window: pages there will be merged */

/* ---- budget.c */
bool budget_allows(unsigned more);
void budget_spend(unsigned more);
uint64_t budget_limit(void);
uint64_t budget_mappings(void);
void budget_recount(void);
uint64_t budget_maximum(void); /* vm.max_map_count */
void budget_keep_ballast(void);
bool budget_drop_ballast(void); /* true: there are some mappings to be had now. Any thread */

/* ---- gate.c */
enum gate_reason {
	GATE_DIRECT = 1,           /* a descriptor past the page cache is open; alone it doesn't close the gate */
	GATE_NATIVE_AIO = 2,       /* io_submit was called; nor does this */
	GATE_URING = 4,            /* transfers by io_uring; nor does this */
	GATE_DEVICE = 8,           /* a device that pins memory */
	GATE_FIXED_BUFFERS = 16,   /* io_uring's */
	GATE_PASSTHROUGH = 32,     /* SG_IO */
	GATE_PEER = 64,            /* somebody else has guest RAM */
	GATE_STARTING = 128,       /* calls that began before the regions were known haven't returned */
	GATE_UNKNOWN = 256,        /* more than we can keep in mind */
	GATE_USERFAULT = 512,      /* QEMU uses userfaultfd on guest RAM itself */
	GATE_ASSIGNED = 1024,      /* a device may write to all of guest RAM, to what is free, too. With GATE_DEVICE */
	GATE_STRICT = 2048,        /* the host overcommits no memory: a mapping that is refused may be gone */
	/* Somebody was told of all of guest RAM at once, and no page may get another place: not even one that is free, or a ring. */
	GATE_ALL_OF_RAM = GATE_ASSIGNED | GATE_FIXED_BUFFERS,
};
/* From interposers, before the first transfer can begin: when it returns, no window is open that did not know. */
void gate_suspect(unsigned reasons);
bool gate_suspects(unsigned reasons); /* any of them */
void gate_suspect_descriptor(int fd); /* one that came from elsewhere */
void gate_look_again(void);    /* something was closed: a reason may be gone */
bool gate_is_direct(int fd);   /* transfers through it may go past the page cache */
/* QEMU is about to pass the file on. False: it must not, for it is guest RAM, and pages that are merged can't be brought back. */
bool gate_passed(int socket, int fd);
void gate_refresh(bool force); /* the agent's thread: looks at every descriptor; unless forced once a second at most */
void gate_allow_peers(const uint32_t *pids, unsigned count);
bool gate_closed(void);        /* certain while the window lock is held */
/* For whoever brings pages back for QEMU, with the window lock: what closes the gate forbids even that; it does for a moment. */
bool gate_pins(void);
bool gate_starts(void);
void gate_text(char text[256]);

/* ---- interpose.c */
void interpose_resolve(void);

#endif
