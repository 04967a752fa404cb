/* What a kernel is: a function of one record of arguments, which every thread of a team calls.
 *
 * A record holds counts and addresses, all fields of 8 bytes. RECORD defines its struct and a text of its fields from one
 * list, so that the loader (library.py) can compare both sides field by field:
 *
 *     #define ADD_FIELDS(FIELD) FIELD(const float *, x) FIELD(float *, y) FIELD(int64_t, size)
 *     RECORD(add, ADD_FIELDS)
 *
 * Each source file that is not named for a tier is compiled once for every vector tier (tier.h), and TIERED(add) is then
 * add_generic, add_avx2 and so on. kernels.c has the table of all kernels, and the choice of the tier.
 */
#ifndef KERNEL_H
#define KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* The threads that run one call. wait returns when all of them have called it; tickets is for blocks.h. */
struct team {
    int64_t thread, size;
    void (*wait)(void *);
    void *state;
    _Atomic int64_t *tickets;
};

static inline void barrier(const struct team *team)
{
    if (team->size > 1)
        team->wait(team->state);
}

/* Where the share of one thread begins, of count items in blocks of block items; the share of thread + 1 begins at its end. */
static inline int64_t share(int64_t count, int64_t block, int64_t thread, int64_t size)
{
    int64_t blocks = (count + block - 1) / block, first = blocks * thread / size * block;
    return first < count ? first : count;
}

typedef void kernel_code(const void *record, const struct team *team);

enum tier { GENERIC, AVX2, AVXVNNI, AVX512VNNI, AMX, DOTPROD, I8MM, NUM_TIERS };

struct kernel {
    const char *name;
    const char *fields; /* "const float *|x;int64_t|size;" */
    int64_t record_size;
    kernel_code *code[NUM_TIERS]; /* NULL: the code of the next lower tier */
};

#define MEMBER_OF_RECORD(type, name) type name;
#define TEXT_OF_FIELD(type, name) #type "|" #name ";"
#define SIZE_OF_FIELD(type, name) _Static_assert(sizeof(type) == 8, "every field of a record has 8 bytes");
#define RECORD(kernel, fields) \
    struct kernel##_record { fields(MEMBER_OF_RECORD) }; \
    fields(SIZE_OF_FIELD) \
    enum { kernel##_is_declared = 1 };

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define TIERED(name) JOIN(name, TIER_SUFFIX)

#endif
