/* SPDX-License-Identifier: Apache-2.0 */
/* Pages of 4096 bytes, compressed by liblz4 or libzstd. What the libraries need to work is kept a thread. */
#ifndef CCOMPRESS_H
#define CCOMPRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CC_PAGE_BYTES = 4096 };
/* How bytes are stored. Numbers are written to memory files that outlive us: never change one. */
enum cc_codec { CC_RAW = 0, CC_LZ4 = 1, CC_ZSTD = 2 };

/* Compresses a page into the calling thread's buffer, which is good until its next call. 0: not into `capacity` bytes, at
 * most 4096 (or no memory to work with). */
uint32_t cc_compress(enum cc_codec codec, int level, const void *page, uint32_t capacity, const void **compressed);
/* Whether `length` bytes decompress to exactly one page, which is then in `page`. Safe for any bytes. */
bool cc_decompress(enum cc_codec codec, const void *bytes, uint32_t length, void *page);
/* Whether they are this page, compared byte by byte. */
bool cc_equals(enum cc_codec codec, const void *bytes, uint32_t length, const void *page);
/* Whether a page is one word of 64 bits, repeated. */
bool cc_same_filled(const void *page, uint64_t *word);
void cc_fill(void *page, uint64_t word);

#endif
