/* What a decoding step spends its time on beside matrix products, in float32: paged attention, norms, gated activations,
 * rotary embedding, the most probable token. Compiled at the first start by `kernels.py`, called through ctypes.
 *
 * A row's result never depends on which other rows are in the call: every sum runs in an order fixed by the row alone.
 * Vectors are GCC's, 16 floats wide; the compiler splits them where registers are narrower.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#define WIDTH 16
#define BLOCK 16      /* tokens in a KV block; kv_cache.BLOCK_TOKENS */
#define MOST_ROWS 8   /* queries that share one pass over keys; attention.TILE_ROWS */
#define SPAN 256      /* positions whose scores are held at once */
#define MOST_DIM 512  /* head dimension, padded to WIDTH */

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec value) { *(vec *)at = value; }
INLINE vec all(float value) { return value - (vec){}; }

INLINE float sum_of(vec value) {
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += value[i];
    return total;
}

/* e to the power of each element, by Cephes' polynomial: within 2 units in the last place; 0 below -87. */
INLINE vec exponential(vec x) {
    ivec low = x < all(-87.0f);
    x = (vec)(((ivec)x & ~low) | ((ivec)all(-87.0f) & low));
    ivec high = x > all(88.0f);
    x = (vec)(((ivec)x & ~high) | ((ivec)all(88.0f) & high));
    vec shifted = x * all(1.44269504088896341f) + all(12582912.0f);
    vec whole = shifted - all(12582912.0f);
    vec rest = x - whole * all(0.693359375f) + whole * all(2.12194440e-4f);
    vec sum = all(1.9875691500e-4f);
    sum = sum * rest + all(1.3981999507e-3f);
    sum = sum * rest + all(8.3334519073e-3f);
    sum = sum * rest + all(4.1665795894e-2f);
    sum = sum * rest + all(1.6666665459e-1f);
    sum = sum * rest + all(5.0000001201e-1f);
    sum = sum * rest * rest + rest + all(1.0f);
    ivec exponent = (((ivec)shifted - 0x4B400000) + 127) << 23;
    vec result = sum * (vec)exponent;
    return (vec)((ivec)result & ~low);
}

/* One forward pass, the same for all of its layers. An item is {first token, tokens, KV head, first query head, query
 * heads}: at most MOST_ROWS queries of one sequence that read the same keys. */
struct step {
    int64_t tokens, items, kv_heads, dim, padded_dim, table_stride;
    const int32_t *item;      /* [items, 5] */
    const int32_t *row;       /* [tokens]: the sequence's row in the table */
    const int32_t *position;  /* [tokens]: where the token's KV is written; it sees all up to there */
    const int32_t *table;     /* [rows, table_stride]: block numbers */
};

/* KV is read once a step, from memory, in pieces that no hardware prefetcher follows: ask for what comes AHEAD blocks
 * later while a block is used. */
#define AHEAD 3
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
#define FETCH(address) __builtin_prefetch((address), 0, 3)

/* Scores of ROWS queries against keys [dim, BLOCK] of `BLOCKS` blocks at a time. */
#define SCORE_BLOCKS(BLOCKS)                                                                              \
    for (; at + BLOCKS <= blocks; at += BLOCKS) {                                                         \
        vec sum[ROWS][BLOCKS];                                                                            \
        const float *keys[BLOCKS], *later[BLOCKS];                                                        \
        for (int b = 0; b < BLOCKS; b++) {                                                                \
            int64_t here = first_block + at + b, next = here + AHEAD;                                     \
            keys[b] = key_cache + (int64_t)table[here] * block_size + head_offset;                        \
            later[b] = next < last_block                                                                  \
                ? key_cache + (int64_t)table[next] * block_size + head_offset                             \
                : value_cache + (int64_t)table[least(first_block + next, 2 * last_block - 1) - last_block] * block_size  \
                      + head_offset;                                                                      \
            for (int r = 0; r < ROWS; r++) sum[r][b] = all(0.0f);                                         \
        }                                                                                                 \
        for (int64_t d = 0; d < dim; d++)                                                                 \
            for (int b = 0; b < BLOCKS; b++) {                                                            \
                FETCH(later[b] + d * BLOCK);                                                              \
                vec key = load(keys[b] + d * BLOCK);                                                      \
                for (int r = 0; r < ROWS; r++) sum[r][b] += all(query[r][d]) * key;                       \
            }                                                                                             \
        for (int r = 0; r < ROWS; r++)                                                                    \
            for (int b = 0; b < BLOCKS; b++) store(score[r] + (at + b) * BLOCK, sum[r][b]);               \
    }

/* `ROWS` queries over positions `begin` to `end` of one sequence, the softmax kept running from span to span. */
#define DEFINE_ATTEND(ROWS_)                                                                                           \
    static void attend_##ROWS_(                                                                                        \
        const float (*query)[MOST_DIM], const int64_t *last, int64_t begin, int64_t end, const int32_t *table,         \
        const float *key_cache, const float *value_cache, int64_t block_size, int64_t head_offset, int64_t dim,        \
        int64_t padded, float scale, float softcap, int64_t window, const float **next_keys, float (*result)[MOST_DIM]) {                    \
        enum { ROWS = ROWS_ };                                                                                         \
        float score[ROWS][SPAN];                                                                                       \
        float highest[ROWS], total[ROWS];                                                                              \
        for (int r = 0; r < ROWS; r++) {                                                                               \
            highest[r] = -INFINITY;                                                                                    \
            total[r] = 0;                                                                                              \
            memset(result[r], 0, padded * sizeof(float));                                                              \
        }                                                                                                              \
        for (int64_t from = begin / SPAN * SPAN; from < end; from += SPAN) {                                           \
            int64_t first_block = from / BLOCK, left = (end - from + BLOCK - 1) / BLOCK;                               \
            int64_t blocks = left < SPAN / BLOCK ? left : SPAN / BLOCK, at = 0, last_block = first_block + blocks;                                        \
            if (ROWS <= 2) SCORE_BLOCKS(4)                                                                             \
            if (ROWS <= 6) SCORE_BLOCKS(2)                                                                             \
            SCORE_BLOCKS(1)                                                                                            \
            for (int r = 0; r < ROWS; r++) {                                                                           \
                int64_t oldest = window > 0 ? last[r] + 1 - window : 0;                                                \
                for (int64_t b = 0; b < blocks; b++) {                                                                 \
                    float *s = score[r] + b * BLOCK;                                                                   \
                    vec value = load(s) * all(scale);                                                                  \
                    if (softcap > 0) {                                                                                 \
                        vec twice = exponential(value * all(2.0f / softcap));                                          \
                        value = (all(1.0f) - all(2.0f) / (twice + all(1.0f))) * all(softcap);                          \
                    }                                                                                                  \
                    store(s, value);                                                                                   \
                    int64_t begins = from + b * BLOCK;                                                                 \
                    if (begins + BLOCK - 1 > last[r] || begins < oldest)                                               \
                        for (int64_t i = 0; i < BLOCK; i++)                                                            \
                            if (begins + i > last[r] || begins + i < oldest) s[i] = -INFINITY;                         \
                }                                                                                                      \
                vec most = all(-INFINITY);                                                                             \
                for (int64_t b = 0; b < blocks; b++) {                                                                 \
                    vec value = load(score[r] + b * BLOCK);                                                            \
                    ivec more = value > most;                                                                          \
                    most = (vec)(((ivec)value & more) | ((ivec)most & ~more));                                         \
                }                                                                                                      \
                float peak = highest[r];                                                                               \
                for (int i = 0; i < WIDTH; i++) peak = most[i] > peak ? most[i] : peak;                                \
                float base = peak == -INFINITY ? 0.0f : peak; /* nothing of this span is seen: every weight is 0 */      \
                float fade = highest[r] == -INFINITY ? 0.0f : expf(highest[r] - base);                                 \
                highest[r] = peak;                                                                                     \
                vec weight_sum = all(0.0f);                                                                            \
                for (int64_t b = 0; b < blocks; b++) {                                                                 \
                    vec weight = exponential(load(score[r] + b * BLOCK) - all(base));                                  \
                    store(score[r] + b * BLOCK, weight);                                                               \
                    weight_sum += weight;                                                                              \
                }                                                                                                      \
                total[r] = total[r] * fade + sum_of(weight_sum);                                                       \
                if (fade != 1.0f)                                                                                      \
                    for (int64_t d = 0; d < padded; d += WIDTH) store(result[r] + d, load(result[r] + d) * all(fade)); \
            }                                                                                                          \
            int64_t d = 0;                                                                                             \
            if (ROWS <= 6) MIX_VALUES(4)                                                                               \
            MIX_VALUES(2)                                                                                              \
            MIX_VALUES(1)                                                                                              \
        }                                                                                                              \
        for (int r = 0; r < ROWS; r++)                                                                                 \
            for (int64_t d = 0; d < padded; d += WIDTH) store(result[r] + d, load(result[r] + d) / all(total[r]));     \
    }

/* result += weights times values, PARTS vectors of the head dimension at a time. Positions beyond `end` have weight 0
 * and are not read, because what a freed block holds may not be finite. */
#define MIX_VALUES(PARTS)                                                                              \
    for (; d + PARTS * WIDTH <= padded; d += PARTS * WIDTH) {                                          \
        vec sum[ROWS][PARTS];                                                                          \
        for (int r = 0; r < ROWS; r++)                                                                 \
            for (int p = 0; p < PARTS; p++) sum[r][p] = load(result[r] + d + p * WIDTH);               \
        for (int64_t b = 0; b < blocks; b++) {                                                         \
            const float *values =                                                                      \
                value_cache + (int64_t)table[first_block + b] * block_size + head_offset + d;          \
            int64_t held = end - from - b * BLOCK;                                                     \
            const float *later = b + AHEAD < blocks                                                    \
                ? value_cache + (int64_t)table[first_block + b + AHEAD] * block_size + head_offset + d \
                : next_keys[b + AHEAD - blocks] + d;                                                   \
            if (held > BLOCK) held = BLOCK;                                                            \
            for (int64_t i = 0; i < held; i++) {                                                       \
                for (int p = 0; p < PARTS; p++) FETCH(later + i * padded + p * WIDTH);                 \
                vec value[PARTS];                                                                      \
                for (int p = 0; p < PARTS; p++) value[p] = load(values + i * padded + p * WIDTH);      \
                for (int r = 0; r < ROWS; r++) {                                                       \
                    vec weight = all(score[r][b * BLOCK + i]);                                         \
                    for (int p = 0; p < PARTS; p++) sum[r][p] += weight * value[p];                    \
                }                                                                                      \
            }                                                                                          \
        }                                                                                              \
        for (int r = 0; r < ROWS; r++)                                                                 \
            for (int p = 0; p < PARTS; p++) store(result[r] + d + p * WIDTH, sum[r][p]);               \
    }

DEFINE_ATTEND(1)
DEFINE_ATTEND(2)
DEFINE_ATTEND(3)
DEFINE_ATTEND(4)
DEFINE_ATTEND(5)
DEFINE_ATTEND(6)
DEFINE_ATTEND(7)
DEFINE_ATTEND(8)

/* Write the tokens' keys and values into their blocks, then let every query attend.
 * query, key, value: [heads, tokens, dim] with the given strides of token and head; out: [tokens, heads, dim].
 * key_cache: [blocks, KV heads, padded_dim, BLOCK]; value_cache: [blocks, KV heads, BLOCK, padded_dim]. */
void softcue_attend(
    const struct step *step, const float *query, int64_t query_token, int64_t query_head, const float *key,
    int64_t key_token, int64_t key_head, const float *value, int64_t value_token, int64_t value_head, float *out,
    int64_t heads, float *key_cache, float *value_cache, float scale, float softcap, int64_t window) {
    int64_t dim = step->dim, padded = step->padded_dim, kv_heads = step->kv_heads;
    int64_t head_size = padded * BLOCK, block_size = kv_heads * head_size;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < step->tokens; token++) {
            int64_t position = step->position[token], offset = position % BLOCK;
            const int32_t *table = step->table + step->row[token] * step->table_stride;
            int64_t block = (int64_t)table[position / BLOCK] * block_size;
            for (int64_t head = 0; head < kv_heads; head++) {
                const float *from = key + token * key_token + head * key_head;
                float *to = key_cache + block + head * head_size + offset;
                for (int64_t d = 0; d < dim; d++) to[d * BLOCK] = from[d];
                from = value + token * value_token + head * value_head;
                memcpy(value_cache + block + head * head_size + offset * padded, from, dim * sizeof(float));
            }
        }
#pragma omp for schedule(dynamic, 2)
        for (int64_t index = 0; index < step->items; index++) {
            const int32_t *item = step->item + index * 5;
            int64_t first = item[0], tokens = item[1], kv_head = item[2], first_head = item[3], group = item[4];
            int64_t rows = tokens * group, begin = INT64_MAX, end = 0, last[MOST_ROWS];
            float queries[MOST_ROWS][MOST_DIM], results[MOST_ROWS][MOST_DIM];
            for (int64_t r = 0; r < rows; r++) {
                int64_t token = first + r / group, head = first_head + r % group;
                last[r] = step->position[token];
                int64_t oldest = window > 0 && last[r] + 1 > window ? last[r] + 1 - window : 0;
                if (oldest < begin) begin = oldest;
                if (last[r] + 1 > end) end = last[r] + 1;
                memcpy(queries[r], query + token * query_token + head * query_head, dim * sizeof(float));
            }
            const int32_t *table = step->table + step->row[first] * step->table_stride;
            const float *next_keys[AHEAD];
            const int32_t *next = index + 1 < step->items ? item + 5 : item;
            const int32_t *next_table = step->table + step->row[next[0]] * step->table_stride;
            for (int64_t ahead = 0; ahead < AHEAD; ahead++) {
                int64_t block = least(ahead, step->position[next[0]] / BLOCK);
                next_keys[ahead] = key_cache + next_table[block] * block_size + next[2] * head_size;
            }
#define CASE(ROWS)                                                                                                    \
    case ROWS:                                                                                                        \
        attend_##ROWS((const float(*)[MOST_DIM])queries, last, begin, end, table, key_cache, value_cache, block_size, \
                      kv_head * head_size, dim, padded, scale, softcap, window, next_keys, results);                             \
        break;
            switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
            for (int64_t r = 0; r < rows; r++) {
                int64_t token = first + r / group, head = first_head + r % group;
                memcpy(out + (token * heads + head) * dim, results[r], dim * sizeof(float));
            }
        }
    }
}

/* Root-mean-square norm of rows [rows, size]: x / sqrt(mean(x^2) + epsilon) * weight. */
void softcue_rms_norm(const float *x, const float *weight, float epsilon, float *out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * size;
        float *to = out + row * size;
        vec squares[4] = {{0}, {0}, {0}, {0}};
        int64_t i = 0;
        for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
            for (int p = 0; p < 4; p++) {
                vec value = load(from + i + p * WIDTH);
                squares[p] += value * value;
            }
        float total = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
        for (; i < size; i++) total += from[i] * from[i];
        float factor = 1.0f / sqrtf(total / (float)size + epsilon);
        for (i = 0; i + WIDTH <= size; i += WIDTH) store(to + i, load(from + i) * all(factor) * load(weight + i));
        for (; i < size; i++) to[i] = from[i] * factor * weight[i];
    }
}

/* silu(gate) * up, both [rows, size] with their own row strides; out [rows, size]. */
void softcue_silu_multiply(
    const float *gate, int64_t gate_row, const float *up, int64_t up_row, float *out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > 8192)
    for (int64_t row = 0; row < rows; row++) {
        const float *g = gate + row * gate_row, *u = up + row * up_row;
        float *to = out + row * size;
        int64_t i = 0;
        for (; i + WIDTH <= size; i += WIDTH) {
            vec x = load(g + i);
            store(to + i, x / (all(1.0f) + exponential(-x)) * load(u + i));
        }
        for (; i < size; i++) to[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
    }
}

/* x * cos + rotate_half(x) * sin for [heads, tokens, dim] with strides; cos and sin [tokens, dim]; out [tokens, heads, dim]. */
void softcue_rotate(
    const float *x, int64_t x_token, int64_t x_head, const float *cos, const float *sin, float *out, int64_t tokens,
    int64_t heads, int64_t dim) {
    int64_t half = dim / 2;
#pragma omp parallel for schedule(static) if (tokens > 8)
    for (int64_t token = 0; token < tokens; token++) {
        const float *c = cos + token * dim, *s = sin + token * dim;
        for (int64_t head = 0; head < heads; head++) {
            const float *from = x + token * x_token + head * x_head;
            float *to = out + (token * heads + head) * dim;
            for (int64_t d = 0; d < half; d++) {
                to[d] = from[d] * c[d] - from[d + half] * s[d];
                to[d + half] = from[d + half] * c[d + half] + from[d] * s[d + half];
            }
        }
    }
}

/* The place of the highest value of each row of [rows, size], the first of equals; -1 where a value is not finite. */
void softcue_highest(const float *values, int64_t row_stride, int64_t rows, int64_t size, int64_t *place) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = values + row * row_stride;
        vec most = all(-INFINITY), zero = all(0.0f);
        int64_t i = 0;
        for (; i + WIDTH <= size; i += WIDTH) {
            vec value = load(from + i);
            ivec more = value > most;
            most = (vec)(((ivec)value & more) | ((ivec)most & ~more));
            zero += value * all(0.0f); /* stays 0 unless a value is infinite or NaN */
        }
        float peak = -INFINITY, check = sum_of(zero);
        for (int p = 0; p < WIDTH; p++) peak = most[p] > peak ? most[p] : peak;
        for (; i < size; i++) {
            peak = from[i] > peak ? from[i] : peak;
            check += from[i] * 0.0f;
        }
        if (check != 0.0f || check != check) {
            place[row] = -1;
            continue;
        }
        for (i = 0; i + WIDTH <= size; i += WIDTH) {
            ivec equal = load(from + i) == all(peak);
            int32_t any = 0;
            for (int p = 0; p < WIDTH; p++) any |= equal[p];
            if (any) break;
        }
        while (i < size && from[i] != peak) i++;
        place[row] = i;
    }
}

/* Linear layers. Weights lie in panels of PANEL outputs: [outputs / PANEL, inputs, PANEL], the last one padded with
 * zeros. Each output is one sum over the inputs in their order, whatever the number of rows, so a row's result is the
 * same to the bit in every batch. While a panel is used, the next one is fetched. */
#define PANEL 32
#define MOST_TILE 12 /* rows whose sums fit the registers */

#define DEFINE_LINEAR(ROWS)                                                                                         \
    static void linear_##ROWS(const float *x, int64_t x_row, const float *panel, int64_t inputs, const float *next, \
                              int64_t fetches, float *sums) {                                                       \
        vec low[ROWS], high[ROWS];                                                                                  \
        for (int r = 0; r < ROWS; r++) low[r] = high[r] = all(0.0f);                                                \
        for (int64_t i = 0; i < inputs; i++) {                                                                      \
            if (i < fetches) FETCH(next + i * WIDTH);                                                               \
            vec first = load(panel + i * PANEL), second = load(panel + i * PANEL + WIDTH);                          \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) {                                               \
                vec value = all(x[r * x_row + i]);                                                                  \
                low[r] += value * first;                                                                            \
                high[r] += value * second;                                                                          \
            }                                                                                                       \
        }                                                                                                           \
        for (int r = 0; r < ROWS; r++) {                                                                            \
            store(sums + r * PANEL, low[r]);                                                                        \
            store(sums + r * PANEL + WIDTH, high[r]);                                                               \
        }                                                                                                           \
    }
DEFINE_LINEAR(1)
DEFINE_LINEAR(2)
DEFINE_LINEAR(3)
DEFINE_LINEAR(4)
DEFINE_LINEAR(5)
DEFINE_LINEAR(6)
DEFINE_LINEAR(7)
DEFINE_LINEAR(8)
DEFINE_LINEAR(9)
DEFINE_LINEAR(10)
DEFINE_LINEAR(11)
DEFINE_LINEAR(12)

typedef void linear_tile(const float *, int64_t, const float *, int64_t, const float *, int64_t, float *);
static linear_tile *const LINEAR[] = {0,        linear_1, linear_2, linear_3, linear_4,  linear_5, linear_6,
                                      linear_7, linear_8, linear_9, linear_10, linear_11, linear_12};

/* out = x W^T + bias + added, for x [rows, inputs] and out [rows, outputs]; bias and added may be null. */
void softcue_linear(const float *x, const float *panels, const float *bias, const float *added, float *out,
                    int64_t rows, int64_t inputs, int64_t outputs) {
    int64_t count = (outputs + PANEL - 1) / PANEL, tiles = (rows + MOST_TILE - 1) / MOST_TILE;
#pragma omp parallel for schedule(static)
    for (int64_t index = 0; index < count; index++) {
        const float *panel = panels + index * inputs * PANEL;
        const float *next = index + 1 < count ? panel + inputs * PANEL : panel;
        int64_t lines = inputs * PANEL / WIDTH, column = index * PANEL;
        int64_t width = least(PANEL, outputs - column), row = 0;
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t tall = (rows - row + tiles - tile - 1) / (tiles - tile);
            int64_t begin = lines * tile / tiles, end = lines * (tile + 1) / tiles;
            float sums[MOST_TILE * PANEL];
            LINEAR[tall](x + row * inputs, inputs, panel, inputs, next + begin * WIDTH, end - begin, sums);
            for (int64_t r = 0; r < tall; r++) {
                float *to = out + (row + r) * outputs + column;
                const float *more = added ? added + (row + r) * outputs + column : 0;
                for (int64_t c = 0; c < width; c++) {
                    float value = sums[r * PANEL + c];
                    if (bias) value += bias[column + c];
                    to[c] = more ? value + more[c] : value;
                }
            }
            row += tall;
        }
    }
}

/* Linear layers with weights of 8 bits: a scale for each output, and for each row of x one that is found on the way. x
 * becomes bytes around 128, which `offsets` (128 times the sum of an output's weights) takes back. Panels are
 * [outputs / PANEL, inputs / 4, PANEL, 4], inputs padded with zeros to a multiple of 4. Sums are whole numbers, so their
 * order does not matter. */
#ifdef __AVX512VNNI__
#define ADD_PRODUCTS(sum, bytes, weights) _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(bytes), _mm512_loadu_si512(weights))
typedef __m512i wholes;
#else
typedef ivec wholes;
INLINE wholes ADD_PRODUCTS(wholes sum, int32_t bytes, const int8_t *weights) {
    for (int o = 0; o < WIDTH; o++)
        for (int i = 0; i < 4; i++) sum[o] += (int32_t)((uint32_t)bytes >> (8 * i) & 255) * weights[o * 4 + i];
    return sum;
}
#endif

#define DEFINE_LINEAR_INT8(ROWS)                                                                                    \
    static void linear_int8_##ROWS(const uint8_t *x, const int8_t *panel, int64_t inputs, const int8_t *next,       \
                                   int64_t fetches, int32_t *sums) {                                                \
        wholes low[ROWS], high[ROWS];                                                                               \
        for (int r = 0; r < ROWS; r++) low[r] = high[r] = (wholes){};                                               \
        for (int64_t i = 0; i < inputs / 4; i++) {                                                                  \
            if (i < fetches) FETCH(next + i * 64);                                                                  \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) {                                               \
                int32_t bytes = *(const int32_t *)(x + r * inputs + i * 4);                                         \
                low[r] = ADD_PRODUCTS(low[r], bytes, panel + i * PANEL * 4);                                        \
                high[r] = ADD_PRODUCTS(high[r], bytes, panel + i * PANEL * 4 + 64);                                 \
            }                                                                                                       \
        }                                                                                                           \
        for (int r = 0; r < ROWS; r++) {                                                                            \
            memcpy(sums + r * PANEL, &low[r], 64);                                                                  \
            memcpy(sums + r * PANEL + WIDTH, &high[r], 64);                                                         \
        }                                                                                                           \
    }
DEFINE_LINEAR_INT8(1)
DEFINE_LINEAR_INT8(2)
DEFINE_LINEAR_INT8(3)
DEFINE_LINEAR_INT8(4)
DEFINE_LINEAR_INT8(5)
DEFINE_LINEAR_INT8(6)
DEFINE_LINEAR_INT8(7)
DEFINE_LINEAR_INT8(8)
DEFINE_LINEAR_INT8(9)
DEFINE_LINEAR_INT8(10)
DEFINE_LINEAR_INT8(11)
DEFINE_LINEAR_INT8(12)

typedef void linear_int8_tile(const uint8_t *, const int8_t *, int64_t, const int8_t *, int64_t, int32_t *);
static linear_int8_tile *const LINEAR_INT8[] = {
    0,             linear_int8_1, linear_int8_2, linear_int8_3,  linear_int8_4,  linear_int8_5, linear_int8_6,
    linear_int8_7, linear_int8_8, linear_int8_9, linear_int8_10, linear_int8_11, linear_int8_12};

/* As softcue_linear, x [rows, inputs]; `padded` inputs lie in the panels; bytes [rows, padded] and row_scales [rows] are
 * room to work in. */
void softcue_linear_int8(const float *x, const int8_t *panels, const float *scales, const float *offsets,
                         const float *bias, const float *added, float *out, int64_t rows, int64_t inputs,
                         int64_t padded, int64_t outputs, uint8_t *bytes, float *row_scales) {
    int64_t count = (outputs + PANEL - 1) / PANEL, tiles = (rows + MOST_TILE - 1) / MOST_TILE;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float *from = x + row * inputs;
            uint8_t *to = bytes + row * padded;
            float most = 1e-30f;
            for (int64_t i = 0; i < inputs; i++) {
                float size = fabsf(from[i]);
                most = size > most ? size : most;
            }
            float factor = 127.0f / most;
            row_scales[row] = most / 127.0f;
            for (int64_t i = 0; i < inputs; i++) to[i] = (uint8_t)(int32_t)(from[i] * factor + 128.5f);
            for (int64_t i = inputs; i < padded; i++) to[i] = 128;
        }
#pragma omp for schedule(static)
        for (int64_t index = 0; index < count; index++) {
            const int8_t *panel = panels + index * padded * PANEL;
            const int8_t *next = index + 1 < count ? panel + padded * PANEL : panel;
            int64_t lines = padded * PANEL / 64, column = index * PANEL, width = least(PANEL, outputs - column), row = 0;
            for (int64_t tile = 0; tile < tiles; tile++) {
                int64_t tall = (rows - row + tiles - tile - 1) / (tiles - tile);
                int64_t begin = lines * tile / tiles, end = lines * (tile + 1) / tiles;
                int32_t sums[MOST_TILE * PANEL];
                LINEAR_INT8[tall](bytes + row * padded, panel, padded, next + begin * 64, end - begin, sums);
                for (int64_t r = 0; r < tall; r++) {
                    float *to = out + (row + r) * outputs + column, scale = row_scales[row + r];
                    const float *more = added ? added + (row + r) * outputs + column : 0;
                    for (int64_t c = 0; c < width; c++) {
                        float value = ((float)sums[r * PANEL + c] - offsets[column + c]) * (scale * scales[column + c]);
                        if (bias) value += bias[column + c];
                        to[c] = more ? value + more[c] : value;
                    }
                }
                row += tall;
            }
        }
    }
}

/* Whether the processor has registers enough for a tile of rows: elsewhere oneDNN's products are quicker. */
int64_t softcue_has_wide_registers(void) {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}
