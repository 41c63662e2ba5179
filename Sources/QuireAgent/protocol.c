// SPDX-License-Identifier: Apache-2.0
/*
 * protocol.c - messages between backend and agent: part 4 of quire_layout.h. What comes in is checked here, once:
 * lengths, counts and indices; whether pages exist is for window.c to say, at each command.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include "agent.h"
#include "sys.h"

#define FDS_MAX (1 + QUIRE_AGENT_MAX_FILES + QUIRE_AGENT_MAX_STORES + 1)

union message {
	struct quire_agent_head head;
	struct quire_agent_attach attach;
	struct quire_agent_command command;
};

/* Descriptors that came with a message. What nobody takes is closed. */
struct passed {
	int fds[FDS_MAX];
	unsigned count, next;
};

static int take(struct passed *p) { return p->next < p->count ? p->fds[p->next++] : -1; }

static void drop(struct passed *p)
{
	for (int fd; (fd = take(p)) >= 0;) sys3(SYS_close, fd, 0, 0);
}

static bool send_message(int socket, void *message, size_t bytes, enum quire_agent_type type, const int *fds, size_t count)
{
	*(struct quire_agent_head *)message = (struct quire_agent_head){ type, (uint32_t)bytes };
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(2 * sizeof(int))];
	} control = { .header = {
		.cmsg_len = CMSG_LEN(count * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS,
	} };
	struct iovec part = { message, bytes };
	struct msghdr m = { .msg_iov = &part, .msg_iovlen = 1 };
	if (count) {
		memcpy(CMSG_DATA(&control.header), fds, count * sizeof(int));
		m.msg_control = &control;
		m.msg_controllen = CMSG_SPACE(count * sizeof(int));
	}
	long n;
	do n = sys3(SYS_sendmsg, socket, (long)&m, MSG_NOSIGNAL); while (n == -EINTR);
	return n == (long)bytes;
}

/* Its length, or -1: the end of the connection, or something that isn't a message. */
static long receive(int socket, union message *message, struct passed *passed)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(FDS_MAX * sizeof(int))];
	} control;
	struct iovec part = { message, sizeof *message };
	struct msghdr m = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control,
	};
	long n;
	*passed = (struct passed){ .count = 0 };
	do n = sys3(SYS_recvmsg, socket, (long)&m, MSG_CMSG_CLOEXEC); while (n == -EINTR);
	if (n < 0) return -1;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
		passed->count = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(passed->fds, CMSG_DATA(c), passed->count * sizeof(int));
		break; /* the kernel puts all of a packet's into one */
	}
	bool whole = !(m.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
	if (whole && n >= (long)sizeof message->head && message->head.bytes == (uint32_t)n) return n;
	drop(passed);
	return -1;
}

void connection_begin(struct connection *connection, int socket)
{
	struct quire_agent_hello hello = {
		.magic = QUIRE_AGENT_MAGIC, .version = QUIRE_AGENT_VERSION, .pid = (uint32_t)sys3(SYS_getpid, 0, 0, 0),
		.capabilities = userfault_capabilities(), .mapping_limit = budget_maximum(),
	};
	long fds[2] = {
		sys6(SYS_openat, AT_FDCWD, (long)"/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0, 0, 0),
		sys6(SYS_openat, AT_FDCWD, (long)"/proc/self/mem", O_RDWR | O_CLOEXEC, 0, 0, 0),
	};
	*connection = (struct connection){ .socket = socket };
	/* Without them it says hello all the same, and the backend sees what is missing. */
	bool both = fds[0] >= 0 && fds[1] >= 0;
	send_message(socket, &hello, sizeof hello, QUIRE_AGENT_HELLO, (int[]){ (int)fds[0], (int)fds[1] }, both ? 2 : 0);
	for (int i = 0; i < 2; i++)
		if (fds[i] >= 0) sys3(SYS_close, fds[i], 0, 0);
}

bool connection_tell_gate(struct connection *connection)
{
	struct quire_agent_gate gate = { .closed = gate_closed(), .assigned = gate_suspects(GATE_ALL_OF_RAM) };
	if (!connection->attached) return true;
	gate_text((char *)gate.text);
	if (connection->told && connection->told_closed == gate.closed && connection->told_assigned == gate.assigned
	    && !memcmp(connection->told_text, gate.text, sizeof gate.text))
		return true;
	connection->told = true;
	connection->told_closed = gate.closed;
	connection->told_assigned = gate.assigned;
	memcpy(connection->told_text, gate.text, sizeof gate.text);
	return send_message(connection->socket, &gate, sizeof gate, QUIRE_AGENT_GATE, NULL, 0);
}

/* ---- attach */

/* A store that could shrink under a mapping would raise SIGBUS in QEMU. */
static bool add_store(int fd, char *text)
{
	struct stat s;
	if (store_count == QUIRE_AGENT_MAX_STORES) {
		snprintf(text, 256, "more than %u stores", QUIRE_AGENT_MAX_STORES);
	} else if (fstat(fd, &s) < 0 || !ram_is_sealed(fd)) {
		snprintf(text, 256, "a store isn't sealed against shrinking");
	} else {
		stores[store_count++] = (struct store){ fd, (uint64_t)s.st_size / PAGE };
		return true;
	}
	sys3(SYS_close, fd, 0, 0);
	return false;
}

/* Pages that are merged must keep their frame number: it is what the page map knows them by. */
static bool moved(const struct ram *ram)
{
	for (const struct ram_table *table = atomic_load(&ram_now); table; table = table->before)
		for (unsigned i = 0; i < table->count; i++) {
			const struct ram *old = &table->regions[i];
			if (old->file != ram->file || old->offset >= ram->offset + ram->pages * PAGE
			    || ram->offset >= old->offset + old->pages * PAGE)
				continue;
			bool same = old->offset / PAGE - old->gfn == ram->offset / PAGE - ram->gfn;
			if (!same && map_has_merged(old->gfn, old->pages)) return true;
		}
	return false;
}

/* Two frame numbers for one page, or two pages for one: the page map can't say that. */
static bool overlap(const struct ram *a, const struct ram *b)
{
	bool frames = a->gfn < b->gfn + b->pages && b->gfn < a->gfn + a->pages;
	bool bytes = a->address < b->address + b->pages * PAGE && b->address < a->address + a->pages * PAGE;
	return frames || bytes;
}

static bool is_known(const struct ram_file *file)
{
	for (const struct ram_table *table = atomic_load(&ram_now); table; table = table->before)
		for (unsigned i = 0; i < table->count; i++)
			if (table->regions[i].file == file) return true;
	return false;
}

static enum quire_agent_status attach_regions(const struct quire_agent_attach *a, struct passed *passed,
					      struct ram_table *table, char *text)
{
	struct ram_file *files[QUIRE_AGENT_MAX_FILES];
	for (unsigned i = 0; i < a->file_count; i++) {
		int fd = take(passed);
		files[i] = ram_find_file(fd, text);
		if (files[i]) continue;
		sys3(SYS_close, fd, 0, 0);
		return QUIRE_AGENT_NOT_MAPPED;
	}
	for (unsigned i = 0; i < a->region_count; i++) {
		const struct quire_agent_region *from = &a->regions[i];
		struct ram *ram = &table->regions[table->count++];
		if (from->file >= a->file_count || from->page_count == 0 || !map_covers(from->gfn, from->page_count)) {
			snprintf(text, 256, "region %u isn't one", i);
			return QUIRE_AGENT_REFUSED;
		}
		*ram = (struct ram){ from->gfn, from->page_count, from->file_offset, NULL, files[from->file] };
		if (!ram_place(ram, text)) return QUIRE_AGENT_NOT_MAPPED;
		for (unsigned j = 0; j < i; j++)
			if (overlap(ram, &table->regions[j])) {
				snprintf(text, 256, "regions %u and %u overlap", j, i);
				return QUIRE_AGENT_REFUSED;
			}
		if (!is_known(ram->file) && map_has_merged(ram->gfn, ram->pages) && ram_has_other(ram)) {
			snprintf(text, 256, "QEMU has not unmapped yet the memory that was at 0x%llx before",
				 (unsigned long long)(ram->gfn * PAGE));
			return QUIRE_AGENT_NOT_MAPPED;
		}
		if (is_known(ram->file) ? moved(ram) : map_has_merged(ram->gfn, ram->pages)) {
			snprintf(text, 256, "the page map says that pages are merged which aren't: start the VM anew");
			return QUIRE_AGENT_OTHER_MAP;
		}
	}
	return QUIRE_AGENT_OK;
}

static enum quire_agent_status attach(const struct quire_agent_attach *a, struct passed *passed, struct ram_table *table,
				      char *text)
{
	static bool before;
	enum quire_agent_status status;
	if (a->version != QUIRE_AGENT_VERSION) {
		snprintf(text, 256, "the agent in QEMU speaks version %u, the backend %u: restart the VM with its agent",
			 QUIRE_AGENT_VERSION, a->version);
		return QUIRE_AGENT_WRONG_VERSION;
	}
	status = userfault_open(a->flags & QUIRE_AGENT_HAS_USERFAULTFD ? passed->fds[passed->count - 1] : -1, text);
	if (status != QUIRE_AGENT_OK) return status;
	if (!window_prepare()) {
		snprintf(text, 256, "no memory in QEMU");
		return QUIRE_AGENT_REFUSED;
	}
	if (!map_attach(take(passed), text, &status)) return status;
	/* If that backend is dead by now and this is the next one's, the answer finds nobody and no command follows. */
	lock_serve_backend();
	if ((status = attach_regions(a, passed, table, text)) != QUIRE_AGENT_OK) return status;
	while (store_count) sys3(SYS_close, stores[--store_count].file, 0, 0);
	for (unsigned i = 0; i < a->store_count; i++)
		if (!add_store(take(passed), text)) return QUIRE_AGENT_REFUSED;
	if (!before) lock_forget_agent(table);
	before = true;
	if (!ram_publish(table)) {
		snprintf(text, 256, "no memory in QEMU");
		return QUIRE_AGENT_REFUSED;
	}
	return QUIRE_AGENT_OK;
}

static bool serve_attach(struct connection *connection, const struct quire_agent_attach *a, long bytes,
			 struct passed *passed)
{
	struct quire_agent_ready ready = { .status = QUIRE_AGENT_OK };
	struct ram_table table = { .count = 0 };
	/* A backend of another version may have another layout from here on, and still gets its answer. */
	bool known = bytes >= (long)(offsetof(struct quire_agent_attach, version) + sizeof a->version);
	if (!known) return false;
	if (a->version == QUIRE_AGENT_VERSION
	    && (bytes < (long)offsetof(struct quire_agent_attach, regions) || a->region_count > QUIRE_AGENT_MAX_REGIONS
		|| bytes != (long)(offsetof(struct quire_agent_attach, regions) + a->region_count * sizeof a->regions[0])
		|| a->file_count > QUIRE_AGENT_MAX_FILES || a->store_count > QUIRE_AGENT_MAX_STORES
		|| a->peer_count > QUIRE_AGENT_MAX_PEERS
		|| passed->count != 1 + a->file_count + a->store_count + (a->flags & QUIRE_AGENT_HAS_USERFAULTFD ? 1 : 0)))
		return false;
	connection->attached = false;
	ready.status = attach(a, passed, &table, (char *)ready.text);
	if (ready.status == QUIRE_AGENT_OK) {
		ready.region_count = table.count;
		ready.capabilities = userfault_capabilities();
		for (unsigned i = 0; i < table.count; i++) {
			struct ram *ram = &table.regions[i];
			ready.addresses[i] = (uintptr_t)ram->address;
			window_track(ram);
		}
		budget_recount();
		gate_allow_peers(a->peers, a->peer_count);
		struct ucred peer;
		socklen_t size = sizeof peer;
		if (getsockopt(connection->socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0)
			gate_allow_peers(&(uint32_t){ (uint32_t)peer.pid }, 1);
		gate_refresh(true);
		connection->attached = true;
		connection->told = false;
	}
	return send_message(connection->socket, &ready, sizeof ready, QUIRE_AGENT_READY, NULL, 0)
	       && connection_tell_gate(connection);
}

/* ---- commands */

static bool serve_command(struct connection *connection, const struct quire_agent_command *c, long bytes,
			  const struct passed *passed)
{
	struct quire_agent_result result = { .id = c->id };
	if (bytes < (long)offsetof(struct quire_agent_command, runs) || c->run_count > QUIRE_AGENT_MAX_RUNS
	    || bytes != (long)(offsetof(struct quire_agent_command, runs) + c->run_count * sizeof c->runs[0]))
		return false;
	bool recycles = c->operation == QUIRE_AGENT_RECYCLE || c->operation == QUIRE_AGENT_RECYCLE_AGAIN;
	/* Only those are held for the backend: recycle.c. */
	if (passed->count > (recycles ? 2 : 0)) return false;
	if (!recycles) gate_refresh(false);
	result.run_count = c->run_count;
	for (unsigned i = 0; i < c->run_count; i++)
		result.outcomes[i] = recycles ? recycle_run(c, &c->runs[i]) : window_run(c->operation, &c->runs[i]);
	result.mappings = budget_mappings();
	result.mapping_limit = budget_limit();
	result.gate_closed = gate_closed();
	return send_message(connection->socket, &result,
			    offsetof(struct quire_agent_result, outcomes) + c->run_count * sizeof result.outcomes[0],
			    QUIRE_AGENT_RESULT, NULL, 0)
	       && connection_tell_gate(connection);
}

bool connection_serve(struct connection *connection)
{
	static union message message;
	struct passed passed;
	long bytes = receive(connection->socket, &message, &passed);
	if (bytes < 0) return false;
	bool good = false;
	switch (message.head.type) {
	case QUIRE_AGENT_ATTACH:
		good = serve_attach(connection, &message.attach, bytes, &passed);
		break;
	case QUIRE_AGENT_COMMAND:
		good = connection->attached && serve_command(connection, &message.command, bytes, &passed);
		break;
	}
	drop(&passed);
	return good;
}
