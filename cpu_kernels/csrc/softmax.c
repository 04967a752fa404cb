#include "tier.h"

#include "softmax.h"
#include "vectors.h"

#define SHARE_BLOCKS 8      /* threads share the blocks in multiples of so many */
#define LEAST 0x1p-126f     /* weights below it count as 0 */
#define LOG2_E 0x1.715476p+0f

struct block {
    floats sum, largest; /* in each lane, of its weights */
};

/* 2 to the x for x <= 0, to two units in the last place and exact at 0; less than LEAST where that is.
 *
 * 2^x = 2^n 2^r with n the integer nearest to x; 2^r is 1 + r q(r), q by Remez's algorithm. */
INLINE floats power_of_two(floats x)
{
    const floats to_integer = all(12582912.0f); /* 1.5 * 2^23: a sum with it is rounded to an integer, in its low bits */
    const floats limited = larger(all(-127.0f), x);
    const floats shifted = add(limited, to_integer);
    const floats r = subtract(limited, subtract(shifted, to_integer));
    floats q = all(0x1.5bba14p-10f);
    q = multiply_add(q, r, all(0x1.3cea88p-7f));
    q = multiply_add(q, r, all(0x1.c6b752p-5f));
    q = multiply_add(q, r, all(0x1.ebf9bcp-3f));
    q = multiply_add(q, r, all(0x1.62e42ap-1f));
    const floats power = multiply_add(q, r, all(1.0f));
    return of_bits(add_integers(bits_of(power), shift_left(bits_of(shifted), 23)));
}

INLINE struct block weigh(struct block block, floats logits, float largest, float factor, float floor, float *weights)
{
    const floats weight = power_of_two(multiply(subtract(logits, all(largest)), all(factor)));
    const floats kept = choose(is_less(all(floor), weight), weight, all(0.0f));
    if (weights)
        store(weights, kept);
    return (struct block){add(block.sum, kept), larger(kept, block.largest)};
}

/* The block of count logits; weights, if any, are for a whole block. */
INLINE struct block weigh_block(
    const float *logits, int64_t count, float largest, float factor, float floor, float *weights)
{
    const floats minus_infinity = all(-__builtin_inff());
    struct block block = {all(0.0f), all(0.0f)};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        block = weigh(block, load(logits + i), largest, factor, floor, weights ? weights + i : NULL);
    if (i < count) {
        const floats rest = load_some(logits + i, count - i, -__builtin_inff());
        block = weigh(block, rest, largest, factor, floor, weights ? weights + i : NULL);
        i += LANES;
    }
    for (; weights && i < SOFTMAX_BLOCK; i += LANES)
        block = weigh(block, minus_infinity, largest, factor, floor, weights + i);
    return block;
}

void TIERED(softmax_blocks)(const void *record, const struct team *team)
{
    const struct softmax_blocks_record *a = record;
    const int64_t total = a->num_rows * a->num_blocks;
    const int64_t end = share(total, SHARE_BLOCKS, team->thread + 1, team->size);
    for (int64_t i = share(total, SHARE_BLOCKS, team->thread, team->size); i < end; i++) {
        const int64_t number = i / a->num_blocks, row = a->rows ? a->rows[number] : number;
        const int64_t place = (a->first_blocks ? a->first_blocks[number] : 0) + i % a->num_blocks;
        const int64_t first = place * SOFTMAX_BLOCK, left = a->width - first;
        const int64_t count = left < SOFTMAX_BLOCK ? left : SOFTMAX_BLOCK;
        const float *logits = a->logits + row * a->row_stride + first;
        const float largest = a->largest[row], factor = a->factors[row] * LOG2_E;
        const float floor = a->floors[number] < LEAST ? LEAST : a->floors[number];
        struct block block = {all(0.0f), all(0.0f)};
        if (a->weights)
            block = weigh_block(logits, count, largest, factor, floor, a->weights + i * SOFTMAX_BLOCK);
        else if (!a->maxima || a->maxima[row * a->blocks_of_row + place] > floor)
            block = weigh_block(logits, count, largest, factor, floor, NULL);
        if (a->sums)
            a->sums[i] = sum_of(block.sum);
        if (a->new_maxima)
            a->new_maxima[i] = largest_of(block.largest);
    }
}

#include "tier_end.h"
