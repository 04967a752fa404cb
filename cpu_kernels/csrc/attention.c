/* Attention by online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) over blocks of KEYS keys, which begin at
 * multiples of KEYS from the sequence's start. The sums of PART keys, a part, are apart until they are merged in order
 * (Dao et al. 2023).
 *
 * A row of a query head has the same result to the bit whatever other rows are in the call: its sums run over the keys
 * that it sees in the same order, with the same blocks and parts; keys that it does not see have no product, not even
 * one with 0. Rows that share a block of keys, a panel, share only the work of packing it. */
#include "tier.h"

#include "attention.h"
#include "attention_blocks.h"
#include "exponential.h"
#include "float_product.h"

#define PART 512
#define SHARED 24 /* rows of query heads whose scores lie in the first cache together */
#define LOWEST -3.402823466e38f
#define MINUS_INFINITY -__builtin_inff()

/* The state of one row of a query head: first its largest score, then */
#define TOTALS LANES     /* the sums of powers, a lane for each key modulo LANES, and */
#define SUMS (2 * LANES) /* value_dim weighted sums of values, padded to whole vectors */

struct sizes {
    int64_t width; /* value_dim in whole vectors */
    int64_t state; /* numbers of a state */
};

struct memory { /* of one thread */
    float *queries, *keys, *values, *scores, *states, *part_states;
};

/* Consecutive rows of a sequence, and a head of its keys and values. */
struct panel {
    int64_t row, count, position, kv_head;
    const char *keys, *values;
};

static inline struct sizes sizes_of(const struct attention_record *a)
{
    const int64_t width = whole_vectors(a->value_dim);
    return (struct sizes){width, SUMS + width};
}

static struct memory memory_of(const struct attention_record *a, int64_t thread)
{
    const struct sizes sizes = sizes_of(a);
    const int64_t heads = a->panel * a->group, shared = least(heads, most(SHARED, a->group));
    struct memory m;
    m.queries = a->scratch + LANES + thread * a->scratch_size;
    m.keys = m.queries + whole_vectors(heads * a->dim);
    m.values = m.keys + KEYS * a->dim;
    m.scores = m.values + KEYS * sizes.width;
    m.states = m.scores + shared * KEYS;
    m.part_states = m.states + heads * sizes.state;
    return m;
}

static inline int64_t number_size(const struct attention_record *a) { return a->is_bfloat16 ? 2 : 4; }

static void write_rows(const struct attention_record *a, const struct team *team)
{
    const int64_t end = share(a->rows, 1, team->thread + 1, team->size), size = number_size(a);
    for (int64_t row = share(a->rows, 1, team->thread, team->size); row < end; row++)
        for (int64_t head = 0; head < a->kv_heads; head++) {
            const int64_t slot = a->slots[row], position = a->positions[row];
            char *key = a->keys + size * (slot * a->key_slot + head * a->key_head + position * a->dim);
            char *value = a->values + size * (slot * a->value_slot + head * a->value_head + position * a->value_dim);
            write_numbers(a->k + row * a->k_row + head * a->k_head, key, a->dim, a->is_bfloat16);
            write_numbers(a->v + row * a->v_row + head * a->v_head, value, a->value_dim, a->is_bfloat16);
        }
}

static void pack_queries(const struct attention_record *a, const struct panel *panel, float *queries)
{
    const float scale = (float)a->scale;
    for (int64_t row = 0; row < panel->count; row++)
        for (int64_t head = 0; head < a->group; head++) {
            const float *q = a->q + (panel->row + row) * a->q_row + (panel->kv_head * a->group + head) * a->q_head;
            float *query = queries + (row * a->group + head) * a->dim;
            for (int64_t d = 0; d < a->dim; d++)
                query[d] = q[d] * scale;
        }
}

/* Softmax. */

static inline floats capped(floats scores, float softcap)
{
    const floats power = exponential(multiply(scores, all(2.0f / softcap))); /* tanh x = 1 - 2 / (e^2x + 1) */
    return subtract(all(softcap), divide(all(2.0f * softcap), add(power, all(1.0f))));
}

/* minus infinity but for the lanes from first on and before end */
static inline floats only(floats x, int64_t first, int64_t end)
{
    static const int32_t numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const integers lanes = load_integers(numbers);
    const integers from = all_integers((int32_t)most(first, 0)), to = all_integers((int32_t)least(end, LANES));
    const integers mask = EACH_PART(integers, (lanes.p[i] >= from.p[i]) & (lanes.p[i] < to.p[i]));
    return choose(mask, x, all(MINUS_INFINITY));
}

/* Scores of a block -> powers, in place; only keys from first on and before end count. Earlier sums of the state are
 * made relative to the new largest score. */
static inline void weigh(float *scores, int64_t first, int64_t end, float softcap, float *state, int64_t state_size)
{
    const int64_t used = whole_vectors(end);
    floats largest = all(MINUS_INFINITY);
    for (int64_t key = 0; key < used; key += LANES) {
        floats part = load(scores + key);
        if (softcap != 0.0f)
            part = capped(part, softcap);
        if (first > key || end < key + LANES)
            part = only(part, first - key, end - key);
        store(scores + key, part);
        largest = larger(part, largest);
    }
    const float before = state[0], block = largest_of(largest), now = block > before ? block : before;
    if (now > before) {
        const floats factor = exponential(all(before - now));
        for (int64_t i = TOTALS; i < state_size; i += LANES)
            store(state + i, multiply(load(state + i), factor));
        state[0] = now;
    }
    floats totals = load(state + TOTALS);
    for (int64_t key = 0; key < used; key += LANES) {
        const floats powers = exponential(subtract(load(scores + key), all(now)));
        store(scores + key, powers);
        totals = add(totals, powers);
    }
    store(state + TOTALS, totals);
}

static void merge(float *state, const float *part, int64_t state_size)
{
    const float now = state[0] > part[0] ? state[0] : part[0];
    const floats factor = exponential(all(state[0] - now)), part_factor = exponential(all(part[0] - now));
    for (int64_t i = TOTALS; i < state_size; i += LANES)
        store(state + i, multiply_add(load(part + i), part_factor, multiply(load(state + i), factor)));
    state[0] = now;
}

/* The rows of a panel on its keys. */

static inline int64_t first_key(const struct attention_record *a, int64_t position)
{
    return a->window ? most(0, position - a->window + 1) : 0;
}

/* Rows from row on and before end on the packed block of keys that begins at key. */
static void attend_rows(
    const struct attention_record *a, const struct panel *panel, const struct memory *m, int64_t key, int64_t row,
    int64_t end, const float *values, float *states)
{
    const struct sizes sizes = sizes_of(a);
    const int64_t seen = least(KEYS, panel->position + end - key), vectors = whole_vectors(seen) / LANES;
    const int64_t stride = sizes.width, num_vectors = sizes.width / LANES;
    __builtin_memset(m->scores, 0, (end - row) * a->group * KEYS * sizeof(float));
    multiply_matrices(
        (end - row) * a->group, m->queries + row * a->group * a->dim, a->dim, m->keys, KEYS, vectors, m->scores, KEYS,
        a->dim);
    int is_whole = 1;
    for (int64_t r = row; r < end; r++) {
        const int64_t position = panel->position + r;
        const int64_t begin = most(0, first_key(a, position) - key), behind = least(KEYS, position + 1 - key);
        is_whole &= begin == 0 && behind == KEYS;
        for (int64_t i = r * a->group; i < (r + 1) * a->group; i++)
            weigh(
                m->scores + (i - row * a->group) * KEYS, begin, behind, (float)a->softcap, states + i * sizes.state,
                sizes.state);
    }
    for (int64_t r = row; r < end; r = is_whole ? end : r + 1) {
        const int64_t position = panel->position + r, count = is_whole ? end - row : 1;
        const int64_t begin = most(0, first_key(a, position) - key), behind = least(KEYS, position + 1 - key);
        multiply_matrices(
            count * a->group, m->scores + (r - row) * a->group * KEYS + begin, KEYS, values + begin * stride, stride,
            num_vectors, states + r * a->group * sizes.state + SUMS, sizes.state, behind - begin);
    }
}

static void attend_to_block(
    const struct attention_record *a, const struct panel *panel, const struct memory *m, int64_t key, float *states)
{
    const struct sizes sizes = sizes_of(a);
    const int64_t first = most(0, key - panel->position);
    const int64_t end = a->window ? least(panel->count, key + KEYS + a->window - 1 - panel->position) : panel->count;
    const int64_t num = least(KEYS, panel->position + end - key);
    const char *keys = panel->keys + number_size(a) * key * a->dim;
    const char *values = panel->values + number_size(a) * key * a->value_dim;
    pack_keys(keys, num, a->dim, (int)a->is_bfloat16, m->keys);
    const int is_packed = a->is_bfloat16 || sizes.width != a->value_dim;
    if (is_packed)
        pack_values(values, num, a->value_dim, sizes.width, (int)a->is_bfloat16, m->values);
    const int64_t step = most(1, SHARED / a->group);
    for (int64_t row = first; row < end; row += step)
        attend_rows(
            a, panel, m, key, row, least(end, row + step), is_packed ? m->values : (const float *)values, states);
}

static void attend_to_part(
    const struct attention_record *a, const struct panel *panel, const struct memory *m, int64_t part, float *states)
{
    const int64_t size = sizes_of(a).state;
    __builtin_memset(states, 0, panel->count * a->group * size * sizeof(float));
    for (int64_t i = 0; i < panel->count * a->group; i++)
        states[i * size] = LOWEST;
    const int64_t end = least((part + 1) * PART, panel->position + panel->count);
    for (int64_t key = most(part * PART, first_key(a, panel->position) / KEYS * KEYS); key < end; key += KEYS)
        attend_to_block(a, panel, m, key, states);
}

static void finish(const struct attention_record *a, const struct panel *panel, const float *states)
{
    const int64_t size = sizes_of(a).state, heads = a->kv_heads * a->group;
    for (int64_t row = 0; row < panel->count; row++)
        for (int64_t i = 0; i < a->group; i++) {
            const int64_t head = panel->kv_head * a->group + i;
            const float *state = states + (row * a->group + i) * size;
            floats factor = all(1.0f / sum_of(load(state + TOTALS)));
            if (a->sinks) {
                const float sink = a->sinks[head], now = sink > state[0] ? sink : state[0];
                const floats change = exponential(all(state[0] - now));
                const floats total = multiply(all(sum_of(load(state + TOTALS))), change);
                factor = divide(change, add(total, exponential(all(sink - now))));
            }
            float *out = a->out + ((panel->row + row) * heads + head) * a->value_dim;
            int64_t d = 0;
            for (; d + LANES <= a->value_dim; d += LANES)
                store(out + d, multiply(load(state + SUMS + d), factor));
            if (d < a->value_dim)
                store_some(out + d, multiply(load(state + SUMS + d), factor), a->value_dim - d);
        }
}

/* All parts that the panel's rows see, one after another. */
static void attend(const struct attention_record *a, const struct panel *panel, const struct memory *m)
{
    const int64_t size = sizes_of(a).state, last = (panel->position + panel->count - 1) / PART;
    int64_t part = first_key(a, panel->position) / PART;
    pack_queries(a, panel, m->queries);
    attend_to_part(a, panel, m, part, m->states);
    for (part++; part <= last; part++) {
        attend_to_part(a, panel, m, part, m->part_states);
        for (int64_t row = 0; row < panel->count; row++) {
            const int64_t position = panel->position + row, first_part = first_key(a, position) / PART;
            if (part < first_part || position < part * PART)
                continue;
            for (int64_t i = row * a->group; i < (row + 1) * a->group; i++)
                if (part == first_part)
                    __builtin_memcpy(m->states + i * size, m->part_states + i * size, size * sizeof(float));
                else
                    merge(m->states + i * size, m->part_states + i * size, size);
        }
    }
    finish(a, panel, m->states);
}

/* Who computes what. */

/* Goes through the panels of all spans, from the last to the first: a prompt's last rows see most keys. */
struct walk {
    int64_t span, begin, end, number; /* rows from begin to end of the span are left; number of the next panel */
};

static int next_panel(const struct attention_record *a, struct walk *walk, struct panel *panel)
{
    while (walk->begin == walk->end) {
        if (!walk->span)
            return 0;
        walk->span--;
        walk->begin = a->spans[2 * walk->span];
        walk->end = a->spans[2 * walk->span + 1];
    }
    int64_t row = walk->end - 1;
    while (
        row > walk->begin && walk->end - row < a->panel && a->slots[row - 1] == a->slots[row]
        && a->positions[row - 1] + 1 == a->positions[row])
        row--;
    panel->row = row;
    panel->count = walk->end - row;
    panel->position = a->positions[row];
    walk->end = row;
    walk->number++;
    return 1;
}

static int find_panel(const struct attention_record *a, struct walk *walk, struct panel *panel, int64_t task)
{
    while (walk->number <= task / a->kv_heads)
        if (!next_panel(a, walk, panel))
            return 0;
    const int64_t slot = a->slots[panel->row], head = task % a->kv_heads;
    panel->kv_head = head;
    panel->keys = a->keys + number_size(a) * (slot * a->key_slot + head * a->key_head);
    panel->values = a->values + number_size(a) * (slot * a->value_slot + head * a->value_head);
    return 1;
}

static inline int64_t next_task(const struct attention_record *a)
{
    return __atomic_fetch_add((int64_t *)(void *)a->scratch, 1, __ATOMIC_RELAXED);
}

/* Parts of long sequences by several threads, then merged in order. */
static void attend_by_parts(const struct attention_record *a, const struct team *team, const struct memory *m)
{
    const int64_t size = sizes_of(a).state * a->group;
    struct panel panel;
    struct walk walk = {.span = a->num_spans};
    int64_t parts = 0;
    while (next_panel(a, &walk, &panel))
        parts = most(parts, panel.position / PART + 1);
    walk = (struct walk){.span = a->num_spans};
    for (int64_t task = next_task(a); parts && find_panel(a, &walk, &panel, task / parts); task = next_task(a)) {
        const int64_t part = task % parts;
        if (part < first_key(a, panel.position) / PART || part > panel.position / PART)
            continue;
        pack_queries(a, &panel, m->queries);
        attend_to_part(a, &panel, m, part, a->partials + (task / parts * a->num_parts + part) * size);
    }
    barrier(team);
    walk = (struct walk){.span = a->num_spans};
    for (int64_t task = team->thread; find_panel(a, &walk, &panel, task); task += team->size) {
        const int64_t first = first_key(a, panel.position) / PART;
        float *states = a->partials + (task * a->num_parts + first) * size;
        for (int64_t part = first + 1; part <= panel.position / PART; part++)
            for (int64_t i = 0; i < a->group; i++) {
                const int64_t state = i * sizes_of(a).state;
                merge(states + state, states + (part - first) * size + state, sizes_of(a).state);
            }
        finish(a, &panel, states);
    }
}

void TIERED(attention)(const void *record, const struct team *team)
{
    const struct attention_record *a = record;
    const struct memory m = memory_of(a, team->thread);
    if (team->thread == 0)
        __atomic_store_n((int64_t *)(void *)a->scratch, 0, __ATOMIC_RELAXED);
    write_rows(a, team);
    barrier(team);
    if (a->partials) {
        attend_by_parts(a, team, &m);
        return;
    }
    struct panel panel;
    struct walk walk = {.span = a->num_spans};
    for (int64_t task = next_task(a); find_panel(a, &walk, &panel, task); task = next_task(a))
        attend(a, &panel, &m);
}

#include "tier_end.h"
