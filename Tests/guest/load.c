/*
 * quire-load: puts load on a guest's memory and checks every byte of it.
 *
 * Quire takes pages away from guests and gives them back, behind their back. What this program writes depends on a seed, on
 * the page's index and on the place in the page, so a page that comes back stale, swapped with another, half written or
 * zeroed is seen. Everything is checked: in the default, light pattern most of a page is zero, and has to be zero.
 *
 * Exit status: 0 all right, 1 a wrong byte (one line that starts with WRONG), 2 the program could not do its work.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum {
    page_size = 4096,
    words = page_size / 8,
    line_words = 8, /* the pattern's unit: a cache line */
    lines = words / line_words,
    pages_per_mib = 256,
    huge = 2 << 20,
};

static struct {
    bool full, thp, alternate, storm;
    uint64_t seed;
    unsigned keep, threads, zeros;
    const char *directory;
} options = {.seed = 1, .keep = 50, .threads = 1};

/* Failing */

static void fail(const char *what)
{
    fprintf(stderr, "quire-load: %s: %s\n", what, strerror(errno));
    exit(2);
}

/* The guest page that holds an address, 0 if that can't be found out. It is what Quire knows the page by. */
static uint64_t frame_number(const void *address)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    if (pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)address / page_size * 8)) != sizeof entry)
        entry = 0;
    close(fd);
    return entry >> 63 ? entry & ((1ULL << 55) - 1) : 0;
}

/* Several threads may see a wrong byte at the same time: the first one speaks, the process ends before another does. */
static void wrong(const void *page, size_t index, unsigned word, uint64_t got, uint64_t want)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&once);
    unsigned byte = (unsigned)__builtin_ctzll(got ^ want) / 8;
    printf("WRONG page %zu offset %u got 0x%016llx want 0x%016llx pfn 0x%llx\n", index, word * 8 + byte,
           (unsigned long long)got, (unsigned long long)want, (unsigned long long)frame_number(page));
    fflush(stdout);
    _exit(1);
}

/* The pattern */

/* The finalizer of MurmurHash3: each bit of the input changes half of the output's. */
static inline uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdULL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ULL;
    return x ^ x >> 33;
}

/* One multiplication a page and word, so that TCG gets through a gigabyte: the base is what has to be random. */
static inline uint64_t pattern(uint64_t base, unsigned word)
{
    return base + word * 0x9e3779b97f4a7c15ULL;
}

static inline uint64_t page_base(uint64_t seed, size_t index)
{
    return mix(mix(seed) ^ index);
}

/* Light: the page's first and last line, and one between that moves from page to page. */
static inline bool is_patterned(uint64_t base, unsigned line)
{
    return options.full || line == 0 || line == lines - 1 || line == 1 + base % (lines - 2);
}

static inline bool is_zero(size_t index) { return options.zeros && index % options.zeros == 0; }

/* The page has to be zero before: the light pattern leaves the rest as it is. */
static void fill_page(uint64_t *page, size_t index, uint64_t seed)
{
    uint64_t base = page_base(seed, index);
    if (is_zero(index)) {
        /* A write, so that it is there. */
        __atomic_fetch_or(page, 0, __ATOMIC_RELAXED);
        return;
    }
    for (unsigned line = 0; line < lines; line++)
        if (is_patterned(base, line))
            for (unsigned word = line * line_words; word < (line + 1) * line_words; word++)
                page[word] = pattern(base, word);
}

static void check_page(const uint64_t *page, size_t index, uint64_t seed)
{
    uint64_t base = page_base(seed, index);
    for (unsigned line = 0; line < lines; line++) {
        bool patterned = !is_zero(index) && is_patterned(base, line);
        for (unsigned word = line * line_words; word < (line + 1) * line_words; word++) {
            uint64_t got = page[word], want = patterned ? pattern(base, word) : 0;
            if (got != want)
                wrong(page, index, word, got, want);
        }
    }
}

/*
 * A page that was never written, or was given back. Reading alone would show the kernel's one zero page: an atomic "or"
 * with 0 is a write, which makes the kernel allocate a page, and changes nothing in it.
 */
static void check_fresh_page(uint64_t *page, size_t index)
{
    __atomic_fetch_or(page, 0, __ATOMIC_RELAXED);
    for (unsigned word = 0; word < words; word++)
        if (page[word])
            wrong(page, index, word, page[word], 0);
}

/* Memory, waiting, chance */

/* Zero pages, huge or not as the options say. Aligned, or `--thp` would get few huge pages. */
static uint64_t *map_pages(size_t pages)
{
    size_t size = pages * page_size, slack = options.thp ? huge : 0;
    char *base = mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        fail("mmap");
    size_t skip = slack ? -(uintptr_t)base & (huge - 1) : 0;
    if (skip)
        munmap(base, skip);
    if (slack - skip)
        munmap(base + skip + size, slack - skip);
    /* A kernel without huge pages answers EINVAL, and there is nothing to forbid. */
    if (madvise(base + skip, size, options.thp ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) && (options.thp || errno != EINVAL))
        fail("madvise");
    return (uint64_t *)(base + skip);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/*
 * Waits for a line on stdin, or for so many seconds; a negative number means for ever. The line is read byte by byte: what
 * follows it is the shell's. The end of stdin ends the wait only if nothing else does: a shell's background jobs have none.
 */
static void wait_for_line(double seconds)
{
    double end = now() + seconds;
    struct pollfd in = {.fd = STDIN_FILENO, .events = POLLIN};
    char byte;
    fflush(stdout);
    for (;;) {
        double left = end - now();
        if (seconds >= 0 && left <= 0)
            return;
        /* In steps, so that no wait overflows poll's milliseconds. */
        int ready = poll(&in, 1, seconds >= 0 && left < 1000 ? (int)(left * 1000) + 1 : 1000000);
        if (ready < 0 && errno != EINTR)
            fail("poll");
        if (ready <= 0)
            continue;
        ssize_t got = read(STDIN_FILENO, &byte, 1);
        if (got == 1 && byte == '\n')
            return;
        if (got <= 0) {
            if (seconds < 0)
                return;
            in.fd = -1;
        }
    }
}

/* xorshift64*: the same seed gives the same run. */
static uint64_t next_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dULL >> 16;
}

static uint64_t *fill(size_t pages)
{
    uint64_t *memory = map_pages(pages);
    for (size_t i = 0; i < pages; i++)
        fill_page(memory + i * words, i, options.seed);
    return memory;
}

/* The subcommands */

static void hold(size_t pages, double seconds)
{
    uint64_t *memory = fill(pages);
    printf("peak\n");
    wait_for_line(seconds);
    for (size_t i = 0; i < pages; i++)
        check_page(memory + i * words, i, options.seed);
    printf("ok %zu pages\n", pages);
}

/* Frees runs of 1 to 8 pages with at least one kept page between two: as near to --keep as that allows. */
static void fragment(size_t pages, double seconds)
{
    uint64_t *memory = fill(pages), chance = mix(options.seed) | 1;
    bool *is_free = calloc(pages, 1);
    if (!is_free)
        fail("calloc");

    size_t freed = 0;
    double owed = 0; /* pages to keep so that the share comes out right; below 0 when too many were kept */
    for (size_t i = 0; i < pages;) {
        size_t run = owed < 0 ? 8 : 1 + next_random(&chance) % 8;
        if (run > pages - i)
            run = pages - i;
        if (madvise(memory + i * words, run * page_size, MADV_DONTNEED))
            fail("madvise");
        memset(is_free + i, true, run);
        freed += run;
        owed += (double)run * options.keep / (100 - options.keep);
        size_t kept = owed < 1 ? 1 : (size_t)owed;
        owed -= (double)kept;
        i += run + kept;
    }
    printf("fragmented %zu %zu\n", freed, pages - freed);
    wait_for_line(seconds);

    for (size_t i = 0; i < pages; i++)
        if (!is_free[i])
            check_page(memory + i * words, i, options.seed);
    for (size_t i = 0; i < pages; i++)
        if (is_free[i])
            check_fresh_page(memory + i * words, i);
    printf("ok %zu pages\n", pages);
}

static void verify_zero(size_t pages)
{
    uint64_t *memory = map_pages(pages);
    for (size_t i = 0; i < pages; i++)
        check_fresh_page(memory + i * words, i);
    printf("ok %zu pages\n", pages);
}

/* churn: each thread has slots; each slot is empty, a piece of memory or a file. */

enum { slots = 64, max_chunk = 1024, buffer_pages = 16 };

struct chunk {
    enum { empty, in_memory, in_file } kind;
    size_t pages;
    uint64_t seed;
    uint64_t *memory;
    int fd;
};

struct worker {
    pthread_t thread;
    unsigned number;
    size_t quota; /* pages, of memory and files together */
    double end;
    size_t checked;
    uint64_t chance, serial;
    uint64_t *buffer;
    struct chunk chunks[slots];
};

/* Small chunks are as likely as big ones: their number of bits is chosen first. */
static size_t random_size(struct worker *w)
{
    size_t top = 1UL << next_random(&w->chance) % 11;
    size_t pages = top + next_random(&w->chance) % top;
    return pages < max_chunk ? pages : max_chunk;
}

static void make_memory(struct chunk *c)
{
    c->kind = in_memory;
    c->memory = map_pages(c->pages);
    for (size_t i = 0; i < c->pages; i++) {
        check_fresh_page(c->memory + i * words, i);
        fill_page(c->memory + i * words, i, c->seed);
    }
}

/* The file loses its name at once, so that nothing is left behind however the program ends. */
static void make_file(struct worker *w, struct chunk *c)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/quire-load.%d.%u.%llu", options.directory, getpid(), w->number,
             (unsigned long long)w->serial);
    c->kind = in_file;
    c->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (c->fd < 0 || unlink(path))
        fail(path);
    for (size_t i = 0; i < c->pages; i += buffer_pages) {
        size_t count = c->pages - i < buffer_pages ? c->pages - i : buffer_pages;
        memset(w->buffer, 0, count * page_size);
        for (size_t j = 0; j < count; j++)
            fill_page(w->buffer + j * words, i + j, c->seed);
        ssize_t wrote = pwrite(c->fd, w->buffer, count * page_size, (off_t)(i * page_size));
        if (wrote != (ssize_t)(count * page_size)) {
            errno = wrote < 0 ? errno : ENOSPC;
            fail(path);
        }
    }
    /* Sometimes out of the page cache, so that reading it back takes new pages. */
    if (next_random(&w->chance) % 2) {
        if (fsync(c->fd))
            fail("fsync");
        posix_fadvise(c->fd, 0, 0, POSIX_FADV_DONTNEED);
    }
}

static void check_file(struct worker *w, struct chunk *c)
{
    if (next_random(&w->chance) % 2) { /* through a mapping: the page cache's own pages */
        uint64_t *map = mmap(NULL, c->pages * page_size, PROT_READ, MAP_SHARED, c->fd, 0);
        if (map == MAP_FAILED)
            fail("mmap of a file");
        for (size_t i = 0; i < c->pages; i++)
            check_page(map + i * words, i, c->seed);
        munmap(map, c->pages * page_size);
        return;
    }
    for (size_t i = 0; i < c->pages; i += buffer_pages) {
        size_t count = c->pages - i < buffer_pages ? c->pages - i : buffer_pages;
        if (pread(c->fd, w->buffer, count * page_size, (off_t)(i * page_size)) != (ssize_t)(count * page_size))
            fail("reading a file");
        for (size_t j = 0; j < count; j++)
            check_page(w->buffer + j * words, i + j, c->seed);
    }
}

static void check_chunk(struct worker *w, struct chunk *c)
{
    if (c->kind == in_file)
        check_file(w, c);
    else
        for (size_t i = 0; i < c->pages; i++)
            check_page(c->memory + i * words, i, c->seed);
    w->checked += c->pages;
}

static void free_chunk(struct worker *w, struct chunk *c)
{
    check_chunk(w, c);
    if (c->kind == in_file)
        close(c->fd);
    else
        munmap(c->memory, c->pages * page_size);
    w->quota += c->pages;
    c->kind = empty;
}

static void *work(void *argument)
{
    struct worker *w = argument;
    while (now() < w->end) {
        struct chunk *c = &w->chunks[next_random(&w->chance) % slots];
        if (c->kind == empty) {
            size_t pages = random_size(w);
            if (pages > w->quota)
                continue;
            w->quota -= pages;
            *c = (struct chunk){.pages = pages, .seed = mix(w->chance ^ ++w->serial)};
            if (options.directory && next_random(&w->chance) % 4 == 0)
                make_file(w, c);
            else
                make_memory(c);
        } else if (next_random(&w->chance) % 4 == 0) {
            check_chunk(w, c);
        } else {
            free_chunk(w, c);
        }
    }
    for (unsigned i = 0; i < slots; i++)
        if (w->chunks[i].kind != empty)
            free_chunk(w, &w->chunks[i]);
    return NULL;
}

static void churn(size_t pages, double seconds)
{
    struct worker *workers = calloc(options.threads, sizeof *workers);
    if (!workers)
        fail("calloc");
    double end = now() + seconds;
    for (unsigned i = 0; i < options.threads; i++) {
        struct worker *w = &workers[i];
        w->number = i;
        w->quota = pages / options.threads;
        w->end = end;
        w->chance = mix(options.seed + i) | 1;
        w->buffer = map_pages(buffer_pages);
        if ((errno = pthread_create(&w->thread, NULL, work, w)))
            fail("pthread_create");
    }
    size_t checked = 0;
    for (unsigned i = 0; i < options.threads; i++) {
        pthread_join(workers[i].thread, NULL);
        checked += workers[i].checked;
    }
    printf("ok %zu pages\n", checked);
}

/*
 * share: pages whose contents come from a small set, so that the same seed in another guest, and other pages of this one,
 * have equals of nearly all of them. A round rewrites some, one way or another, and checks each before and after.
 *
 * Stretches of pages differ in how long they keep a content, for a host merges what stays: some are written in every
 * round, some now and then, some never. What each page holds is known, so nothing is remembered but one number a page.
 */

enum { contents = 96, stretch = 32, zero_content = 0, own_content = 1 << 30 };

struct sharer {
    pthread_t thread;
    unsigned number;
    size_t first, pages; /* of the memory */
    double end, longest;
    size_t checked, written;
    uint64_t chance, own;
    uint64_t *buffer;
    int fd;
};

static uint64_t *shared_memory;
static uint32_t *shared_content; /* what each page holds */

static uint64_t content_base(const struct sharer *s, uint32_t content, size_t index)
{
    return content >= own_content ? mix(s->own ^ index << 32 ^ content) : mix(mix(options.seed) ^ content);
}

static void make_content(const struct sharer *s, uint64_t *page, uint32_t content, size_t index)
{
    uint64_t base = content_base(s, content, index);
    for (unsigned word = 0; word < words; word++)
        page[word] = content == zero_content ? 0 : pattern(base, word);
}

static void check_content(struct sharer *s, const uint64_t *page, size_t index)
{
    uint32_t content = shared_content[index];
    uint64_t base = content_base(s, content, index);
    for (unsigned word = 0; word < words; word++) {
        uint64_t want = content == zero_content ? 0 : pattern(base, word), got = ((volatile const uint64_t *)page)[word];
        if (got != want)
            wrong(page, index, word, got, want);
    }
    s->checked++;
}

/* The next content: in order, so that neighbours that are written together have neighbours' contents, as files do. */
static uint32_t next_content(struct sharer *s, size_t index, uint32_t old)
{
    if (options.alternate)
        return index % 2 ? own_content : 1 + index / 2 % (contents - 1);
    switch (index / stretch % 8) {
    case 0: return old == 2 ? 3 : 2; /* there and back again */
    case 1: return own_content + (uint32_t)(next_random(&s->chance) % own_content);
    case 2: return old ? zero_content : 4 + index % 8;
    default: return 1 + (old + 1 + index % stretch) % (contents - 1);
    }
}

static void rewrite_page(struct sharer *s, size_t index)
{
    uint64_t *page = shared_memory + index * words;
    uint32_t old = shared_content[index], next = next_content(s, index, old);
    off_t at = (off_t)(index % 4) * page_size;
    check_content(s, page, index);
    shared_content[index] = next;
    switch (next_random(&s->chance) % 5) {
    case 0: /* the program writes, from the front or from the back */
        make_content(s, page, next, index);
        break;
    case 1:
        make_content(s, s->buffer, next, index);
        for (unsigned word = words; word-- > 0;)
            ((volatile uint64_t *)page)[word] = s->buffer[word];
        break;
    case 2: /* the kernel writes: read(2) of a file into the page */
        make_content(s, s->buffer, next, index);
        if (pwrite(s->fd, s->buffer, page_size, at) != page_size || pread(s->fd, page, page_size, at) != page_size)
            fail("a file in between");
        break;
    case 3: /* the kernel reads: write(2) of the page, and what arrives is checked */
        if (pwrite(s->fd, page, page_size, at) != page_size || pread(s->fd, s->buffer, page_size, at) != page_size)
            fail("a file in between");
        shared_content[index] = old;
        check_content(s, s->buffer, index);
        shared_content[index] = next;
        make_content(s, page, next, index);
        break;
    case 4: /* freed, and another page in its place */
        if (madvise(page, page_size, MADV_DONTNEED))
            fail("madvise");
        if (next_random(&s->chance) % 2)
            check_fresh_page(page, index);
        make_content(s, page, next, index);
        break;
    }
    check_content(s, page, index);
    s->written++;
}

/* How many rounds a page stays as it is, on average; 0: for ever. */
static unsigned rounds_between(size_t index)
{
    static const unsigned choice[] = {12, 1, 40, 8, 0, 24, 6, 60};
    return options.storm ? 1 : options.alternate ? 0 : choice[index / stretch / 8 % 8];
}

static void *share_some(void *argument)
{
    struct sharer *s = argument;
    double last = now();
    while (last < s->end) {
        for (size_t i = s->first; i < s->first + s->pages; i++) {
            unsigned rounds = rounds_between(i);
            if (rounds && next_random(&s->chance) % rounds == 0)
                rewrite_page(s, i);
            else if (next_random(&s->chance) % 4 == 0)
                check_content(s, shared_memory + i * words, i);
            else
                continue;
            double t = now();
            if (t - last > s->longest)
                s->longest = t - last;
            last = t;
        }
        /* Time to be merged, before everything is written once more. */
        usleep(options.storm ? 800000 : 50000);
        last = now();
    }
    for (size_t i = s->first; i < s->first + s->pages; i++)
        check_content(s, shared_memory + i * words, i);
    return NULL;
}

static void share(size_t pages, double seconds)
{
    struct sharer *sharers = calloc(options.threads, sizeof *sharers);
    shared_memory = map_pages(pages);
    shared_content = calloc(pages, sizeof *shared_content);
    if (!sharers || !shared_content)
        fail("calloc");
    double end = now() + seconds;
    for (unsigned i = 0; i < options.threads; i++) {
        struct sharer *s = &sharers[i];
        char path[4096];
        *s = (struct sharer){.number = i, .first = pages * i / options.threads, .end = end, .buffer = map_pages(1)};
        s->pages = pages * (i + 1) / options.threads - s->first;
        s->chance = mix(options.seed + i) | 1;
        if (getrandom(&s->own, sizeof s->own, 0) != sizeof s->own)
            fail("getrandom");
        snprintf(path, sizeof path, "%s/quire-load.%d.%u", options.directory ? options.directory : "/tmp", getpid(), i);
        s->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (s->fd < 0 || unlink(path))
            fail(path);
        for (size_t j = s->first; j < s->first + s->pages; j++) {
            shared_content[j] = next_content(s, j, (uint32_t)(j / stretch % contents));
            make_content(s, shared_memory + j * words, shared_content[j], j);
        }
    }
    /* A page that is never written again. */
    size_t still = 0;
    while (still + 1 < pages && (rounds_between(still) || still / stretch % 8 < 3 || still % 2))
        still++;
    printf("sharing, still page at pfn 0x%llx\n", (unsigned long long)frame_number(shared_memory + still * words));
    fflush(stdout);
    for (unsigned i = 0; i < options.threads; i++)
        if ((errno = pthread_create(&sharers[i].thread, NULL, share_some, &sharers[i])))
            fail("pthread_create");
    size_t checked = 0, written = 0;
    double longest = 0;
    for (unsigned i = 0; i < options.threads; i++) {
        pthread_join(sharers[i].thread, NULL);
        checked += sharers[i].checked;
        written += sharers[i].written;
        if (sharers[i].longest > longest)
            longest = sharers[i].longest;
    }
    printf("ok %zu pages, %zu written, longest %.0f ms\n", checked, written, longest * 1e3);
}

/*
 * sweep: holds more than fits into memory, and goes over it for a while: stretches of pages are checked and, half of them,
 * written anew. What each page holds follows from how often it was written. At the end every page is checked.
 */

static uint64_t *swept_memory;
static uint8_t *swept_serial; /* of each page: how often it was written, wrapping around */

struct sweeper {
    pthread_t thread;
    size_t first, pages;
    size_t checked, written;
    uint64_t chance;
    double end;
};

static uint64_t swept_seed(size_t page)
{
    return options.seed + 1000003ULL * swept_serial[page];
}

static void *sweep_some(void *argument)
{
    struct sweeper *s = argument;
    for (size_t i = s->first; i < s->first + s->pages; i++)
        fill_page(swept_memory + i * words, i, swept_seed(i));
    while (now() < s->end) {
        size_t count = 1 + next_random(&s->chance) % 32, at = s->first + next_random(&s->chance) % s->pages;
        bool rewrite = next_random(&s->chance) % 2;
        for (size_t i = at; i < at + count && i < s->first + s->pages; i++) {
            check_page(swept_memory + i * words, i, swept_seed(i));
            s->checked++;
            if (!rewrite)
                continue;
            swept_serial[i]++;
            memset(swept_memory + i * words, 0, page_size);
            fill_page(swept_memory + i * words, i, swept_seed(i));
            s->written++;
        }
    }
    for (size_t i = s->first; i < s->first + s->pages; i++)
        check_page(swept_memory + i * words, i, swept_seed(i));
    s->checked += s->pages;
    return NULL;
}

static void sweep(size_t pages, double seconds)
{
    struct sweeper *sweepers = calloc(options.threads, sizeof *sweepers);
    swept_serial = calloc(pages, 1);
    if (!sweepers || !swept_serial)
        fail("calloc");
    swept_memory = map_pages(pages);
    double end = now() + seconds;
    for (unsigned i = 0; i < options.threads; i++) {
        struct sweeper *s = &sweepers[i];
        *s = (struct sweeper){.first = pages * i / options.threads, .end = end, .chance = mix(options.seed + i) | 1};
        s->pages = pages * (i + 1) / options.threads - s->first;
        if ((errno = pthread_create(&s->thread, NULL, sweep_some, s)))
            fail("pthread_create");
    }
    size_t checked = 0, written = 0;
    for (unsigned i = 0; i < options.threads; i++) {
        pthread_join(sweepers[i].thread, NULL);
        checked += sweepers[i].checked;
        written += sweepers[i].written;
    }
    printf("ok %zu pages, %zu written anew\n", checked, written);
}

/*
 * swapin: what it costs to bring pages back that the kernel has swapped out. More than memory holds is written; half of each
 * page can be compressed. Then pages are read in random order, those that were a major fault are timed, and then all of
 * them in order.
 */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static long major_faults(void)
{
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage))
        fail("getrusage");
    return usage.ru_majflt;
}

static void check_half(const uint64_t *page, size_t index)
{
    for (unsigned word = 0; word < words; word++) {
        uint64_t want = word < words / 2 ? pattern(page_base(options.seed, index), word) : 0;
        if (page[word] != want)
            wrong(page, index, word, page[word], want);
    }
}

static void swap_in(size_t pages)
{
    uint64_t *memory = map_pages(pages), chance = mix(options.seed) | 1;
    size_t samples = 4000, count = 0;
    double *times = calloc(samples, sizeof *times), start = now();
    if (!times)
        fail("calloc");
    for (size_t i = 0; i < pages; i++)
        for (unsigned word = 0; word < words / 2; word++)
            memory[i * words + word] = pattern(page_base(options.seed, i), word);
    double filled = now() - start;
    for (size_t tries = 0; count < samples && tries < 20 * samples; tries++) {
        size_t page = next_random(&chance) % pages;
        long before = major_faults();
        double begin = now();
        (void)*(volatile uint64_t *)(memory + page * words);
        double took = now() - begin;
        if (major_faults() > before)
            times[count++] = took;
        check_half(memory + page * words, page);
    }
    if (!count) {
        printf("nothing was swapped\n");
        exit(2);
    }
    qsort(times, count, sizeof *times, by_value);
    long before = major_faults();
    start = now();
    for (size_t i = 0; i < pages; i++)
        check_half(memory + i * words, i);
    printf("ok %zu pages, out %.3f s, random %zu median %.1f us p99 %.1f us, in order %.3f s with %ld faults\n", pages, filled, count,
           times[count / 2] * 1e6, times[count * 99 / 100] * 1e6, now() - start, major_faults() - before);
}

static int usage(void)
{
    fputs("usage: quire-load hold MIB [SECONDS]\n"
          "       quire-load fragment MIB [SECONDS] [--keep PERCENT]\n"
          "       quire-load churn MIB SECONDS [--threads N] [--file DIR]\n"
          "       quire-load verify-zero MIB\n"
          "       quire-load sweep MIB SECONDS [--threads N]\n"
          "       quire-load swapin MIB\n"
          "       quire-load share MIB SECONDS [--threads N] [--file DIR]\n"
          "options: --seed N   another seed, other bytes (1)\n"
          "         --full     a pattern in every byte, instead of in 192 a page and zero elsewhere\n"
          "         --thp      with transparent huge pages\n"
          "         --alternate  share: every second page is like no other, and none is rewritten\n"
          "         --zeros N  every Nth page is zeros; not for share and sweep\n"
          "         --storm    share: all pages are rewritten at once, again and again\n"
          "share rewrites and checks pages whose contents are few, the same for the same seed.\n"
          "hold says `peak` and fragment `fragmented FREED KEPT` (pages), then both wait for a line on stdin, or for\n"
          "SECONDS, and check. Each ends with `ok N pages` or a line that starts with WRONG.\n",
          stderr);
    return 2;
}

/* A whole number in a range, or the usage and the end. */
static unsigned long number(const char *text, unsigned long low, unsigned long high)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 0);
    if (*text < '0' || *text > '9' || *end || errno || value < low || value > high) {
        fprintf(stderr, "quire-load: %s is not a number from %lu to %lu\n", text, low, high);
        exit(usage());
    }
    return value;
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"full", no_argument, NULL, 'f'},        {"thp", no_argument, NULL, 't'},
        {"alternate", no_argument, NULL, 'a'},
        {"storm", no_argument, NULL, 'm'},
        {"seed", required_argument, NULL, 's'},  {"keep", required_argument, NULL, 'k'},
        {"threads", required_argument, NULL, 'n'}, {"file", required_argument, NULL, 'd'},
        {"zeros", required_argument, NULL, 'z'},
        {0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;)
        switch (option) {
        case 'f': options.full = true; break;
        case 't': options.thp = true; break;
        case 'a': options.alternate = true; break;
        case 'm': options.storm = true; break;
        case 's': options.seed = number(optarg, 0, UINT64_MAX); break;
        case 'k': options.keep = (unsigned)number(optarg, 1, 99); break;
        case 'n': options.threads = (unsigned)number(optarg, 1, 64); break;
        case 'd': options.directory = optarg; break;
        case 'z': options.zeros = (unsigned)number(optarg, 1, 1 << 20); break;
        default: return usage();
        }

    char **arguments = argv + optind;
    int count = argc - optind;
    if (count < 2 || count > 3)
        return usage();
    const char *command = arguments[0];
    size_t pages = number(arguments[1], 1, 1UL << 24) * pages_per_mib;
    double seconds = count > 2 ? (double)number(arguments[2], 0, 1UL << 24) : -1;

    if (!strcmp(command, "hold"))
        hold(pages, seconds);
    else if (!strcmp(command, "fragment"))
        fragment(pages, seconds);
    else if (!strcmp(command, "churn") && count == 3)
        churn(pages, seconds);
    else if (!strcmp(command, "sweep") && count == 3)
        sweep(pages, seconds);
    else if (!strcmp(command, "share") && count == 3)
        share(pages, seconds);
    else if (!strcmp(command, "swapin") && count == 2)
        swap_in(pages);
    else if (!strcmp(command, "verify-zero") && count == 2)
        verify_zero(pages);
    else
        return usage();
    return 0;
}
