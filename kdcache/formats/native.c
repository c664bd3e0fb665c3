/* Copies of many small pieces, wider than they are stored, and their order: what `native.py` calls.
 *
 * Every piece lies somewhere in hundreds of megabytes of mapped files, so it is the wait for memory
 * that counts: pieces that come next are asked for before they are needed. Python's lock is free
 * meanwhile, so who plans is in nobody's way.
 *
 * M samples of a window, R those asked for, S files, C columns, F fields
 */

#include <stdint.h>
#include <string.h>

#define AHEAD 32 /* samples */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
/* Compiled twice; which one runs is decided when the library is loaded. */
#define WIDE_REGISTERS __attribute__((flatten, target_clones("avx2", "default")))
#else
#define WIDE_REGISTERS
#endif

#define ALIGNED 64 /* where fields begin */

/* One field, or one of two bytes that is put between others (`step` > 1). */
typedef struct {
    const int64_t *low;  /* [S] where its values begin in each file */
    const int64_t *high; /* [S] those of bytes to put above them, shifted by 16; 0: none */
    int64_t column;
    int64_t stored; /* bytes of a stored value */
    int64_t wide;   /* bytes of a delivered value */
    int64_t step;   /* values from one to the next where they are delivered */
    int64_t among;  /* how many of those that it is put between come before it */
} Field;

/* Where samples lie, and where their copies do. Returns 0, or 1 where there is no such sample.
 *
 * starts: [S + 1] first sample of each file. offsets: [samples + S, C]. rows: [R] samples.
 * file: [R], begins: [C, R], ends: [C, R + 1] to fill; ends counts records from the first row on.
 * firsts: [F + 1] to fill, bytes from the first field on, of the end too.
 */
int kdcache_find(const int64_t *starts, int64_t num_files, const int32_t *offsets,
                 int64_t num_columns, const int64_t *rows, int64_t num_rows, const Field *fields,
                 int64_t num_fields, int32_t *file, int64_t *begins, int64_t *ends,
                 int64_t *firsts)
{
    const int64_t *totals = ends + num_rows;
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t first = 0, left = num_files, row = rows[r];
        if (row < 0 || row >= starts[num_files])
            return 1;
        while (left > 1) {
            int64_t half = left / 2;
            first = starts[first + half] <= row ? first + half : first;
            left -= half;
        }
        file[r] = (int32_t)first;
    }
    for (int64_t c = 0; c < num_columns; c++)
        ends[c * (num_rows + 1)] = 0;
    for (int64_t r = 0; r < num_rows; r++) {
        if (r + AHEAD < num_rows)
            __builtin_prefetch(offsets + (rows[r + AHEAD] + file[r + AHEAD]) * num_columns);
        const int32_t *place = offsets + (rows[r] + file[r]) * num_columns;
        for (int64_t c = 0; c < num_columns; c++) {
            int64_t *end = ends + c * (num_rows + 1) + r;
            begins[c * num_rows + r] = place[c];
            end[1] = end[0] + place[num_columns + c] - place[c];
        }
    }
    firsts[0] = 0;
    for (int64_t f = 0; f < num_fields; f++) {
        const Field *field = fields + f;
        int64_t size = totals[field->column * (num_rows + 1)] * field->wide * field->step;
        if (field->among > 0) { /* the first of them has taken the room of all */
            firsts[f + 1] = firsts[f];
            firsts[f] = firsts[f - field->among] + field->among * field->wide;
        } else {
            firsts[f + 1] = firsts[f] + (size + ALIGNED - 1) / ALIGNED * ALIGNED;
        }
    }
    return 0;
}

/* `count` values in steps of `some`, the last of them over those before, so that there is no rest. */
#define EACH_VALUE(count, some, copy)                                                             \
    if ((count) >= (some)) {                                                                      \
        for (int64_t i = 0; i + (some) <= (count); i += (some))                                   \
            for (int64_t k = i; k < i + (some); k++)                                              \
                copy;                                                                             \
        for (int64_t k = (count) - (some); k < (count); k++)                                      \
            copy;                                                                                 \
    } else {                                                                                      \
        for (int64_t k = 0; k < (count); k++)                                                     \
            copy;                                                                                 \
    }

static inline void copy_bytes(uint8_t *restrict to, const uint8_t *restrict from, int64_t size)
{
    EACH_VALUE(size, 16, to[k] = from[k])
}

#define PLACE(where, r) ((const void *)((where)[file[r]] + begins[r] * stored))

static inline void fetch(const uint8_t *piece, int64_t size) /* into the second cache */
{
    for (int64_t i = 0; i < size; i += 64)
        __builtin_prefetch(piece + i, 0, 2);
    __builtin_prefetch(piece + size - 1, 0, 2);
}

#define EACH_SAMPLE(copy)                                                                         \
    for (int64_t r = 0; r < num_rows; r++) {                                                      \
        int64_t next = r + ahead, n = ends[r + 1] - ends[r];                                      \
        if (next < num_rows)                                                                      \
            fetch(PLACE(field->low, next), (ends[next + 1] - ends[next]) * stored);               \
        uint8_t *place = to + ends[r] * field->step * field->wide;                                \
        copy                                                                                      \
    }

#define WIDEN(Stored, Wide)                                                                       \
    EACH_SAMPLE({                                                                                 \
        const Stored *restrict from = PLACE(field->low, r);                                       \
        Wide *restrict wide = (Wide *)place;                                                      \
        EACH_VALUE(n, 8, wide[k] = from[k])                                                       \
    })

#define JOIN(Wide)                                                                                \
    EACH_SAMPLE({                                                                                 \
        const uint16_t *restrict from = PLACE(field->low, r);                                     \
        const uint8_t *restrict above = (const uint8_t *)field->high[file[r]] + begins[r];        \
        Wide *restrict wide = (Wide *)place;                                                      \
        EACH_VALUE(n, 8, wide[k] = (Wide)from[k] | (Wide)above[k] << 16)                          \
    })

/* Four fields of two bytes side by side, the first in the lowest bytes. */
static void copy_four(const Field *field, uint8_t *to, int64_t num_rows, const int32_t *file,
                      const int64_t *begins, const int64_t *ends)
{
    const int64_t stored = 2, ahead = AHEAD / 2;
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t next = r + ahead, n = ends[r + 1] - ends[r];
        for (int k = 0; k < 4 && next < num_rows; k++)
            fetch(PLACE(field[k].low, next), (ends[next + 1] - ends[next]) * stored);
        const uint16_t *restrict a = PLACE(field[0].low, r), *restrict b = PLACE(field[1].low, r);
        const uint16_t *restrict c = PLACE(field[2].low, r), *restrict d = PLACE(field[3].low, r);
        uint64_t *restrict all = (uint64_t *)to + ends[r];
        EACH_VALUE(n, 8, {
            all[k] = (uint64_t)a[k] | (uint64_t)b[k] << 16 | (uint64_t)c[k] << 32
                     | (uint64_t)d[k] << 48;
        })
    }
}

static int copy_field(const Field *field, uint8_t *to, int64_t num_rows, const int32_t *file,
                      const int64_t *begins, const int64_t *ends)
{
    int64_t stored = field->stored;
    /* Long pieces are fetched a few ahead: what is not used soon is pushed out again. */
    int64_t ahead = 1 + 8192 / (1 + ends[num_rows] * stored / num_rows);
    ahead = ahead < AHEAD ? ahead : AHEAD;
    if (field->step > 1) {
        if (stored != 2 || field->wide != 2)
            return 1;
        EACH_SAMPLE({
            const uint16_t *restrict from = PLACE(field->low, r);
            uint16_t *restrict wide = (uint16_t *)place;
            for (int64_t i = 0; i < n; i++)
                wide[i * field->step] = from[i];
        })
        return 0;
    }
    if (stored == field->wide)
        EACH_SAMPLE(copy_bytes(place, PLACE(field->low, r), n * stored);)
    else if (field->high && field->wide == 4)
        JOIN(uint32_t)
    else if (field->high)
        JOIN(uint64_t)
    else if (stored == 1 && field->wide == 4)
        WIDEN(uint8_t, uint32_t)
    else if (stored == 1 && field->wide == 8)
        WIDEN(uint8_t, uint64_t)
    else if (stored == 2 && field->wide == 4)
        WIDEN(uint16_t, uint32_t)
    else if (stored == 2 && field->wide == 8)
        WIDEN(uint16_t, uint64_t)
    else if (stored == 4 && field->wide == 8)
        WIDEN(uint32_t, uint64_t)
    else
        return 1;
    return 0;
}

/* All fields of some samples, found before. Returns 0, or 1 for widths that it does not know. */
WIDE_REGISTERS
int kdcache_copy(const Field *fields, int64_t num_fields, int64_t num_rows, const int32_t *file,
                 const int64_t *begins, const int64_t *ends, const int64_t *firsts, uint8_t *to)
{
    for (int64_t f = 0; num_rows > 0 && f < num_fields; f++) {
        const Field *field = fields + f;
        const int64_t *from = begins + field->column * num_rows;
        const int64_t *till = ends + field->column * (num_rows + 1);
        if (field->step == 4) {
            copy_four(field, to + firsts[f], num_rows, file, from, till);
            f += 3;
        } else if (copy_field(field, to + firsts[f], num_rows, file, from, till)) {
            return 1;
        }
    }
    return 0;
}

/* Rows of a table. Returns 0, or 1 where there is no such row.
 *
 * table: [M, U]. rows: [R]. to: [R, U] to fill.
 */
int kdcache_rows(const int64_t *table, int64_t num_rows, int64_t width, const int64_t *rows,
                 int64_t num_taken, int64_t *to)
{
    for (int64_t r = 0; r < num_taken; r++, to += width) {
        if (rows[r] < 0 || rows[r] >= num_rows)
            return 1;
        if (r + AHEAD < num_taken)
            __builtin_prefetch(table + rows[r + AHEAD] * width);
        for (int64_t u = 0; u < width; u++)
            to[u] = table[rows[r] * width + u];
    }
    return 0;
}

/* Sums of rows of each batch. Returns 0, or 1 where there is no such row.
 *
 * table: [M, U]. rows: [R] of all batches. stops: [B + 1] rows before each. sums: [B, U] to fill.
 */
int kdcache_sums(const int32_t *table, int64_t num_rows, int64_t num_units, const int64_t *rows,
                 int64_t num_batches, const int64_t *stops, int64_t *sums)
{
    memset(sums, 0, (size_t)(num_batches * num_units) * sizeof *sums);
    for (int64_t b = 0; b < num_batches; b++, sums += num_units) {
        for (int64_t r = stops[b]; r < stops[b + 1]; r++) {
            if (rows[r] < 0 || rows[r] >= num_rows)
                return 1;
            if (r + AHEAD < stops[num_batches])
                __builtin_prefetch(table + rows[r + AHEAD] * num_units);
            for (int64_t u = 0; u < num_units; u++)
                sums[u] += table[rows[r] * num_units + u];
        }
    }
    return 0;
}

/* Positions of the longest sample of each batch, at least 1. Returns places in all matrices.
 *
 * ends: [R + 1] of the samples. stops: [B + 1] samples before each batch. widths: [B] to fill.
 */
int64_t kdcache_widths(const int64_t *ends, int64_t num_batches, const int64_t *stops,
                       int64_t *widths)
{
    int64_t area = 0;
    for (int64_t b = 0; b < num_batches; b++) {
        int64_t width = 1;
        for (int64_t r = stops[b]; r < stops[b + 1]; r++)
            width = ends[r + 1] - ends[r] > width ? ends[r + 1] - ends[r] : width;
        widths[b] = width;
        area += width * (stops[b + 1] - stops[b]);
    }
    return area;
}

#define PAD(Stored, value)                                                                        \
    for (int64_t b = 0; b < num_batches; b++) {                                                   \
        int64_t width = widths[b];                                                                \
        for (int64_t r = stops[b]; r < stops[b + 1]; r++, ids += width, mask += width) {          \
            int64_t next = r + AHEAD, n = ends[r + 1] - ends[r];                                  \
            if (next < num_rows)                                                                  \
                fetch(PLACE(field->low, next), (ends[next + 1] - ends[next]) * stored);           \
            const Stored *restrict from = PLACE(field->low, r);                                   \
            const uint8_t *restrict above =                                                       \
                field->high ? (const uint8_t *)field->high[file[r]] + begins[r] : 0;              \
            int64_t *restrict to = ids;                                                           \
            (void)above;                                                                          \
            EACH_VALUE(n, 8, to[k] = (int64_t)(value))                                            \
            for (int64_t i = n; i < width; i++)                                                   \
                to[i] = padding;                                                                  \
            for (int64_t i = 0; i < width; i++)                                                   \
                mask[i] = i < n;                                                                  \
        }                                                                                         \
    }

/* Ids as padded matrices, one of each batch, one after another. Returns 0, or 1 for a width that
 * it does not know.
 *
 * field: of the ids. file, begins, ends: from `kdcache_find`. stops, widths: see `kdcache_widths`.
 * ids, mask: to fill.
 */
WIDE_REGISTERS
int kdcache_pad(const Field *field, int64_t num_rows, const int32_t *file, const int64_t *begins,
                const int64_t *ends, int64_t num_batches, const int64_t *stops,
                const int64_t *widths, int64_t padding, int64_t *ids, uint8_t *mask)
{
    int64_t stored = field->stored;
    begins += field->column * num_rows;
    ends += field->column * (num_rows + 1);
    if (field->high)
        PAD(uint16_t, (uint32_t)from[k] | (uint32_t)above[k] << 16)
    else if (stored == 1)
        PAD(uint8_t, from[k])
    else if (stored == 2)
        PAD(uint16_t, from[k])
    else if (stored == 4)
        PAD(uint32_t, from[k])
    else if (stored == 8)
        PAD(int64_t, from[k])
    else
        return 1;
    return 0;
}

/* A keyed permutation of n numbers, see `keyed.permutation`.
 *
 * rounds: [6, 2 ** half] what each round adds to one half of a number, by its other half.
 * Numbers beyond n go round again, together: one after another each would wait for the last.
 */
void kdcache_permute(int64_t n, int64_t half, const uint32_t *rounds, int64_t *out)
{
    uint64_t size = (uint64_t)1 << half, number[512];
    int64_t place[512];
    const uint32_t *r1 = rounds, *r2 = r1 + size, *r3 = r2 + size, *r4 = r3 + size,
                   *r5 = r4 + size, *r6 = r5 + size;
    for (int64_t first = 0; first < n; first += 512) {
        int64_t left = n - first < 512 ? n - first : 512;
        for (int64_t i = 0; i < left; i++) {
            number[i] = (uint64_t)(first + i);
            place[i] = first + i;
        }
        while (left > 0) {
            int64_t outside = 0;
            for (int64_t i = 0; i < left; i++) {
                uint64_t high = number[i] >> half, low = number[i] & (size - 1);
                high ^= r1[low];
                low ^= r2[high];
                high ^= r3[low];
                low ^= r4[high];
                high ^= r5[low];
                low ^= r6[high];
                uint64_t here = high << half | low;
                int64_t to = place[i];
                out[to] = (int64_t)here;
                number[outside] = here;
                place[outside] = to;
                outside += here >= (uint64_t)n;
            }
            left = outside;
        }
    }
}

/* How many there are of each length, as where the first of them stands, the longest first. */
static void places_of(int64_t *counts, int64_t most)
{
    for (int64_t length = most, place = 0; length >= 0; length--) {
        int64_t number = counts[length];
        counts[length] = place;
        place += number;
    }
}

/* Batches of a window, see `order.window_batches`. Returns how many there are.
 *
 * order: [M] samples as they were permuted. lengths: [L] of [M] tokens of each, by stream.
 * most: of all lengths. pool, budget: tokens of a pool and of a batch.
 * counts: [2, most + 1] scratch, key, keys, other: [M] too.
 * samples, stops: [M] to fill: what stands in the batches, and where each of them ends.
 */
int64_t kdcache_fill(const int64_t *order, int64_t num_samples, const int64_t *const *lengths,
                     int64_t num_streams, int64_t most, int64_t pool, int64_t budget,
                     int64_t *counts, int64_t *key, int64_t *keys, int64_t *other,
                     int64_t *samples, int64_t *stops)
{
    int64_t batches = 0, tokens = 0, start = 0, *longest = counts, *last = counts + most + 1;
    for (int64_t m = 0; m < num_samples; m++) {
        /* An empty stream still takes a place, or a batch could hold any number of them. */
        int64_t of_last = lengths[num_streams - 1][m] > 1 ? lengths[num_streams - 1][m] : 1;
        int64_t of_all = of_last;
        for (int64_t l = 0; l < num_streams - 1; l++)
            of_all = lengths[l][m] > of_all ? lengths[l][m] : of_all;
        key[m] = of_all << 32 | of_last;
    }
    while (start < num_samples) {
        int64_t stop = start, end = 0;
        memset(counts, 0, (size_t)(2 * (most + 1)) * sizeof *counts);
        for (; stop < num_samples; stop++) {
            if (stop + AHEAD < num_samples)
                __builtin_prefetch(key + order[stop + AHEAD]);
            int64_t here = key[order[stop]], with = tokens + (here >> 32);
            if (stop == start)
                end = (with / pool + 1) * pool;
            if (with >= end)
                break;
            tokens = with;
            keys[stop] = here;
            longest[here >> 32]++;
            last[here & UINT32_MAX]++;
        }
        places_of(longest, most);
        places_of(last, most);
        for (int64_t i = start; i < stop; i++)
            other[start + last[keys[i] & UINT32_MAX]++] = i;
        for (int64_t i = start; i < stop; i++)
            samples[start + longest[keys[other[i]] >> 32]++] = order[other[i]];
        while (start < stop) {
            int64_t size = budget / (key[samples[start]] >> 32);
            start += size > 1 ? size : 1;
            start = start < stop ? start : stop;
            stops[batches++] = start;
        }
    }
    return batches;
}
