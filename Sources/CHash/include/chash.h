/* SPDX-License-Identifier: Apache-2.0 */
/* XXH3-128 under a secret of one's own (libxxhash). */
#ifndef CHASH_H
#define CHASH_H

#include <stddef.h>
#include <stdint.h>

struct ch_hash { uint64_t low, high; };

/* `secret` has `secret_bytes` random bytes, at least 136. */
struct ch_hash ch_hash(const void *data, size_t length, const void *secret, size_t secret_bytes);
/* XXH3-64. */
uint64_t ch_hash64(const void *data, size_t length, uint64_t seed);
/* 0, or -1 with errno. */
int ch_random(void *buffer, size_t length);

#endif
