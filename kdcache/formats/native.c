/* Copies of many small pieces, wider than they are stored: what `native.py` calls.
 *
 * Every piece lies somewhere in hundreds of megabytes of mapped files, so it is the wait for memory
 * that counts: pieces that come next are asked for before they are needed.
 *
 * R samples, S files, C columns, F fields
 */

#include <stdint.h>
#include <string.h>

#define AHEAD 16 /* samples */

/* One field, or one of two bytes that is put between others (`step` > 1). */
typedef struct {
    const int64_t *low;  /* [S] where its values begin in each file */
    const int64_t *high; /* [S] those of bytes to put above them, shifted by 16; 0: none */
    int64_t column;
    int64_t stored; /* bytes of a stored value */
    int64_t wide;   /* bytes of a delivered value */
    int64_t step;   /* values from one to the next where they are delivered */
    uint8_t *to;
} Field;

/* Where samples lie. Returns 0, or 1 where there is no such sample.
 *
 * starts: [S + 1] first sample of each file. offsets: [C, samples + S]. rows: [R] samples.
 * file: [R], begins: [C, R], ends: [C, R + 1] to fill; ends counts records from the first row on.
 */
int kdcache_find(const int64_t *starts, int64_t num_files, const int32_t *offsets, int64_t width,
                 int64_t num_columns, const int64_t *rows, int64_t num_rows, int32_t *file,
                 int64_t *begins, int64_t *ends)
{
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
    for (int64_t c = 0; c < num_columns; c++) {
        const int32_t *mine = offsets + c * width;
        int64_t total = 0;
        *ends++ = 0;
        for (int64_t r = 0; r < num_rows; r++) {
            if (r + AHEAD < num_rows)
                __builtin_prefetch(mine + rows[r + AHEAD] + file[r + AHEAD]);
            const int32_t *place = mine + rows[r] + file[r];
            total += place[1] - place[0];
            *begins++ = place[0];
            *ends++ = total;
        }
    }
    return 0;
}

static inline void copy_bytes(uint8_t *restrict to, const uint8_t *restrict from, int64_t size)
{
    if (size >= 16) { /* the last sixteen over those before, so that there is no rest */
        int64_t i = 0;
        for (; i + 16 <= size; i += 16)
            memcpy(to + i, from + i, 16);
        memcpy(to + size - 16, from + size - 16, 16);
    } else {
        for (int64_t i = 0; i < size; i++)
            to[i] = from[i];
    }
}

#define PLACE(where, r) ((const void *)((where)[file[r]] + begins[r] * stored))

static inline void fetch(const uint8_t *piece, int64_t size)
{
    for (int64_t i = 0; i < size; i += 64)
        __builtin_prefetch(piece + i);
}

#define EACH_SAMPLE(copy)                                                                         \
    for (int64_t r = 0; r < num_rows; r++) {                                                      \
        int64_t next = r + ahead, n = ends[r + 1] - ends[r];                                      \
        if (next < num_rows)                                                                      \
            fetch(PLACE(field->low, next), (ends[next + 1] - ends[next]) * stored);               \
        uint8_t *place = field->to + ends[r] * field->step * field->wide;                         \
        copy                                                                                      \
    }

#define WIDEN(Stored, Wide)                                                                       \
    EACH_SAMPLE({                                                                                 \
        const Stored *restrict from = PLACE(field->low, r);                                       \
        Wide *restrict to = (Wide *)place;                                                        \
        for (int64_t i = 0; i < n; i++)                                                           \
            to[i] = from[i];                                                                      \
    })

#define JOIN(Wide)                                                                                \
    EACH_SAMPLE({                                                                                 \
        const uint16_t *restrict from = PLACE(field->low, r);                                     \
        const uint8_t *restrict above = (const uint8_t *)field->high[file[r]] + begins[r];        \
        Wide *restrict to = (Wide *)place;                                                        \
        for (int64_t i = 0; i < n; i++)                                                           \
            to[i] = (Wide)from[i] | (Wide)above[i] << 16;                                         \
    })

/* Four fields of two bytes side by side. */
static void copy_four(const Field *field, int64_t num_rows, const int32_t *file,
                      const int64_t *begins, const int64_t *ends)
{
    const int64_t stored = 2, ahead = 8;
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t next = r + ahead, n = ends[r + 1] - ends[r];
        for (int k = 0; k < 4 && next < num_rows; k++)
            fetch(PLACE(field[k].low, next), (ends[next + 1] - ends[next]) * stored);
        const uint16_t *restrict a = PLACE(field[0].low, r), *restrict b = PLACE(field[1].low, r);
        const uint16_t *restrict c = PLACE(field[2].low, r), *restrict d = PLACE(field[3].low, r);
        uint16_t *restrict to = (uint16_t *)field->to + 4 * ends[r];
        for (int64_t i = 0; i < n; i++) {
            to[4 * i] = a[i];
            to[4 * i + 1] = b[i];
            to[4 * i + 2] = c[i];
            to[4 * i + 3] = d[i];
        }
    }
}

static int copy_field(const Field *field, int64_t num_rows, const int32_t *file,
                      const int64_t *begins, const int64_t *ends)
{
    int64_t stored = field->stored;
    /* Long pieces are fetched a few ahead: what is not used soon is pushed out again. */
    int64_t ahead = 1 + 2048 / (1 + ends[num_rows] * stored / num_rows);
    ahead = ahead < AHEAD ? ahead : AHEAD;
    if (field->step > 1) {
        if (stored != 2 || field->wide != 2)
            return 1;
        EACH_SAMPLE({
            const uint16_t *restrict from = PLACE(field->low, r);
            uint16_t *restrict to = (uint16_t *)place;
            for (int64_t i = 0; i < n; i++)
                to[i * field->step] = from[i];
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
int kdcache_copy(const Field *fields, int64_t num_fields, int64_t num_rows, const int32_t *file,
                 const int64_t *begins, const int64_t *ends)
{
    for (int64_t f = 0; num_rows > 0 && f < num_fields; f++) {
        const Field *field = fields + f;
        const int64_t *from = begins + field->column * num_rows;
        const int64_t *till = ends + field->column * (num_rows + 1);
        if (field->step == 4) {
            copy_four(field, num_rows, file, from, till);
            f += 3;
        } else if (copy_field(field, num_rows, file, from, till)) {
            return 1;
        }
    }
    return 0;
}

/* Tokens as padded matrices, one of each batch, one after another.
 *
 * flat: tokens of all samples. ends: [R + 1] of each sample. sizes, widths: [B] samples and
 * positions of each batch. ids, mask: to fill.
 */
void kdcache_pad(const int64_t *flat, const int64_t *ends, int64_t num_batches,
                 const int64_t *sizes, const int64_t *widths, int64_t padding, int64_t *ids,
                 uint8_t *mask)
{
    for (int64_t b = 0; b < num_batches; b++) {
        int64_t width = widths[b];
        for (int64_t r = 0; r < sizes[b]; r++, ends++, ids += width, mask += width) {
            int64_t n = ends[1] - ends[0];
            copy_bytes((uint8_t *)ids, (const uint8_t *)(flat + ends[0]), 8 * n);
            for (int64_t i = n; i < width; i++)
                ids[i] = padding;
            for (int64_t i = 0; i < width; i++)
                mask[i] = i < n;
        }
    }
}
