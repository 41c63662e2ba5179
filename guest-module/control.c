// SPDX-License-Identifier: GPL-2.0-only
/*
 * control.c - the control disk, by which the host learns where the table is.
 *
 * What it must guarantee: the host is never told of a table that doesn't exist any more, and no table's memory is given
 * back while the host may still write to it (the epoch into the header, states into the table). So a table may be freed
 * only when an UNREGISTER has been acknowledged, or when the disk's status says that nothing is registered; if neither
 * can be had, its memory is leaked (quire_control_host_may_use_table()).
 *
 * Where it runs: all I/O is on one ordered workqueue, because a request lasts for as long as the host's backend is away:
 * for ever, if it never returns. Whoever can't wait that long gives up waiting, not the request. Being off is what makes
 * the table harmless, and needs no I/O.
 *
 * The host may forget us without our noticing (its backend was restarted without its state, the guest was migrated, or
 * set back to a snapshot). While registered, the host counts header->ticks up at least once a period. When it has stood
 * still for three periods we register again: the same header, so that it is no news to a host that had not forgotten. If
 * that doesn't help, it is repeated less and less often.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/completion.h>
#include <linux/io.h>
#include <linux/kref.h>
#include <linux/slab.h>
#include <linux/utsname.h>
#include <linux/workqueue.h>
#include "quire.h"

#define STILL_PERIODS 3
#define LONGEST_PAUSE_MS 300000U
#define PERIOD_MIN_MS 1000U
#define PERIOD_MAX_MS 600000U

#if QUIRE_KERNEL_6_12
typedef struct file *disk_handle;
#define disk_device(handle) file_bdev(handle)
#else
typedef struct block_device *disk_handle;
#define disk_device(handle) (handle)
#endif

static disk_handle disk;
static char disk_name[64];
static void *buffer;                       /* one page, for the I/O of the workqueue (and of quire_control_open()) */
static struct quire_ctl_identity identity;
static struct workqueue_struct *queue;

/* Only written on the workqueue. */
static bool wanted, registered, host_may_use_table;
static u64 registrations, failures;
static u64 ticks_seen;
static unsigned int still, pause_factor = 1;
static char last_reason[256];

static disk_handle disk_open(const char *path, bool exclusive)
{
#if QUIRE_KERNEL_6_12
	return bdev_file_open_by_path(path, exclusive ? BLK_OPEN_READ | BLK_OPEN_WRITE : BLK_OPEN_READ,
				      exclusive ? &disk : NULL, NULL);
#else
	return blkdev_get_by_path(path, exclusive ? FMODE_READ | FMODE_WRITE | FMODE_EXCL : FMODE_READ,
				  exclusive ? &disk : NULL);
#endif
}

static void disk_close(disk_handle handle, bool exclusive)
{
#if QUIRE_KERNEL_6_12
	bdev_fput(handle);
#else
	blkdev_put(handle, exclusive ? FMODE_READ | FMODE_WRITE | FMODE_EXCL : FMODE_READ);
#endif
}

/* One block, past the page cache: what the disk holds changes without our writing. */
static int block_io(enum quire_ctl_block block, blk_opf_t operation)
{
	struct bio *bio = bio_alloc(disk_device(disk), 1, operation, GFP_KERNEL);
	int error;

	bio->bi_iter.bi_sector = block * (QUIRE_PAGE_BYTES >> SECTOR_SHIFT);
	__bio_add_page(bio, virt_to_page(buffer), QUIRE_PAGE_BYTES, 0);
	error = submit_bio_wait(bio);
	bio_put(bio);
	return error;
}

static bool looks_like_control_disk(disk_handle handle)
{
	struct block_device *device = disk_device(handle);

	return bdev_nr_bytes(device) == QUIRE_CTL_BLOCKS * QUIRE_PAGE_BYTES &&
	       bdev_logical_block_size(device) == QUIRE_PAGE_BYTES;
}

/* 0: it is the control disk, and open. -ENODEV: it isn't. Anything else: it is, and can't be used; said why. */
static int try_disk(const char *path)
{
	disk_handle handle = disk_open(path, false);
	bool candidate;
	int error;

	if (IS_ERR(handle))
		return -ENODEV;
	candidate = looks_like_control_disk(handle);
	disk_close(handle, false);
	if (!candidate)
		return -ENODEV;

	handle = disk_open(path, true);
	if (IS_ERR(handle)) {
		pr_warn("%s may be the control disk, but somebody else has it open (error %ld)\n", path, PTR_ERR(handle));
		return -ENODEV;
	}
	disk = handle;
	error = block_io(QUIRE_CTL_IDENTITY_BLOCK, REQ_OP_READ);
	memcpy(&identity, buffer, sizeof(identity));
	identity.backend[sizeof(identity.backend) - 1] = 0;
	if (error) {
		pr_warn("%s may be the control disk, but can't be read (error %d)\n", path, error);
		error = -ENODEV;
	} else if (memcmp(identity.magic, QUIRE_CTL_MAGIC, sizeof(identity.magic))) {
		error = -ENODEV;
	} else if (identity.version != QUIRE_CTL_VERSION) {
		pr_err("refused: the control disk %s speaks version %u, this module version %u\n", path,
		       identity.version, QUIRE_CTL_VERSION);
		error = -EPROTONOSUPPORT;
	} else if (identity.block_bytes != QUIRE_PAGE_BYTES) {
		pr_err("refused: the control disk %s has blocks of %u bytes\n", path, identity.block_bytes);
		error = -EPROTO;
	}
	if (!error) {
		strscpy(disk_name, path, sizeof(disk_name));
		return 0;
	}
	disk_close(disk, true);
	disk = NULL;
	return error;
}

/* Finds and opens the disk. Lasts for as long as the host doesn't answer a read. */
int quire_control_open(const char *path)
{
	char name[] = "/dev/vda";
	int error = -ENODEV;

	buffer = (void *)get_zeroed_page(GFP_KERNEL);
	queue = alloc_ordered_workqueue("quire", 0);
	if (!buffer || !queue) {
		quire_control_close();
		return -ENOMEM;
	}
	if (path && *path)
		error = try_disk(path);
	else
		for (; error == -ENODEV && name[7] <= 'z'; name[7]++)
			error = try_disk(name);
	if (error == -ENODEV) {
		if (path && *path)
			pr_err("refused: %s is not Quire's control disk\n", path);
		else
			pr_err("refused: no control disk among /dev/vda to /dev/vdz: this machine doesn't run under Quire, or virtio_blk isn't loaded\n");
	}
	if (error)
		quire_control_close();
	return error;
}

/* Waits for what is on the workqueue. */
void quire_control_close(void)
{
	if (queue)
		destroy_workqueue(queue);
	queue = NULL;
	if (disk)
		disk_close(disk, true);
	disk = NULL;
	free_page((unsigned long)buffer);
	buffer = NULL;
}

u32 quire_control_period_ms(void)
{
	return clamp(identity.period_ms, PERIOD_MIN_MS, PERIOD_MAX_MS);
}

u64 quire_control_max_pages(void)
{
	return identity.max_pages;
}

bool quire_control_host_may_use_table(void)
{
	return host_may_use_table;
}

/* Unplugged, or about to be: virtio_blk resets its device then, and the host lets go of the table before it answers that. */
bool quire_control_disk_is_gone(void)
{
	return !disk_live(disk_device(disk)->bd_disk);
}

/* After a request that failed. True: the disk has told us what is registered, and it is nothing. */
static bool host_says_nothing_registered(char *reason, size_t size)
{
	struct quire_ctl_status *status = buffer;

	strscpy(reason, "it gave no reason", size);
	if (block_io(QUIRE_CTL_STATUS_BLOCK, REQ_OP_READ) ||
	    memcmp(status->magic, QUIRE_CTL_STATUS_MAGIC, sizeof(status->magic)))
		return false;
	status->text[sizeof(status->text) - 1] = 0;
	if (status->text[0])
		strscpy(reason, (char *)status->text, size);
	return !status->header_gpa;
}

static int send(enum quire_ctl_operation operation, struct quire_table *table)
{
	struct quire_ctl_request *request = buffer;
	char reason[sizeof(last_reason)];
	int error;

	memset(buffer, 0, QUIRE_PAGE_BYTES);
	memcpy(request->magic, QUIRE_CTL_REQUEST_MAGIC, sizeof(request->magic));
	request->version = QUIRE_CTL_VERSION;
	request->operation = operation;
	request->header_gpa = table ? virt_to_phys(table->header) : 0;
	scnprintf((char *)request->module, sizeof(request->module), "%s %s on Linux %s", KBUILD_MODNAME, QUIRE_VERSION,
		  init_utsname()->release);
	if (operation == QUIRE_CTL_REGISTER)
		host_may_use_table = true;
	error = block_io(QUIRE_CTL_REQUEST_BLOCK, REQ_OP_WRITE | REQ_SYNC);
	if (!error) {
		if (operation == QUIRE_CTL_UNREGISTER)
			host_may_use_table = false;
		last_reason[0] = 0;
		return 0;
	}
	failures++;
	if (host_says_nothing_registered(reason, sizeof(reason)))
		host_may_use_table = false;
	/* A host that is asked again and again says the same thing: once is enough for the log. */
	if (strcmp(reason, last_reason))
		pr_err("the host refuses to %s the table (error %d): %s\n",
		       operation == QUIRE_CTL_REGISTER ? "register" : "unregister", error, reason);
	strscpy(last_reason, reason, sizeof(last_reason));
	return error;
}

int quire_control_register(struct quire_table *table)
{
	int error = send(QUIRE_CTL_REGISTER, table);

	wanted = true;
	registered = !error;
	ticks_seen = READ_ONCE(table->header->ticks);
	still = 0;
	if (!error)
		registrations++;
	return error;
}

int quire_control_unregister(void)
{
	wanted = registered = false;
	return host_may_use_table ? send(QUIRE_CTL_UNREGISTER, NULL) : 0;
}

/* ---- requests from elsewhere: whoever comes last, the workqueue or the one that waits, frees it ---- */

struct request {
	struct work_struct work;
	struct completion done;
	struct kref references;
	bool registered;
	int result;
};

static void request_free(struct kref *references)
{
	kfree(container_of(references, struct request, references));
}

static void request_run(struct work_struct *work)
{
	struct request *request = container_of(work, struct request, work);

	request->result = request->registered ? quire_control_register(quire_table) : quire_control_unregister();
	complete(&request->done);
	kref_put(&request->references, request_free);
}

/* timeout in jiffies; 0: don't wait, MAX_SCHEDULE_TIMEOUT: for ever. -ETIMEDOUT: it is still going to happen. */
int quire_control_set(bool registered_then, unsigned long timeout)
{
	struct request *request = kzalloc(sizeof(*request), GFP_KERNEL);
	int result = -ETIMEDOUT;

	if (!request)
		return -ENOMEM;
	INIT_WORK(&request->work, request_run);
	init_completion(&request->done);
	kref_init(&request->references);
	kref_get(&request->references);
	request->registered = registered_then;
	queue_work(queue, &request->work);
	if (wait_for_completion_timeout(&request->done, timeout))
		result = request->result;
	kref_put(&request->references, request_free);
	return result;
}

bool quire_control_schedule(struct work_struct *work)
{
	return queue_work(queue, work);
}

/* ---- the watch ---- */

static unsigned int period_now(void)
{
	return clamp(READ_ONCE(quire_table->header->period_ms), PERIOD_MIN_MS, PERIOD_MAX_MS);
}

static void watch_run(struct work_struct *work);
/* Not deferrable: a guest with nothing to do is the one whose backend may have been replaced without its noticing. */
static DECLARE_DELAYED_WORK(watch, watch_run);

static void watch_run(struct work_struct *work)
{
	unsigned int period = period_now();
	u64 ticks = READ_ONCE(quire_table->header->ticks);

	if (!wanted) {
		still = 0;
	} else if (registered && ticks != ticks_seen) {
		ticks_seen = ticks;
		still = 0;
		pause_factor = 1;
	} else if (++still >= STILL_PERIODS * pause_factor) {
		if (pause_factor * STILL_PERIODS * period < LONGEST_PAUSE_MS)
			pause_factor *= 2;
		quire_control_register(quire_table);
	}
	queue_delayed_work(queue, &watch, round_jiffies_relative(msecs_to_jiffies(period)));
}

/* Off waits for a watch that is registering. */
void quire_control_watch(bool on)
{
	if (on)
		queue_delayed_work(queue, &watch, round_jiffies_relative(msecs_to_jiffies(period_now())));
	else
		cancel_delayed_work_sync(&watch);
}

void quire_control_figures(bool *registered_now, u64 *registrations_so_far, u64 *failures_so_far, const char **name)
{
	*registered_now = registered;
	*registrations_so_far = registrations;
	*failures_so_far = failures;
	*name = disk_name;
}
