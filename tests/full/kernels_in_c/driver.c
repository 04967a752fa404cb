/* Runs recorded calls of kernels outside Python: driver CALLS RESULTS. captured_calls.py writes CALLS and reads RESULTS.
 *
 * All numbers are int64. CALLS: the number of buffers, then of each its size and bytes; the number of addresses within
 * buffers, then of each the buffer, the place in it, and the buffer and offset that it names; the number of calls, then of
 * each the kernel's name (64 bytes), threads, the number of tiers, the tiers (the first with code is run), the number of
 * fields, and of each a buffer (-1: none) and the offset in it or the value. RESULTS: the bytes of all buffers.
 * Buffers end where their memory ends, so that AddressSanitizer sees what reads or writes behind one.
 */
#include "threads.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FIELDS 64

extern const struct kernel quickchange_kernels[];

static FILE *calls;

static void read_bytes(void *to, int64_t size)
{
    if (size && fread(to, 1, (size_t)size, calls) != (size_t)size) {
        fprintf(stderr, "the calls end too early\n");
        exit(2);
    }
}

static int64_t read_number(void)
{
    int64_t number;
    read_bytes(&number, sizeof number);
    return number;
}

static const struct kernel *find(const char *name)
{
    for (const struct kernel *kernel = quickchange_kernels; kernel->name; kernel++)
        if (!strcmp(kernel->name, name))
            return kernel;
    fprintf(stderr, "there is no kernel '%s'\n", name);
    exit(2);
}

static void run_call(char **buffers)
{
    char name[64];
    read_bytes(name, sizeof name);
    const struct kernel *kernel = find(name);
    const int64_t threads = read_number(), num_tiers = read_number();
    kernel_code *code = NULL;
    for (int64_t i = 0; i < num_tiers; i++) {
        const int64_t tier = read_number();
        code = code ? code : kernel->code[tier];
    }
    const int64_t num_fields = read_number();
    if (!code || num_fields * 8 != kernel->record_size || num_fields > MAX_FIELDS) {
        fprintf(stderr, "'%s' has no code for these tiers, or another record\n", name);
        exit(2);
    }
    int64_t record[MAX_FIELDS];
    for (int64_t i = 0; i < num_fields; i++) {
        const int64_t buffer = read_number(), value = read_number();
        record[i] = buffer < 0 ? value : (int64_t)(intptr_t)(buffers[buffer] + value);
    }
    quickchange_run_on_own_threads(code, record, threads);
}

int main(int count, char **words)
{
    if (count != 3 || !(calls = fopen(words[1], "rb")))
        return 2;
    const int64_t num_buffers = read_number();
    char **buffers = malloc((size_t)(num_buffers + 1) * sizeof *buffers);
    int64_t *sizes = malloc((size_t)(num_buffers + 1) * sizeof *sizes);
    for (int64_t i = 0; i < num_buffers; i++) {
        sizes[i] = read_number();
        if (posix_memalign((void **)&buffers[i], 64, (size_t)sizes[i]))
            return 2;
        read_bytes(buffers[i], sizes[i]);
    }
    for (int64_t left = read_number(); left > 0; left--) {
        const int64_t buffer = read_number(), place = read_number(), named = read_number(), offset = read_number();
        const int64_t address = (int64_t)(intptr_t)(buffers[named] + offset);
        memcpy(buffers[buffer] + place, &address, sizeof address);
    }
    for (int64_t left = read_number(); left > 0; left--)
        run_call(buffers);
    fclose(calls);
    FILE *results = fopen(words[2], "wb");
    if (!results)
        return 2;
    for (int64_t i = 0; i < num_buffers; i++) {
        fwrite(buffers[i], 1, (size_t)sizes[i], results);
        free(buffers[i]);
    }
    free(buffers);
    free(sizes);
    return fclose(results) ? 2 : 0;
}
