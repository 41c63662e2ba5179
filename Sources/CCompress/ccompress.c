/* SPDX-License-Identifier: Apache-2.0 */
#include "ccompress.h"
#include <lz4.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

struct workspace {
	_Alignas(64) char compressed[CC_PAGE_BYTES];
	_Alignas(64) char page[CC_PAGE_BYTES];
	void *lz4;
	ZSTD_CCtx *zstd_in;
	ZSTD_DCtx *zstd_out;
};

static __thread struct workspace *own;
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void end_workspace(void *p)
{
	struct workspace *w = p;
	free(w->lz4);
	ZSTD_freeCCtx(w->zstd_in);
	ZSTD_freeDCtx(w->zstd_out);
	free(w);
}

static void make_key(void) { pthread_key_create(&key, end_workspace); }

static struct workspace *make_workspace(void)
{
	struct workspace *w = aligned_alloc(64, (sizeof *w + 63) & ~(size_t)63);
	if (!w) return NULL;
	memset(w, 0, sizeof *w);
	if (!(w->lz4 = aligned_alloc(64, ((size_t)LZ4_sizeofState() + 63) & ~(size_t)63))) { free(w); return NULL; }
	pthread_once(&once, make_key);
	pthread_setspecific(key, w);
	return own = w;
}

static inline struct workspace *workspace(void) { return __builtin_expect(own != NULL, 1) ? own : make_workspace(); }

uint32_t cc_compress(enum cc_codec codec, int level, const void *page, uint32_t capacity, const void **compressed)
{
	struct workspace *w = workspace();
	if (!w || capacity > CC_PAGE_BYTES) return 0;
	*compressed = w->compressed;
	if (codec == CC_LZ4) {
		/* Not LZ4_compress_fast_continue: it saves clearing the 16 KiB of the table, but its search is slower by more than
		 * that on text, since a block by itself of less than 64 KiB gets a denser table. */
		int n = LZ4_compress_fast_extState(w->lz4, page, w->compressed, CC_PAGE_BYTES, (int)capacity, 1);
		return n > 0 ? (uint32_t)n : 0;
	}
	if (!w->zstd_in && !(w->zstd_in = ZSTD_createCCtx())) return 0;
	size_t n = ZSTD_compressCCtx(w->zstd_in, w->compressed, capacity, page, CC_PAGE_BYTES, level);
	return ZSTD_isError(n) ? 0 : (uint32_t)n;
}

bool cc_decompress(enum cc_codec codec, const void *bytes, uint32_t length, void *page)
{
	switch (codec) {
	case CC_RAW:
		if (length != CC_PAGE_BYTES) return false;
		memcpy(page, bytes, CC_PAGE_BYTES);
		return true;
	case CC_LZ4:
		return LZ4_decompress_safe(bytes, page, (int)length, CC_PAGE_BYTES) == CC_PAGE_BYTES;
	case CC_ZSTD: {
		struct workspace *w = workspace();
		if (!w || (!w->zstd_out && !(w->zstd_out = ZSTD_createDCtx()))) return false;
		return ZSTD_decompressDCtx(w->zstd_out, page, CC_PAGE_BYTES, bytes, length) == CC_PAGE_BYTES;
	}
	}
	return false;
}

bool cc_equals(enum cc_codec codec, const void *bytes, uint32_t length, const void *page)
{
	if (codec == CC_RAW) return length == CC_PAGE_BYTES && memcmp(bytes, page, CC_PAGE_BYTES) == 0;
	struct workspace *w = workspace();
	return w && cc_decompress(codec, bytes, length, w->page) && memcmp(w->page, page, CC_PAGE_BYTES) == 0;
}

bool cc_same_filled(const void *page, uint64_t *word)
{
	/* Equal to itself a word further on: true of one repeated word and of nothing else. */
	uint64_t first, last;
	memcpy(&first, page, sizeof first);
	memcpy(&last, (const char *)page + CC_PAGE_BYTES - sizeof last, sizeof last);
	if (first != last) return false;
	*word = first;
	return memcmp(page, (const char *)page + sizeof first, CC_PAGE_BYTES - sizeof first) == 0;
}

void cc_fill(void *page, uint64_t word)
{
	uint64_t *words = page;
	if (word == 0) { memset(page, 0, CC_PAGE_BYTES); return; }
	for (unsigned i = 0; i < CC_PAGE_BYTES / sizeof word; i++) memcpy(&words[i], &word, sizeof word);
}
