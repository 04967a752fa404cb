#include "tier.h"

#include "lora.h"
#include "vectors.h"

#define BLOCK_ROWS 32    /* rows whose x stays in the L2 cache while columns of A use it */
#define BLOCK_COLUMNS 4  /* columns of x @ A whose A stays in the L1 cache while rows use it */
#define SHARE_OUTPUTS 64 /* threads share the outputs in multiples of so many */
#define PIECE_OUTPUTS 512
#define PIECE_NUMBERS 32768 /* of B, which stay in the L2 cache while rows use them */
#define PIECE_COLUMNS 8     /* columns of low that are added before y is stored: as many streams of B */
#define PIECE_ROWS 4
#define PREFETCH 128 /* numbers of B ahead, where one row uses it */
#if WIDTH == 16
#define SUM_ROWS 4 /* rows and columns of x @ A whose sums are in registers at once */
#define SUM_COLUMNS 4
#else
#define SUM_ROWS 2
#define SUM_COLUMNS 2
#endif
#define UNROLLED _Pragma("GCC unroll 8") for

INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

/* Where x @ A of a row of x is kept. */
INLINE float *low_of(const struct lora_tasks *tasks, const struct lora_task *task, int64_t row)
{
    return tasks->low + (task->rows_before + row - task->first) * tasks->low_stride;
}

/* low = factor * x @ A of some rows and columns. Each sum is over lanes of sixteen inputs, then of the lanes. */
INLINE void multiply_a(
    const float *x, int64_t inputs, const float *a, int64_t a_stride, float factor, float *low, int64_t low_stride,
    const int rows, const int columns)
{
    floats sums[4][4];
    UNROLLED (int r = 0; r < rows; r++)
        UNROLLED (int c = 0; c < columns; c++)
            sums[r][c] = all(0.0f);
    const int64_t whole = inputs / LANES * LANES, rest = inputs - whole;
    for (int64_t i = 0; i < whole; i += LANES) {
        floats values[4];
        UNROLLED (int r = 0; r < rows; r++)
            values[r] = load(x + r * inputs + i);
        UNROLLED (int c = 0; c < columns; c++) {
            const floats weights = load(a + c * a_stride + i);
            UNROLLED (int r = 0; r < rows; r++)
                sums[r][c] = multiply_add(values[r], weights, sums[r][c]);
        }
    }
    if (rest)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                sums[r][c] = multiply_add(
                    load_some(x + r * inputs + whole, rest, 0.0f), load_some(a + c * a_stride + whole, rest, 0.0f),
                    sums[r][c]);
    UNROLLED (int r = 0; r < rows; r++)
        UNROLLED (int c = 0; c < columns; c++)
            low[r * low_stride + c] = sum_of(sums[r][c]) * factor;
}

/* The same of a block of rows and columns. */
static void multiply_a_block(
    const float *x, int64_t inputs, const float *a, int64_t a_stride, float factor, float *low, int64_t low_stride,
    int64_t rows, int64_t columns)
{
    int64_t r = 0;
    for (; r + SUM_ROWS <= rows; r += SUM_ROWS) {
        int64_t c = 0;
        for (; c + SUM_COLUMNS <= columns; c += SUM_COLUMNS)
            multiply_a(x + r * inputs, inputs, a + c * a_stride, a_stride, factor, low + r * low_stride + c, low_stride,
                       SUM_ROWS, SUM_COLUMNS);
        for (; c < columns; c++)
            multiply_a(x + r * inputs, inputs, a + c * a_stride, a_stride, factor, low + r * low_stride + c, low_stride,
                       SUM_ROWS, 1);
    }
    for (; r < rows; r++)
        if (columns == BLOCK_COLUMNS)
            multiply_a(x + r * inputs, inputs, a, a_stride, factor, low + r * low_stride, low_stride, 1, BLOCK_COLUMNS);
        else
            for (int64_t c = 0; c < columns; c++)
                multiply_a(x + r * inputs, inputs, a + c * a_stride, a_stride, factor, low + r * low_stride + c,
                           low_stride, 1, 1);
}

/* y += low @ B of some rows and columns of low, one column after another. */
INLINE void multiply_b(
    const float *low, int64_t low_stride, const float *b, int64_t outputs, float *y, int64_t y_stride, int64_t count,
    const int rows, const int columns)
{
    const int64_t whole = count / LANES * LANES, rest = count - whole;
    for (int64_t o = 0; o < whole; o += LANES) {
        floats sums[PIECE_ROWS];
        UNROLLED (int r = 0; r < rows; r++)
            sums[r] = load(y + r * y_stride + o);
        UNROLLED (int c = 0; c < columns; c++) {
            const float *weights = b + c * outputs + o;
            if (rows == 1)
                __builtin_prefetch(weights + PREFETCH);
            UNROLLED (int r = 0; r < rows; r++)
                sums[r] = multiply_add(all(low[r * low_stride + c]), load(weights), sums[r]);
        }
        UNROLLED (int r = 0; r < rows; r++)
            store(y + r * y_stride + o, sums[r]);
    }
    if (rest)
        for (int r = 0; r < rows; r++) {
            floats sum = load_some(y + r * y_stride + whole, rest, 0.0f);
            for (int c = 0; c < columns; c++)
                sum = multiply_add(all(low[r * low_stride + c]), load_some(b + c * outputs + whole, rest, 0.0f), sum);
            store_some(y + r * y_stride + whole, sum, rest);
        }
}

/* The same of all columns. */
INLINE void multiply_b_rows(
    const float *low, int64_t low_stride, const float *b, int64_t rank, int64_t outputs, float *y, int64_t y_stride,
    int64_t count, const int rows)
{
    int64_t c = 0;
    for (; c + PIECE_COLUMNS <= rank; c += PIECE_COLUMNS)
        multiply_b(low + c, low_stride, b + c * outputs, outputs, y, y_stride, count, rows, PIECE_COLUMNS);
    for (; c < rank; c++)
        multiply_b(low + c, low_stride, b + c * outputs, outputs, y, y_stride, count, rows, 1);
}

static void multiply_b_piece(
    const float *low, int64_t low_stride, const float *b, int64_t rank, int64_t outputs, float *y, int64_t y_stride,
    int64_t count, int64_t rows)
{
    int64_t r = 0;
    for (; r + PIECE_ROWS <= rows; r += PIECE_ROWS)
        multiply_b_rows(
            low + r * low_stride, low_stride, b, rank, outputs, y + r * y_stride, y_stride, count, PIECE_ROWS);
    for (; r < rows; r++)
        multiply_b_rows(low + r * low_stride, low_stride, b, rank, outputs, y + r * y_stride, y_stride, count, 1);
}

/* This thread's share of factor * x @ A of all tasks: every block of rows and columns is a turn. */
static void multiply_by_a(const struct add_deltas_record *a, const struct team *team)
{
    int64_t turn = 0;
    for (int64_t number = 0; number < a->tasks->count; number++) {
        const struct lora_task *task = &a->tasks->tasks[number];
        const struct lora_factors *factors = &(*a->factors)[task->adapter];
        for (int64_t row = task->first; row < task->end; row += BLOCK_ROWS)
            for (int64_t column = 0; column < factors->rank; column += BLOCK_COLUMNS)
                if (turn++ % team->size == team->thread)
                    multiply_a_block(
                        a->x + row * a->inputs, a->inputs, factors->a + column * factors->a_stride, factors->a_stride,
                        task->factor, low_of(a->tasks, task, row) + column, a->tasks->low_stride,
                        least(BLOCK_ROWS, task->end - row), least(BLOCK_COLUMNS, factors->rank - column));
    }
}

/* Outputs whose B stays in the caches while many rows use it. */
static int64_t piece_outputs(int64_t rank, int64_t rows)
{
    const int64_t fitting = PIECE_NUMBERS / (rank + 1) / LANES * LANES;
    return rows < PIECE_ROWS || fitting > PIECE_OUTPUTS ? PIECE_OUTPUTS : fitting > LANES ? fitting : LANES;
}

/* Outputs first to end of y += low @ B, of all tasks. */
static void add_product_with_b(const struct add_deltas_record *a, int64_t first, int64_t end)
{
    for (int64_t number = 0; number < a->tasks->count; number++) {
        const struct lora_task *task = &a->tasks->tasks[number];
        const struct lora_factors *factors = &(*a->factors)[task->adapter];
        const int64_t piece = piece_outputs(factors->rank, task->end - task->first);
        for (int64_t output = first; output < end; output += piece)
            multiply_b_piece(
                low_of(a->tasks, task, task->first), a->tasks->low_stride, factors->b + output, factors->rank,
                a->outputs, a->y + task->first * a->y_stride + output, a->y_stride, least(piece, end - output),
                task->end - task->first);
    }
}

void TIERED(add_deltas)(const void *record, const struct team *team)
{
    const struct add_deltas_record *a = record;
    if (a->tasks->count == 0)
        return;
    multiply_by_a(a, team);
    barrier(team);
    add_product_with_b(
        a, share(a->outputs, SHARE_OUTPUTS, team->thread, team->size),
        share(a->outputs, SHARE_OUTPUTS, team->thread + 1, team->size));
}

#include "tier_end.h"
