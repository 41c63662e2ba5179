/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * quire_layout.h - every layout that crosses a process or the guest boundary.
 *
 * This file stands once. The guest module compiles it (guest-module/quire_layout.h is a link to it), the Swift
 * targets import it as CQuireLayout, and both assert the same sizes and offsets at the end of this file. Multi-byte
 * fields are little-endian; Quire supports x86-64 guests and hosts only, so no field is ever swapped.
 *
 * There are five parts:
 *   1. the control disk, by which a guest registers (guest <-> backend, carried by virtio-blk);
 *   2. the state table in guest memory (guest <-> whoever claims: the backend, or the agent in QEMU);
 *   3. the page map and the status page (backend <-> supervisor, agent and command line; never seen by a guest);
 *   4. the agent's protocol (backend <-> libquire-agent.so in QEMU);
 *   5. the page store's protocol (backend <-> quired) and the files that outlive quired.
 */
#ifndef QUIRE_LAYOUT_H
#define QUIRE_LAYOUT_H

#ifdef __KERNEL__
#include <linux/types.h>
#include <linux/build_bug.h>
#include <linux/stddef.h>
typedef u8  quire_u8;
typedef u16 quire_u16;
typedef u32 quire_u32;
typedef u64 quire_u64;
#define QUIRE_ASSERT(what) static_assert(what)
#else
#include <stddef.h>
#include <stdint.h>
typedef uint8_t  quire_u8;
typedef uint16_t quire_u16;
typedef uint32_t quire_u32;
typedef uint64_t quire_u64;
#define QUIRE_ASSERT(what) _Static_assert(what, #what)
#endif

#define QUIRE_PAGE_SHIFT 12u
#define QUIRE_PAGE_BYTES 4096u

/* -------------------------------------------------------------------------------------------------------------------
 * 1. The control disk: a virtio-blk disk of QUIRE_CTL_BLOCKS logical blocks of 4 KiB, serial QUIRE_CTL_SERIAL.
 *
 *    block 0  read   struct quire_ctl_identity   what the backend is and which protocol it speaks
 *    block 1  write  struct quire_ctl_request    register or unregister; exactly one block, else an I/O error
 *    block 2  read   struct quire_ctl_status     what became of the last request, and why
 *    others   read   zeros; a write is an I/O error
 *
 * A request that is refused fails its write with an I/O error; block 2 then holds the reason. A registration lives
 * exactly as long as the virtio device is started: a reset of the device, whoever causes it, ends it.
 * ------------------------------------------------------------------------------------------------------------- */

#define QUIRE_CTL_BLOCKS        16u
#define QUIRE_CTL_SERIAL        "quire-control"
#define QUIRE_CTL_VERSION       1u
#define QUIRE_CTL_MAGIC         "QUIRECTL"   /* 8 bytes, no terminator */
#define QUIRE_CTL_REQUEST_MAGIC "QUIREREQ"
#define QUIRE_CTL_STATUS_MAGIC  "QUIRESTA"

enum quire_ctl_block { QUIRE_CTL_IDENTITY_BLOCK = 0, QUIRE_CTL_REQUEST_BLOCK = 1, QUIRE_CTL_STATUS_BLOCK = 2 };

struct quire_ctl_identity {
	quire_u8  magic[8];          /*  0 QUIRE_CTL_MAGIC */
	quire_u32 version;           /*  8 QUIRE_CTL_VERSION; a guest that knows another version must not register */
	quire_u32 block_bytes;       /* 12 4096 */
	quire_u32 period_ms;         /* 16 age, in milliseconds, at which a free page is recycled */
	quire_u32 reserved;          /* 20 0 */
	quire_u64 nonce;             /* 24 differs for every start of the device that the guest was reset for */
	quire_u64 max_pages;         /* 32 the largest page_count that a table may have */
	quire_u8  backend[64];       /* 40 name and version of the backend, text, zero-padded */
};

enum quire_ctl_operation { QUIRE_CTL_REGISTER = 1, QUIRE_CTL_UNREGISTER = 2 };

struct quire_ctl_request {
	quire_u8  magic[8];          /*  0 QUIRE_CTL_REQUEST_MAGIC */
	quire_u32 version;           /*  8 QUIRE_CTL_VERSION */
	quire_u32 operation;         /* 12 enum quire_ctl_operation */
	quire_u64 header_gpa;        /* 16 guest physical address of the table's header page; 0 with UNREGISTER */
	quire_u8  module[64];        /* 24 name, version and kernel of the guest module, text, zero-padded */
};

enum quire_ctl_state {
	QUIRE_CTL_NONE = 0,          /* nothing registered since the device was started */
	QUIRE_CTL_ACTIVE = 1,        /* a table is registered and is being read */
	QUIRE_CTL_REFUSED = 2,       /* the last request was refused; an earlier registration has ended */
	QUIRE_CTL_DROPPED = 3,       /* a registered table broke the protocol and is not read any more */
	QUIRE_CTL_PAUSED = 4,        /* registered; recycling pauses (migration, or nobody supervises the backend) */
};

struct quire_ctl_status {
	quire_u8  magic[8];          /*  0 QUIRE_CTL_STATUS_MAGIC */
	quire_u32 version;           /*  8 QUIRE_CTL_VERSION */
	quire_u32 state;             /* 12 enum quire_ctl_state */
	quire_u64 header_gpa;        /* 16 of the table that is registered, or 0 */
	quire_u64 recycled_pages;    /* 24 recycled since this registration */
	quire_u8  text[256];         /* 32 one line for a person: why it was refused, dropped or paused; zero-padded */
};

/* -------------------------------------------------------------------------------------------------------------------
 * 2. The state table: one byte a guest page, in guest memory. After PPR (Dynamic VM, 2017), with claims added.
 *
 *    value          meaning                                        who may change it, and to what
 *    0              in use                                         guest: to 1..0xFD when it frees the page
 *    1..0xFD        free, marked in that epoch                     guest: to 0 (compare-exchange) when it allocates;
 *                                                                  host: to CLAIMED (compare-exchange) when old enough
 *    0xFE CLAIMED   the host is discarding the page                host only: to RECYCLED. A guest that wants the
 *                                                                  page waits for that
 *    0xFF RECYCLED  the host has discarded it: it reads as zeros   guest: to 0 (compare-exchange) when it allocates;
 *                                                                  host: to CLAIMED when the page was filled again
 *
 * A guest may free a page that has a mark already (an allocation that failed before it was seen): an epoch or RECYCLED
 * then becomes the current epoch, by compare-exchange; CLAIMED stays.
 *
 * A claim whose discarding failed goes back to an epoch: a guest waits while a state is CLAIMED, whatever comes next.
 *
 * The guest may compare-exchange several bytes as one aligned word as long as none of them is CLAIMED; the host
 * changes single bytes.
 *
 * The table's pages need not be contiguous: directory entry i is the guest physical address of the page that holds
 * the states of gfns 4096*i .. 4096*i+4095, or QUIRE_NO_STATES where the guest has no memory in that block. The
 * directory itself is physically contiguous.
 * ------------------------------------------------------------------------------------------------------------- */

#define QUIRE_TABLE_MAGIC   "QUIRETBL"
#define QUIRE_TABLE_VERSION 1u
#define QUIRE_NO_STATES     0u

enum quire_page_state {
	QUIRE_STATE_IN_USE = 0x00,
	QUIRE_STATE_EPOCH_FIRST = 0x01,
	QUIRE_STATE_EPOCH_LAST = 0xFD,
	QUIRE_STATE_CLAIMED = 0xFE,
	QUIRE_STATE_RECYCLED = 0xFF,
};

/* The header fills one page. Each writer has cache lines of its own. */
struct quire_table_header {
	/* Written by the guest before it registers, then constant. The host copies it once and never looks again. */
	quire_u8  magic[8];          /*   0 QUIRE_TABLE_MAGIC */
	quire_u32 version;           /*   8 QUIRE_TABLE_VERSION */
	quire_u32 reserved0;         /*  12 0 */
	quire_u64 page_count;        /*  16 states in the table, a multiple of 4096: gfns 0 .. page_count-1 */
	quire_u64 directory_gpa;     /*  24 page-aligned; page_count/4096 entries of 8 bytes, contiguous */
	quire_u8  reserved1[96];     /*  32 0 */
	/* Written by the host while registered. */
	quire_u8  epoch;             /* 128 the value that a free stores, 1..0xFD; it stands still while the host is away */
	quire_u8  reserved2[3];      /* 129 */
	quire_u32 period_ms;         /* 132 the period in force, milliseconds */
	quire_u64 ticks;             /* 136 counts epochs since the registration; never wraps */
	quire_u8  reserved3[112];    /* 144 0 */
	/* Written by the guest at any time. Advice only: the host bounds what it does with it. */
	quire_u64 waits;             /* 256 allocations that met a CLAIMED page and waited */
	quire_u8  reserved4[3832];   /* 264 0 */
};

/* -------------------------------------------------------------------------------------------------------------------
 * 3a. The page map: a memfd that outlives the backend (its supervisor holds it). A header page, then one 64-bit entry
 *     a gfn, then one range lock for each QUIRE_LOCK_PAGES gfns.
 *
 *     What survives a crash of the backend is all here: which table was registered, under which nonce, which claims
 *     were open, and where the bytes of every guest page are.
 *
 *     An entry: bits 0..7 the state, bits 8..47 the slot, bits 48..55 the store. Slot and store are 0 but for SHARED.
 *     The backend moves entries between PRIVATE and HOLE, by compare-exchange, and to HOLE with the range lock held for
 *     I/O. The agent moves them to HOLE, too, when it recycles. Every other move is the agent's alone, made while it holds
 *     the range lock, after the mapping in QEMU has changed and before a guest can write through the new one. So whoever
 *     holds the range lock for I/O finds the bytes where the entry says they are. (When QEMU unmaps guest RAM for good its
 *     merged pages become PRIVATE without the lock: no I/O can be in flight there.)
 * ------------------------------------------------------------------------------------------------------------- */

#define QUIRE_MAP_MAGIC   "QUIREMAP"
#define QUIRE_MAP_VERSION 2u
#define QUIRE_MAP_WORKERS 16u
#define QUIRE_CLAIM_MAX_PAGES 64u

enum quire_map_state {
	QUIRE_MAP_PRIVATE = 0,       /* the memfd's page, if it has one */
	QUIRE_MAP_HOLE = 1,          /* recycled: the memfd had no page here when it was last looked at */
	QUIRE_MAP_ZERO = 2,          /* mapped to zeros in QEMU, or diverged from them; the memfd says nothing */
	QUIRE_MAP_SHARED = 3,        /* mapped to the slot in QEMU, or diverged from it; the memfd says nothing */
};

#define QUIRE_MAP_SLOT_SHIFT  8u
#define QUIRE_MAP_SLOT_BITS   40u
#define QUIRE_MAP_STORE_SHIFT 48u

/*
 * The range lock: whoever has I/O in flight on guest pages (a virtqueue's buffers; a system call of QEMU that may pin
 * pages) keeps windows of the agent off them, and the agent keeps I/O out of a window.
 *
 *   I/O    adds 1 to its counter, then looks at `busy`; if that is set, subtracts 1 again, waits, and starts over
 *   agent  sets `busy`, then looks at both counters and at the header's generation; if a counter isn't 0, or the
 *          generation isn't the one that its connection was attached under, it clears `busy` and gives up. QEMU's own
 *          threads do the same, but for the generation, where QEMU discards merged pages by itself
 *
 * All of it sequentially consistent, so that one of the two sees the other (Dekker). The agent never waits, so an I/O may
 * hold one lock while it waits for another.
 *
 * A backend that dies leaves its counts behind: they keep windows off until the next one sets every backend_io to 0 and
 * adds 1 to the generation, before it does anything else. Nobody else may change them: the agent learns of a death
 * late, when the next backend may have I/O in flight already. And what the dead one asked for last may still be at work
 * in the agent then: the generation ends it.
 */
#define QUIRE_LOCK_PAGES 512u

struct quire_lock {
	quire_u16 backend_io;        /* 0 I/O in flight, in the backend */
	quire_u16 agent_io;          /* 2 the same in QEMU */
	quire_u8  busy;              /* 4 a window is open on pages of this range */
	quire_u8  merged;            /* 5 set by the agent, in a window, before it first merges here; 0: every entry is PRIVATE
				      *   or HOLE */
	quire_u8  reserved[2];       /* 6 */
};

/* A claim of the backend's in the journal: written before the first state byte becomes CLAIMED, cleared (page_count = 0)
 * after the last one is RECYCLED. since_ns is CLOCK_MONOTONIC: the supervisor kills a backend whose claim is too old.
 * The agent's claims are in no journal: it does not die before the guest. */
struct quire_claim {
	quire_u64 first_gfn;
	quire_u64 page_count;        /* 0: no claim open; at most QUIRE_CLAIM_MAX_PAGES */
	quire_u64 since_ns;
	quire_u64 reserved[5];       /* a cache line a worker */
};

enum quire_map_flag {
	QUIRE_MAP_UNMERGED = 1,      /* nothing is to be merged: somebody asked for that */
	QUIRE_MAP_ARRIVED = 2,       /* the guest came from elsewhere (a snapshot, a migration), as its rings said; never cleared */
};

struct quire_map_header {
	quire_u8  magic[8];          /*    0 QUIRE_MAP_MAGIC */
	quire_u32 version;           /*    8 QUIRE_MAP_VERSION */
	quire_u32 header_bytes;      /*   12 4096 */
	quire_u64 page_count;        /*   16 entries that follow the header, a multiple of QUIRE_LOCK_PAGES */
	quire_u64 nonce;             /*   24 in-flight nonce under which header_gpa was registered; 0: nothing registered */
	quire_u64 header_gpa;        /*   32 the registered table */
	quire_u64 recycled_total;    /*   40 pages recycled in this VM's life */
	/* The backend's life, here and not in the status page: this is memory, and never waits for a disk. */
	quire_u64 heartbeat;         /*   48 counts up some times a second while nothing in the backend is stuck; 0: not ready */
	quire_u32 backend_pid;       /*   56 whose heartbeat it is */
	quire_u32 generation;        /*   60 counts backends: see the range lock */
	quire_u64 locks_offset;      /*   64 bytes from the start of the file to the first struct quire_lock */
	quire_u32 flags;             /*   72 enum quire_map_flag */
	quire_u8  reserved[948];     /*   76 */
	struct quire_claim journal[QUIRE_MAP_WORKERS]; /* 1024 */
	quire_u8  reserved2[2048];   /* 2048 */
};

/* -------------------------------------------------------------------------------------------------------------------
 * 3b. The status page: a file of one page in the VM's runtime folder, written by the backend, read by its supervisor
 *     and by `quire status`. Every field is written whole (one aligned store); counters only grow while pid stays.
 * ------------------------------------------------------------------------------------------------------------- */

#define QUIRE_STATUS_MAGIC   "QUIREVMS"
#define QUIRE_STATUS_VERSION 3u
#define QUIRE_STATUS_POOLS   16  /* pools of transcendent memory that fit */

enum quire_recycle_state {
	QUIRE_RECYCLE_NO_GUEST = 0,  /* no front end, or no guest module registered */
	QUIRE_RECYCLE_ACTIVE = 1,
	QUIRE_RECYCLE_PAUSED = 2,    /* dirty logging, or no supervisor */
	QUIRE_RECYCLE_REFUSED = 3,   /* the guest's table was refused or dropped */
};

/* A pool of transcendent memory. Its counters count since the backend's start. */
struct quire_status_pool {
	quire_u8  name[64];          /*   0 zero-padded */
	quire_u32 flags;             /*  64 1 persistent, 2 shared */
	quire_u32 reserved;          /*  68 */
	quire_u64 pages;             /*  72 */
	quire_u64 capacity_pages;    /*  80 0: no limit */
	quire_u64 stored_bytes;      /*  88 its share of what contents take */
	quire_u64 puts;              /*  96 */
	quire_u64 puts_failed;       /* 104 */
	quire_u64 hits;              /* 112 */
	quire_u64 misses;            /* 120 */
	quire_u64 flushes;           /* 128 pages that flushes took away */
	quire_u64 evictions;         /* 136 */
};

struct quire_status {
	quire_u8  magic[8];          /*   0 QUIRE_STATUS_MAGIC */
	quire_u32 version;           /*   8 QUIRE_STATUS_VERSION */
	quire_u32 pid;               /*  12 of the backend */
	quire_u64 heartbeat;         /*  16 counts updates; the one that a supervisor watches is in the page map */
	quire_u64 ram_bytes;         /*  24 guest RAM in the memory table */
	quire_u64 resident_bytes;    /*  32 of that, what the host has allocated */
	quire_u64 recycled_now_pages;   /* 40 */
	quire_u64 recycled_total_pages; /* 48 in this VM's life */
	quire_u64 recycled_rate_millipages; /* 56 recycled pages a second times 1000, over the last period */
	quire_u64 cpu_ns;            /*  64 CPU time of the backend process */
	quire_u64 free_marked_pages; /*  72 marked free, not yet recycled, at the last scan */
	quire_u64 waits;             /*  80 allocations in the guest that waited for a claim, as the guest says */
	quire_u64 refilled_pages;    /*  88 recycled pages that somebody else had filled, and that were punched again */
	quire_u32 recycle_state;     /*  96 enum quire_recycle_state */
	quire_u32 period_ms;         /* 100 */
	quire_u64 map_bytes;         /* 104 host metadata in use for this VM */
	quire_u64 updated_ns;        /* 112 CLOCK_MONOTONIC of the last update */
	quire_u64 restarts;          /* 120 written by the supervisor */
	quire_u8  reason[256];       /* 128 one line for a person, zero-padded */
	quire_u8  name[128];         /* 384 of the VM, zero-padded */
	/* What is merged. A total counts since the backend's start. */
	quire_u32 merge_state;       /* 512 enum quire_merge_state */
	quire_u32 merge_period_ms;   /* 516 */
	quire_u64 sharing_pages;     /* 520 guest pages that are mapped to a slot, or diverged from one */
	quire_u64 zero_pages;        /* 528 the same of zeros */
	quire_u64 diverged_pages;    /* 536 of both: those with a copy of their own */
	quire_u64 hashed_total_pages;   /* 544 */
	quire_u64 merged_total_pages;   /* 552 */
	quire_u64 folded_total_pages;   /* 560 */
	quire_u64 merged_rate_millipages; /* 568 a second, times 1000, over some seconds */
	quire_u64 folded_rate_millipages; /* 576 */
	quire_u64 mappings;          /* 584 VMAs of QEMU */
	quire_u64 mapping_limit;     /* 592 above which nothing is merged */
	/* Of the share group, from quired; 0 without it. */
	quire_u64 group_shared_pages;   /* 600 slots in use */
	quire_u64 group_sharing_pages;  /* 608 guest pages that use them */
	quire_u64 group_saved_bytes; /* 616 */
	quire_u64 group_histogram[32];  /* 624 slots that are used 2^i ..< 2^(i+1) times */
	quire_u8  merge_reason[256]; /* 880 one line for a person, zero-padded: why merging is off, or what is left out */
	/* Transcendent memory of the backend. */
	quire_u32 tmem_flags;        /* 1136 1 there is a store, 2 it is frozen */
	quire_u32 tmem_pool_count;   /* 1140 */
	quire_u64 tmem_used_bytes;   /* 1144 host memory of the store */
	quire_u64 tmem_metadata_bytes;  /* 1152 of that, what is not content */
	quire_u64 tmem_cap_bytes;    /* 1160 0: no limit */
	struct quire_status_pool tmem_pools[QUIRE_STATUS_POOLS]; /* 1168 */
	quire_u8  tmem_reason[256];  /* 3472 one line for a person, zero-padded */
	quire_u64 started_ns;        /* 3728 when the backend was started, CLOCK_MONOTONIC, to a clock tick; 0: it does not say */
	quire_u8  reserved[360];     /* 3736 */
};

enum quire_merge_state {
	QUIRE_MERGE_OFF = 0,         /* QEMU was started without the agent */
	QUIRE_MERGE_IDLE = 1,        /* no guest is running */
	QUIRE_MERGE_ACTIVE = 2,
	QUIRE_MERGE_PAUSED = 3,      /* merge_reason says why */
};

/* -------------------------------------------------------------------------------------------------------------------
 * 4. The agent's protocol: a SOCK_SEQPACKET Unix socket. The backend listens on it, the agent connects to the path in
 *    QUIRE_AGENT_SOCKET and again whenever the connection has ended. Each message is one packet and begins with its
 *    head.
 *
 *    agent -> backend  hello    with descriptors: /proc/self/pagemap, /proc/self/mem
 *    backend -> agent  attach   with descriptors: page map, `file_count` RAM files, `store_count` stores and, with
 *                               QUIRE_AGENT_HAS_USERFAULTFD, /dev/userfaultfd. Once a connection, and again whenever
 *                               the regions change; a region that is missing in a later attach is no longer touched
 *    agent -> backend  ready    whether it took them, and why not
 *    backend -> agent  command  answered by exactly one result, in order. With RECYCLE come up to 2 descriptors, which
 *                               the agent has open until it is done, and does nothing with: see below
 *    agent -> backend  result
 *    agent -> backend  gate     after ready, and whenever the pin gate or its reason changes
 *
 *    A message that breaks these rules ends the connection. Whatever happens to it, QEMU and its guest run on.
 * ------------------------------------------------------------------------------------------------------------- */

#define QUIRE_AGENT_MAGIC       "QUIREAGT"
#define QUIRE_AGENT_VERSION     1u
#define QUIRE_AGENT_MAX_REGIONS 64u
#define QUIRE_AGENT_MAX_FILES   64u
#define QUIRE_AGENT_MAX_STORES  8u
#define QUIRE_AGENT_MAX_RUNS    64u
#define QUIRE_AGENT_MAX_PAGES   32768u /* in one run of a command */
#define QUIRE_AGENT_MAX_PEERS   8u

enum quire_agent_type {
	QUIRE_AGENT_HELLO = 1,
	QUIRE_AGENT_ATTACH = 2,
	QUIRE_AGENT_READY = 3,
	QUIRE_AGENT_COMMAND = 4,
	QUIRE_AGENT_RESULT = 5,
	QUIRE_AGENT_GATE = 6,
};

struct quire_agent_head {
	quire_u32 type;              /*  0 enum quire_agent_type */
	quire_u32 bytes;             /*  4 of the message, this head included */
};

/* What the agent found by trying it, not by a version number. */
enum quire_agent_capability {
	QUIRE_AGENT_CAN_USERFAULTFD = 1,   /* it can open one without help */
	QUIRE_AGENT_CAN_MERGE = 2,         /* MINOR and MISSING on shared memory, write-protect of what is not there yet */
	QUIRE_AGENT_CAN_WP_ASYNC = 4,      /* asynchronous write-protect: dirty tracking */
	QUIRE_AGENT_CAN_PAGEMAP_SCAN = 8,
};

struct quire_agent_hello {
	struct quire_agent_head head;
	quire_u8  magic[8];          /*  8 QUIRE_AGENT_MAGIC */
	quire_u32 version;           /* 16 QUIRE_AGENT_VERSION */
	quire_u32 pid;               /* 20 as QEMU sees it */
	quire_u64 capabilities;      /* 24 enum quire_agent_capability; without CAN_USERFAULTFD the others are unknown until
				      *    it is attached: 0 */
	quire_u64 mapping_limit;     /* 32 vm.max_map_count */
};

enum quire_agent_attach_flag { QUIRE_AGENT_HAS_USERFAULTFD = 1 };

struct quire_agent_region {
	quire_u64 gfn;
	quire_u64 page_count;
	quire_u64 file;              /* index of its RAM file among those passed */
	quire_u64 file_offset;       /* bytes */
};

struct quire_agent_attach {
	struct quire_agent_head head;
	quire_u32 version;           /*  8 QUIRE_AGENT_VERSION */
	quire_u32 flags;             /* 12 enum quire_agent_attach_flag */
	quire_u32 file_count;        /* 16 at most QUIRE_AGENT_MAX_FILES */
	quire_u32 store_count;       /* 20 at most QUIRE_AGENT_MAX_STORES */
	quire_u32 region_count;      /* 24 at most QUIRE_AGENT_MAX_REGIONS; the message ends after the last region */
	quire_u32 peer_count;        /* 28 at most QUIRE_AGENT_MAX_PEERS */
	/* Processes that QEMU may pass guest RAM to: ours, as SO_PEERCRED names them. The socket's own peer is one anyway. */
	quire_u32 peers[QUIRE_AGENT_MAX_PEERS]; /* 32 */
	struct quire_agent_region regions[QUIRE_AGENT_MAX_REGIONS]; /* 64 */
};

enum quire_agent_status {
	QUIRE_AGENT_OK = 0,
	QUIRE_AGENT_WRONG_VERSION = 1,
	QUIRE_AGENT_NO_USERFAULTFD = 2,  /* the kernel doesn't give us one */
	QUIRE_AGENT_OLD_KERNEL = 3,      /* it gives one that can't do what windows need */
	QUIRE_AGENT_NOT_MAPPED = 4,      /* a region isn't QEMU's memory, or not in the way that we need */
	QUIRE_AGENT_OTHER_MAP = 5,       /* not the page map that QEMU's mappings are described in: bytes are not where it says */
	QUIRE_AGENT_REFUSED = 6,         /* anything else: the text says what */
};

struct quire_agent_ready {
	struct quire_agent_head head;
	quire_u32 status;            /*   8 enum quire_agent_status; unless OK nothing was taken */
	quire_u32 region_count;      /*  12 */
	quire_u8  text[256];         /*  16 one line for a person, zero-padded */
	quire_u64 capabilities;      /* 272 enum quire_agent_capability: with what it was given */
	quire_u64 addresses[QUIRE_AGENT_MAX_REGIONS]; /* 280 of each region in QEMU */
};

enum quire_agent_operation {
	QUIRE_AGENT_MERGE = 1,       /* equal to slot, slot+1, ...: map those */
	QUIRE_AGENT_ZERO = 2,        /* zeros: map zeros */
	QUIRE_AGENT_FOLD = 3,        /* bring every merged page back into the memfd */
	QUIRE_AGENT_FOLD_DIVERGED = 4, /* those that the guest has written since */
	QUIRE_AGENT_RESET = 5,       /* the guest has freed them: map the memfd again, whatever it holds */
	QUIRE_AGENT_RECYCLE = 6,     /* claim, punch and release what the guest has marked free, and long enough ago */
	QUIRE_AGENT_RECYCLE_AGAIN = 7, /* the same for what is RECYCLED: somebody has filled it */
	QUIRE_AGENT_FOLD_HELD = 8,   /* as FOLD, for pages that the guest uses as a ring or a table: only what has all of guest RAM
				      *   forbids it. An agent from before says INVALID */
};

/*
 * Who recycles must be done before the guest's memory belongs to another kernel (part 2): before QEMU goes on after the
 * stop of the device that the table was registered with. QEMU does when the backend answers, or when it sees the end of
 * their connection. So a backend that sends RECYCLE
 *
 *   - answers no such stop until the result is there, or the agent has the command no more;
 *   - passes with the command its own end of that connection. If it dies, the connection ends only when the agent, which
 *     has or will be sent the command, has closed it too: done, or never begun.
 *
 * The second descriptor is for the first rule: the one end of a pipe. When the other hangs up nobody has the command.
 */

struct quire_agent_run {
	quire_u64 gfn;
	quire_u64 slot;              /* MERGE: of the first page. RECYCLE: the guest physical address of its state byte; those
				      *   of the others follow in the same page, which the backend keeps private. Else 0 */
	quire_u32 page_count;        /* 1 .. QUIRE_AGENT_MAX_PAGES */
	quire_u32 store;             /* MERGE only, else 0 */
};

struct quire_agent_command {
	struct quire_agent_head head;
	quire_u64 id;                /*  8 comes back in the result */
	quire_u32 operation;         /* 16 enum quire_agent_operation */
	quire_u32 run_count;         /* 20 the message ends after the last run */
	/* RECYCLE and RECYCLE_AGAIN only, else 0. */
	quire_u32 now;               /* 24 the epoch; what is claimed and can't be punched gets it as its mark */
	quire_u32 due_age;           /* 28 RECYCLE: epochs that a mark must be old */
	quire_u32 claim_pages;       /* 32 1 .. QUIRE_CLAIM_MAX_PAGES that are CLAIMED at a time, at most */
	quire_u32 reserved;          /* 36 0 */
	struct quire_agent_run runs[QUIRE_AGENT_MAX_RUNS]; /* 40 */
};

/*
 * A run is done in windows from its first page on, until it is done or a window is refused. RECYCLE looks at all of its
 * pages and passes over those that it can't recycle: DONE, or the reason for the last of them.
 */
enum quire_agent_reason {
	QUIRE_AGENT_DONE = 0,
	QUIRE_AGENT_DIFFERS = 1,     /* detail: the first page that differs, counted from the run's first */
	QUIRE_AGENT_BUSY = 2,        /* I/O in flight: try again */
	QUIRE_AGENT_BUDGET = 3,      /* no mappings left to spend */
	QUIRE_AGENT_GATE_CLOSED = 4, /* the pin gate */
	QUIRE_AGENT_STATE = 5,       /* a page isn't PRIVATE; detail: as for DIFFERS */
	QUIRE_AGENT_FAILED = 6,      /* a system call; detail: its errno */
	QUIRE_AGENT_INVALID = 7,     /* no such pages, store, slot or operation */
};

struct quire_agent_outcome {
	quire_u32 done;              /* pages, from the run's first on; RECYCLE: that were recycled, anywhere in the run */
	quire_u32 reason;            /* enum quire_agent_reason */
	quire_u32 detail;
};

struct quire_agent_result {
	struct quire_agent_head head;
	quire_u64 id;                /*  8 */
	quire_u64 mappings;          /* 16 VMAs of QEMU, as far as the agent knows */
	quire_u64 mapping_limit;     /* 24 above which it does not merge */
	quire_u32 run_count;         /* 32 */
	quire_u32 gate_closed;       /* 36 */
	struct quire_agent_outcome outcomes[QUIRE_AGENT_MAX_RUNS]; /* 40 */
};

struct quire_agent_gate {
	struct quire_agent_head head;
	quire_u32 closed;            /*  8 1: nothing is merged or folded, but for FOLD_HELD */
	quire_u32 assigned;          /* 12 1: a device may write to all of guest RAM, so nothing is recycled or reset either */
	quire_u8  text[256];         /* 16 why, one line for a person, zero-padded */
};

/* -------------------------------------------------------------------------------------------------------------------
 * 5a. The page store's protocol: SOCK_SEQPACKET, one message a request and one a reply, at most QUIRE_STORE_MESSAGE_MAX
 *     bytes. The backend asks, quired answers; a request that breaks a rule is answered by an ERROR with one line for a
 *     person, and the connection ends.
 *
 *     request   descriptors           reply     means
 *     HELLO     page map, life        WELCOME   I am this VM. With WELCOME comes the store, read-only
 *     MEMORY    RAM files             DONE      where the pages of these gfns are; replaces what was said before
 *     LOOKUP    -                     SLOTS     pages with these hashes are quiet: which slots hold the same?
 *     OFFERS    -                     SLOTS     pages that I looked up in vain earlier: which of them have a slot now?
 *     REPORT    -                     DONE      merged, or released: I map these slots, or do not map them (any more)
 *     STATUS    -                     STATUS    figures: of my group after HELLO; of the host for root and quired's user.
 *                                               count: pages of zeros that I have merged
 *     GROUPS    -                     GROUP_LIST  figures of each share group, without HELLO: for root and quired's user
 *     TMEM      -                     ALLOWED   how much of the host's memory for transcendent memory may I use? Without
 *                                               HELLO, as often as it takes. Without a name it is a question only, for root
 *                                               and quired's user. What is allowed holds as long as the connection, and a
 *                                               little longer, for a backend that takes the place of one that died
 *
 *     `life` becomes readable or hangs up when no process maps slots for this VM any more: a pidfd of QEMU. Everything
 *     that the VM holds is given back then, and not when a backend dies. A VM, which is who has this page map, is in one
 *     share group: HELLO for another one is refused as long as the page map shows a slot of the first, and ends what it had there.
 *
 *     A slot in a SLOTS reply is the VM's from that moment, until it reports the page as released: quired notes it in the
 *     VM's ledger before it answers. So whoever maps slots keeps two rules:
 *       - a page-map entry is SHARED from before a slot is mapped there until after it is unmapped;
 *       - HELLO is sent when no command that maps or unmaps is on its way in QEMU. quired then gives up what the ledger
 *         has and the page map does not.
 *     Slots hold what the hash says, as far as a hash can: whoever maps one compares all bytes first.
 * ------------------------------------------------------------------------------------------------------------- */

#define QUIRE_STORE_MAGIC        "QUIRESTO"
#define QUIRE_STORE_VERSION      1u
#define QUIRE_STORE_MESSAGE_MAX  65536u
#define QUIRE_STORE_MAX_GROUPS   128u
#define QUIRE_STORE_MAX_RUNS     1024u
#define QUIRE_STORE_MAX_PAGES    1024u        /* in a LOOKUP, and in the SLOTS that answer OFFERS */
#define QUIRE_STORE_MAX_REPORT   65536u       /* pages in a REPORT */
#define QUIRE_STORE_MAX_REGIONS  64u
#define QUIRE_STORE_MAX_FILES    60u
#define QUIRE_STORE_SECRET_BYTES 192u
#define QUIRE_STORE_GFN_LIMIT    (1u << 30)   /* gfns are below this: 4 TiB */
#define QUIRE_STORE_SLOT_LIMIT   (1u << 31)   /* slots of one store are below this, and never 0 */

enum quire_store_kind {
	QUIRE_STORE_HELLO = 1,
	QUIRE_STORE_MEMORY = 2,
	QUIRE_STORE_LOOKUP = 3,
	QUIRE_STORE_OFFERS = 4,
	QUIRE_STORE_REPORT = 5,
	QUIRE_STORE_STATUS = 6,
	QUIRE_STORE_GROUPS = 7,
	QUIRE_STORE_TMEM = 8,
	QUIRE_STORE_WELCOME = 65,
	QUIRE_STORE_DONE = 66,
	QUIRE_STORE_SLOTS = 67,
	QUIRE_STORE_FIGURES = 68,
	QUIRE_STORE_ERROR = 69,
	QUIRE_STORE_GROUP_LIST = 70,
	QUIRE_STORE_ALLOWED = 71,
};

struct quire_store_header {
	quire_u32 kind;              /* 0 enum quire_store_kind */
	quire_u32 count;             /* 4 of what follows the fixed part; 0 where nothing does */
};

struct quire_store_hello {
	struct quire_store_header header;
	quire_u8  magic[8];          /*  8 QUIRE_STORE_MAGIC */
	quire_u32 version;           /* 16 QUIRE_STORE_VERSION */
	quire_u32 node;              /* 20 NUMA node of the guest's memory */
	quire_u8  name[72];          /* 24 of the VM, zero-padded */
	quire_u8  group[72];         /* 96 share group; empty: that of the VM's owner */
};

struct quire_store_welcome {
	struct quire_store_header header;
	quire_u32 version;           /*  8 QUIRE_STORE_VERSION */
	quire_u32 store;             /* 12 the store's number in page-map entries: its node */
	quire_u64 store_id;          /* 16 differs for every store that ever was: a slot means nothing in another one */
	quire_u64 slots;             /* 24 the store's size in pages */
	quire_u64 kept_pages;        /* 32 of this VM, that both ledger and page map have */
	quire_u64 dropped_pages;     /* 40 that the ledger alone had; they are given up */
	quire_u64 unknown_pages;     /* 48 that the page map alone has: un-merge them, nobody holds their slots for you */
	quire_u8  secret[192];       /* 56 the share group's secret: pages are hashed with it */
};

/* MEMORY: `count` of these follow the header. */
struct quire_store_region {
	quire_u64 gfn;
	quire_u64 pages;
	quire_u64 offset;            /* bytes, in the file */
	quire_u32 file;              /* index among the message's descriptors */
	quire_u32 reserved;
};

/* LOOKUP: `count` of these, then the hashes (low, high) of all their pages in the same order. REPORT: `count` of these. */
struct quire_store_pages {
	quire_u64 gfn;
	quire_u32 pages;
	quire_u32 what;              /* REPORT: enum quire_store_report; LOOKUP: 0 */
};

enum quire_store_report { QUIRE_STORE_MERGED = 1, QUIRE_STORE_RELEASED = 2 };

/* SLOTS: `count` runs follow: gfn + i has slot + i. Pages that are in none have no slot yet. */
struct quire_store_slots {
	struct quire_store_header header;
	quire_u64 offers;            /*  8 pages that wait to be asked for with OFFERS */
	quire_u64 lacking_bytes;     /* 16 as in the figures */
};

struct quire_store_run {
	quire_u64 gfn;
	quire_u64 slot;
	quire_u32 pages;
	quire_u32 store;
};

/* OFFERS: header.count pages at most. DONE: */
struct quire_store_done {
	struct quire_store_header header;
	quire_u64 pages;             /* 8 that the request was true of; the others were passed over */
};

struct quire_store_figures {
	struct quire_store_header header;
	quire_u64 machines;          /*   8 VMs */
	quire_u64 shared_pages;      /*  16 slots in use */
	quire_u64 sharing_pages;     /*  24 guest pages that are merged with one */
	quire_u64 held_pages;        /*  32 guest pages that were given a slot and are not reported as merged yet */
	quire_u64 saved_bytes;       /*  40 */
	quire_u64 store_bytes;       /*  48 that the host has allocated for slots */
	quire_u64 index_bytes;       /*  56 for index, counts and tables: an estimate from the number of slots */
	quire_u64 candidate_bytes;   /*  64 for contents that were seen once: the most it can become */
	quire_u64 ledger_bytes;      /*  72 */
	quire_u64 limit_pages;       /*  80 slots that all stores may have together */
	quire_u64 promotions;        /*  88 contents that got a slot */
	quire_u64 hits;              /*  96 pages that were given a slot that was there */
	quire_u64 stale;             /* 104 promotions given up, since a page had changed */
	quire_u64 full;              /* 112 pages without a slot because the limit was reached */
	quire_u64 lacking_bytes;     /* 120 memory that the host is short of to give every merged page its own; 0: merge on */
	quire_u64 histogram[32];     /* 128 slots that are used 2^i ..< 2^(i+1) times */
};

/* The answer to GROUPS, whose count says how many share groups to pass over, in the order of their names: `count` of
 * these, at most QUIRE_STORE_MAX_GROUPS; the next request goes on behind them, until none is left. */
struct quire_store_group {
	quire_u8  name[72];          /*  0 zero-padded */
	quire_u32 node;              /* 72 NUMA node: a group has one store a node */
	quire_u32 reserved;
	quire_u64 figures[47];       /* 80 as in quire_store_figures, from `machines` on */
};

struct quire_store_tmem {
	struct quire_store_header header;
	quire_u8  name[72];          /*  8 of the VM, zero-padded */
	quire_u64 used_bytes;        /* 80 */
	quire_u64 held_bytes;        /* 88 what I was allowed before */
	quire_u64 wanted_bytes;      /* 96 what I would like to be allowed */
};

/* The answer to TMEM. header.count 1: quired has just begun and does not know yet what others have: ask again in a moment. */
struct quire_store_allowed {
	struct quire_store_header header;
	quire_u64 allowed_bytes;     /*  8 all in all, from now on */
	quire_u64 total_bytes;       /* 16 that all together are allowed */
	quire_u64 cap_bytes;         /* 24 that all together may use; UINT64_MAX: no limit */
};

struct quire_store_error {
	struct quire_store_header header; /* count 1: busy, the same may do better in a moment */
	quire_u8  text[504];         /* 8 one line, zero-padded */
};

/* -------------------------------------------------------------------------------------------------------------------
 * 5b. What outlives quired, in memfds that its keeper holds. Only quired writes or reads these.
 *
 *     A store's table: a header page, then 8 bytes a slot, the low half of its hash, which means something only while a
 *     ledger has the slot. A VM's ledger: a header page, then 32 bits a gfn: 0, or a slot, with bit 31 until the VM has
 *     reported the page as merged. The ledgers are the truth about who uses which slot; counts and index follow from
 *     them.
 * ------------------------------------------------------------------------------------------------------------- */

#define QUIRE_TABLE_FILE_MAGIC  "QUIRESLT"
#define QUIRE_LEDGER_MAGIC      "QUIRELED"
#define QUIRE_PARKED_VERSION    2u
#define QUIRE_LEDGER_HELD       (1u << 31)

struct quire_slot_table_header {
	quire_u8  magic[8];          /*   0 QUIRE_TABLE_FILE_MAGIC */
	quire_u32 version;           /*   8 QUIRE_PARKED_VERSION */
	quire_u32 node;              /*  12 */
	quire_u64 store_id;          /*  16 */
	quire_u64 slots;             /*  24 */
	quire_u8  group[72];         /*  32 zero-padded */
	quire_u8  secret[192];       /* 104 */
	quire_u8  reserved[3800];    /* 296 */
};

struct quire_ledger_header {
	quire_u8  magic[8];          /*   0 QUIRE_LEDGER_MAGIC */
	quire_u32 version;           /*   8 QUIRE_PARKED_VERSION */
	quire_u32 ended;             /*  12 1: the VM has ended, and nothing that follows holds */
	quire_u64 store_id;          /*  16 whose slots these are */
	quire_u64 map_device;        /*  24 the VM's page map, by which a backend that comes back is known */
	quire_u64 map_inode;         /*  32 */
	quire_u32 machine;           /*  40 number of the VM in quired */
	quire_u32 uid;               /*  44 of the VM's owner */
	quire_u8  name[72];          /*  48 zero-padded */
	quire_u8  reserved[3976];    /* 120 */
};

QUIRE_ASSERT(sizeof(struct quire_ctl_identity) == 104);
QUIRE_ASSERT(sizeof(struct quire_ctl_request) == 88);
QUIRE_ASSERT(sizeof(struct quire_ctl_status) == 288);
QUIRE_ASSERT(sizeof(struct quire_table_header) == QUIRE_PAGE_BYTES);
QUIRE_ASSERT(offsetof(struct quire_table_header, epoch) == 128);
QUIRE_ASSERT(offsetof(struct quire_table_header, ticks) == 136);
QUIRE_ASSERT(offsetof(struct quire_table_header, waits) == 256);
QUIRE_ASSERT(sizeof(struct quire_claim) == 64);
QUIRE_ASSERT(sizeof(struct quire_map_header) == QUIRE_PAGE_BYTES);
QUIRE_ASSERT(offsetof(struct quire_map_header, heartbeat) == 48);
QUIRE_ASSERT(offsetof(struct quire_map_header, generation) == 60);
QUIRE_ASSERT(offsetof(struct quire_map_header, locks_offset) == 64);
QUIRE_ASSERT(offsetof(struct quire_map_header, journal) == 1024);
QUIRE_ASSERT(sizeof(struct quire_lock) == 8);
QUIRE_ASSERT(offsetof(struct quire_lock, agent_io) == 2);
QUIRE_ASSERT(offsetof(struct quire_lock, busy) == 4);
QUIRE_ASSERT(offsetof(struct quire_lock, merged) == 5);
QUIRE_ASSERT(QUIRE_MAP_SLOT_SHIFT + QUIRE_MAP_SLOT_BITS == QUIRE_MAP_STORE_SHIFT);
QUIRE_ASSERT(sizeof(struct quire_status) == QUIRE_PAGE_BYTES);
QUIRE_ASSERT(offsetof(struct quire_status, reason) == 128);
QUIRE_ASSERT(offsetof(struct quire_status, merge_state) == 512);
QUIRE_ASSERT(offsetof(struct quire_status, merge_reason) == 880);
QUIRE_ASSERT(sizeof(struct quire_status_pool) == 144);
QUIRE_ASSERT(offsetof(struct quire_status, tmem_pools) == 1168);
QUIRE_ASSERT(offsetof(struct quire_status, tmem_reason) == 3472);
QUIRE_ASSERT(offsetof(struct quire_status, started_ns) == 3728);
QUIRE_ASSERT(sizeof(struct quire_agent_hello) == 40);
QUIRE_ASSERT(offsetof(struct quire_agent_attach, peers) == 32);
QUIRE_ASSERT(offsetof(struct quire_agent_attach, regions) == 64);
QUIRE_ASSERT(sizeof(struct quire_agent_region) == 32);
QUIRE_ASSERT(offsetof(struct quire_agent_ready, addresses) == 280);
QUIRE_ASSERT(sizeof(struct quire_agent_run) == 24);
QUIRE_ASSERT(offsetof(struct quire_agent_command, runs) == 40);
QUIRE_ASSERT(sizeof(struct quire_agent_outcome) == 12);
QUIRE_ASSERT(offsetof(struct quire_agent_result, outcomes) == 40);
QUIRE_ASSERT(sizeof(struct quire_agent_gate) == 272);
QUIRE_ASSERT(sizeof(struct quire_store_header) == 8);
QUIRE_ASSERT(sizeof(struct quire_store_hello) == 168);
QUIRE_ASSERT(sizeof(struct quire_store_welcome) == 248);
QUIRE_ASSERT(sizeof(struct quire_store_region) == 32);
QUIRE_ASSERT(sizeof(struct quire_store_pages) == 16);
QUIRE_ASSERT(sizeof(struct quire_store_slots) == 24);
QUIRE_ASSERT(sizeof(struct quire_store_run) == 24);
QUIRE_ASSERT(sizeof(struct quire_store_done) == 16);
QUIRE_ASSERT(sizeof(struct quire_store_figures) == 384);
QUIRE_ASSERT(offsetof(struct quire_store_figures, histogram) == 128);
QUIRE_ASSERT(sizeof(struct quire_store_error) == 512);
QUIRE_ASSERT(sizeof(struct quire_store_group) == 456);
QUIRE_ASSERT(sizeof(struct quire_store_tmem) == 104);
QUIRE_ASSERT(sizeof(struct quire_store_allowed) == 32);
QUIRE_ASSERT(sizeof(struct quire_store_group) - 80 == sizeof(struct quire_store_figures) - 8);
QUIRE_ASSERT(sizeof(struct quire_slot_table_header) == QUIRE_PAGE_BYTES);
QUIRE_ASSERT(sizeof(struct quire_ledger_header) == QUIRE_PAGE_BYTES);

#endif
