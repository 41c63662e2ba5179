/* SPDX-License-Identifier: Apache-2.0 */
#include "chash.h"
#include <sys/random.h>
#include <xxhash.h>

struct ch_hash ch_hash(const void *data, size_t length, const void *secret, size_t secret_bytes)
{
	XXH128_hash_t hash = XXH3_128bits_withSecret(data, length, secret, secret_bytes);
	return (struct ch_hash){ hash.low64, hash.high64 };
}

uint64_t ch_hash64(const void *data, size_t length, uint64_t seed)
{
	return XXH3_64bits_withSeed(data, length, seed);
}

int ch_random(void *buffer, size_t length)
{
	/* Up to 256 bytes come whole or not at all: getrandom(2). */
	return length <= 256 && getrandom(buffer, length, 0) == (ssize_t)length ? 0 : -1;
}
