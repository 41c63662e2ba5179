#include "cbench.h"
#include <sys/mman.h>

#define PAGE 4096ul

/* Everything that a content decides follows from its number, so that whoever verifies needs no copy. 0 is zeros. */
static inline uint64_t first_word(uint64_t content) { return content ? content * 0x9e3779b97f4a7c15ull | 1 : 0; }
static inline uint64_t next_word(uint64_t x)
{
	x ^= x << 13;
	x ^= x >> 7;
	return x ^ x << 17;
}

void cb_fill(void *memory, const uint64_t *contents, uint64_t first, uint64_t pages)
{
	for (uint64_t i = first; i < first + pages; i++) {
		uint64_t x = first_word(contents[i]), *words = (uint64_t *)((char *)memory + i * PAGE);
		for (unsigned j = 0; j < PAGE / 8; j++) words[j] = x = next_word(x);
	}
}

uint64_t cb_wrong_pages(const void *memory, const uint64_t *contents, uint64_t first, uint64_t pages)
{
	uint64_t wrong = 0;
	for (uint64_t i = first; i < first + pages; i++) {
		uint64_t x = first_word(contents[i]);
		const uint64_t *words = (const uint64_t *)((const char *)memory + i * PAGE);
		for (unsigned j = 0; j < PAGE / 8; j++)
			if (words[j] != (x = next_word(x))) {
				wrong++;
				break;
			}
	}
	return wrong;
}

void cb_read_pages(const void *memory, const uint64_t *numbers, uint64_t first, uint64_t count)
{
	for (uint64_t i = first; i < first + count; i++)
		(void)*(const volatile char *)((const char *)memory + numbers[i] * PAGE);
}

void cb_write_pages(void *memory, uint64_t *numbers, uint64_t first, uint64_t count)
{
	for (uint64_t i = first; i < first + count; i++) {
		volatile char *at = (char *)memory + numbers[i] * PAGE + 64;
		unsigned aux;
		uint64_t begin = __builtin_ia32_rdtscp(&aux);
		*at = 1;
		numbers[i] = __builtin_ia32_rdtscp(&aux) - begin;
	}
}

/* The advice is what QEMU gives its RAM; where an agent is loaded, its interposer of madvise starts it. */
void *cb_map_guest(int file, uint64_t bytes, int huge)
{
	void *at = file >= 0 ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)
			     : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (at == MAP_FAILED) return NULL;
	madvise(at, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	madvise(at, bytes, MADV_DONTFORK);
	madvise(at, bytes, MADV_MERGEABLE);
	return at;
}
