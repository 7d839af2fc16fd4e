/* Products of many small matrices in one call: rows sorted by expert, each stretch of rows with its expert's weight.
 *
 * A library product per expert meets a new number of rows at every step, and libraries that generate code for each
 * shape (oneDNN) then generate it again and again. Here one kernel takes all shapes; weights may be fp32 and are
 * rounded while they are packed, and gradients leave in fp32, so no converted copy of a weight ever exists.
 * One "expert" makes a plain product.
 */
#include "product.h"

#define PANEL 64   /* columns of the result that a task computes together */
#define DEPTH 256  /* inner dimension taken at a time, so that a packed panel stays in the first cache */
#define ROWS 512   /* rows of a task: few enough to stay in the second cache, many enough to repay packing the panel, */
#define FEW_ROWS 64 /* but no more than leave work for every thread, down to this many */
#define HANDFUL 4  /* rows up to which a product only reads the weight once, unpacked: the case of decoding */
#define STRIPE 96  /* rows of a weight gradient that a task computes */

/* to[rows x cols], zero beyond used_rows and used_cols, from elements or floats; cols a multiple of LANES */
static void fetch(element *to, const void *from, int is_float, int64_t from_row, int64_t used_rows, int64_t used_cols,
                  int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++, to += cols) {
        int64_t used = i < used_rows ? used_cols : 0, j = 0;
        if (is_float)
            for (; j < used; j += LANES)
                store(to + j, load_float_part((const float *)from + i * from_row + j, used - j));
        else if (used) memcpy(to, (const element *)from + i * from_row, used * sizeof(element)), j = used;
        if (j < cols) memset(to + j, 0, (cols - j) * sizeof(element));
    }
}

struct stretch {
    int64_t expert, first, count;
};
/* the rows of every expert, in pieces of at most `most` rows (0: whole); returns how many pieces */
static int64_t cut(const int64_t *offsets, int64_t experts, int64_t most, struct stretch *out) {
    int64_t n = 0;
    for (int64_t e = 0; e < experts; e++) {
        int64_t count = offsets[e + 1] - offsets[e], pieces = most ? (count + most - 1) / most : count > 0;
        for (int64_t i = 0; i < pieces; i++, n++) {
            int64_t from = count * i / pieces, to = count * (i + 1) / pieces;
            if (out) out[n] = (struct stretch){e, offsets[e] + from, to - from};
        }
    }
    return n;
}

/* `count` rows of floats times four rows of a weight, of which `used` exist, reading along the inner dimension */
INLINE void dot_products(int count, const float *x, const char *weight, int weight_is_float, int64_t size, int64_t inner,
                         int64_t used, float sums[HANDFUL][4]) {
    vf sum[HANDFUL][4] = {0};
    for (int64_t k = 0; k < inner; k += LANES) {
        vf w[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            const char *from = weight + ((c < used ? c : 0) * inner + k) * size;
            w[c] = weight_is_float ? load_float_part((const float *)from, inner - k) : load_part((const element *)from, inner - k);
        }
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            vf v = load_float_part(x + r * inner + k, inner - k);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) sum[r][c] += v * w[c];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++)
        for (int c = 0; c < 4; c++) sums[r][c] = sum_lanes(sum[r][c]);
}

static void handful_times_panel(const element *x, const void *weight, int weight_is_float, const float *bias, int64_t inner,
                                int64_t columns, struct stretch s, int64_t panel, element *y, float *rows) {
    int64_t last = smaller(columns, panel + PANEL), size = weight_is_float ? 4 : sizeof(element);
    for (int64_t i = 0; i < s.count * inner; i += LANES)
        store_float_part(rows + i, load_part(x + s.first * inner + i, s.count * inner - i), s.count * inner - i);
    for (int64_t c = panel; c < last; c += 4) {
        const char *from = (const char *)weight + (s.expert * columns + c) * inner * size;
        float sums[HANDFUL][4];
        switch (s.count) {
        case 1: dot_products(1, rows, from, weight_is_float, size, inner, last - c, sums); break;
        case 2: dot_products(2, rows, from, weight_is_float, size, inner, last - c, sums); break;
        case 3: dot_products(3, rows, from, weight_is_float, size, inner, last - c, sums); break;
        default: dot_products(4, rows, from, weight_is_float, size, inner, last - c, sums);
        }
        for (int64_t r = 0; r < s.count; r++)
            for (int64_t i = 0; i < smaller(4, last - c); i++)
                store_one(y + (s.first + r) * columns + c + i, sums[r][i] + (bias ? bias[s.expert * columns + c + i] : 0.0f));
    }
}

static void rows_times_panel(const element *x, const void *weight, int weight_is_float, int transposed, const float *bias,
                             int64_t inner, int64_t columns, struct stretch s, int64_t panel, element *y, char *room) {
    if (s.count <= HANDFUL && !transposed) {
        handful_times_panel(x, weight, weight_is_float, bias, inner, columns, s, panel, y, (float *)room);
        return;
    }
    int64_t width = smaller(PANEL, columns - panel), lanes = round_up(width, LANES), size = weight_is_float ? 4 : sizeof(element);
    element *flat = carve(&room, PANEL * DEPTH * sizeof(element));
    unit *spare = carve(&room, PANEL * DEPTH * 4), *right = carve(&room, PANEL * DEPTH * 4);
    float *sum = carve(&room, ROWS * PANEL * 4);
    element *rows = carve(&room, ROWS * DEPTH * sizeof(element));
    unit *left_room = carve(&room, ROWS * DEPTH * 4);
    const char *w = (const char *)weight + s.expert * inner * columns * size;
    for (int64_t k = 0; k < inner; k += DEPTH) {
        int64_t depth = smaller(DEPTH, inner - k), padded = round_up(depth, LANES * PAIR);
        const unit *panel_units = right;
        int64_t panel_row = PANEL;
        if (transposed) { /* weight [inner, columns]: columns already lie side by side */
            fetch(flat, w + (k * columns + panel) * size, weight_is_float, columns, depth, width, padded, lanes);
            panel_units = interleave(spare, flat, padded, lanes);
            panel_row = lanes;
        } else {
            fetch(flat, w + (panel * inner + k) * size, weight_is_float, inner, width, depth, lanes, padded);
            turn(right, PANEL, as_units(spare, flat, lanes * padded), padded / PAIR, lanes, padded / PAIR);
        }
        const element *from = x + s.first * inner + k;
        const unit *left = (const unit *)from;
        int64_t left_row = inner / PAIR, units = (depth + PAIR - 1) / PAIR;
        if (sizeof(element) * PAIR != sizeof(unit) || inner % PAIR) { /* rows that are not whole units as they lie */
            fetch(rows, from, 0, inner, s.count, depth, s.count, padded);
            left = as_units(left_room, rows, s.count * padded);
            left_row = padded / PAIR;
        }
        product(s.count, lanes, units, left, left_row, panel_units, panel_row, sum, PANEL, k > 0);
    }
    for (int64_t r = 0; r < s.count; r++)
        for (int64_t i = 0; i < width; i += LANES) {
            vf v = load_float(sum + r * PANEL + i);
            if (bias) v += load_float_part(bias + s.expert * columns + panel + i, width - i);
            store_part(y + (s.first + r) * columns + panel + i, v, width - i);
        }
}

/* y [rows, columns] = x [rows, inner] times the weight of each row's expert, plus bias [experts, columns] or NULL:
 * weight [experts, columns, inner] as it stands in a layer, or, `transposed`, [experts, inner, columns]. */
int NAME(grouped_product)(const element *x, const void *weight, int weight_is_float, int transposed, const float *bias,
                          const int64_t *offsets, int64_t experts, int64_t inner, int64_t columns, element *y) {
    int64_t panels = (columns + PANEL - 1) / PANEL, most = ROWS;
    while (most > FEW_ROWS && cut(offsets, experts, most, NULL) * panels < 4 * max_threads()) most /= 2;
    int64_t pieces = cut(offsets, experts, most, NULL);
    int64_t bytes = PANEL * DEPTH * 12 + ROWS * PANEL * 4 + ROWS * DEPTH * 8;
    if (HANDFUL * inner * 4 > bytes) bytes = HANDFUL * inner * 4;
    bytes = round_up(bytes + 4096, 4096);
    if (!pieces) return 0;
    struct stretch *piece = malloc(pieces * sizeof(struct stretch));
    char *room = rooms(bytes * max_threads());
    int failed = !piece || !room;
    if (!failed) {
        cut(offsets, experts, most, piece);
#pragma omp parallel for schedule(dynamic) if (WORTH_SHARING(offsets[experts] * inner * columns / 8))
        for (int64_t task = 0; task < pieces * panels; task++)
            rows_times_panel(x, weight, weight_is_float, transposed, bias, inner, columns, piece[task / panels],
                             task % panels * PANEL, y, room + bytes * thread_number());
    }
    free(piece), free(room);
    return failed;
}

/* Rows of the right side, ready for all tasks: panel after panel of [padded rows / PAIR x PANEL] units. */
static int64_t padded_rows(int64_t count) { return round_up(count, LANES * PAIR); }

static void gradient_stripe(const element *left, const unit *right, struct stretch s, int64_t height, int64_t width,
                            int64_t stripe, void *out, int out_is_float, char *room) {
    int64_t rows = smaller(STRIPE, height - stripe), padded = padded_rows(s.count), lanes = round_up(rows, LANES);
    unit *turned = carve(&room, STRIPE * padded / PAIR * 4);
    element *flat = carve(&room, STRIPE * DEPTH * sizeof(element));
    unit *spare = carve(&room, STRIPE * DEPTH * 4);
    float *sum = carve(&room, STRIPE * PANEL * 4);
    for (int64_t r = 0; r < padded; r += DEPTH) {
        int64_t count = smaller(DEPTH, padded - r);
        fetch(flat, left + (s.first + r) * height + stripe, 0, height, s.count - r, rows, count, lanes);
        turn(turned + r / PAIR, padded / PAIR, interleave(spare, flat, count, lanes), lanes, count / PAIR, rows);
    }
    for (int64_t panel = 0; panel < width; panel += PANEL, right += padded / PAIR * PANEL) {
        int64_t columns = smaller(PANEL, width - panel), units = (s.count + PAIR - 1) / PAIR;
        for (int64_t k = 0; k < units; k += DEPTH / PAIR)
            product(rows, PANEL, smaller(DEPTH / PAIR, units - k), turned + k, padded / PAIR, right + k * PANEL, PANEL, sum, PANEL, k > 0);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < columns; i += LANES) {
                int64_t at = (s.expert * height + stripe + r) * width + panel + i;
                vf v = load_float(sum + r * PANEL + i);
                if (out_is_float) store_float_part((float *)out + at, v, columns - i);
                else store_part((element *)out + at, v, columns - i);
            }
    }
}

/* out[e] [height, width] = left[rows of e]^T right[rows of e], in floats or elements; zero for an expert without rows */
int NAME(grouped_gradient)(const element *left, const element *right, const int64_t *offsets, int64_t experts, int64_t height,
                           int64_t width, void *out, int out_is_float) {
    int64_t pieces = cut(offsets, experts, 0, NULL), panels = (width + PANEL - 1) / PANEL, most = 0, total = 0;
    int64_t size = out_is_float ? 4 : sizeof(element), stripes = (height + STRIPE - 1) / STRIPE;
    struct stretch *piece = malloc((pieces + 1) * sizeof(struct stretch));
    int64_t *start = malloc((pieces + 1) * sizeof(int64_t)); /* where a piece's packed right side begins, in units */
    if (!piece || !start) return free(piece), free(start), 1;
    cut(offsets, experts, 0, piece);
    for (int64_t i = 0; i < pieces; i++) {
        int64_t units = padded_rows(piece[i].count) / PAIR;
        start[i] = total;
        total += units * panels * PANEL;
        if (units > most) most = units;
    }
    for (int64_t e = 0; e < experts; e++)
        if (offsets[e] == offsets[e + 1]) memset((char *)out + e * height * width * size, 0, height * width * size);
    int64_t bytes = round_up(STRIPE * most * 4 + STRIPE * DEPTH * 8 + STRIPE * PANEL * 4 + PANEL * DEPTH * 8 + 4096, 4096);
    char *room = rooms(bytes * max_threads());
    unit *right_units = rooms(total * 4 + 4096);
    int failed = !room || !right_units;
    if (!failed) {
#pragma omp parallel if (WORTH_SHARING(offsets[experts] * height * width / 8))
        {
            char *own = room + bytes * thread_number();
            element *flat = (element *)own;
            unit *spare = (unit *)(own + PANEL * DEPTH * sizeof(element));
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < pieces * panels; task++) {
                struct stretch s = piece[task / panels];
                int64_t panel = task % panels, padded = padded_rows(s.count);
                unit *to = right_units + start[task / panels] + panel * (padded / PAIR) * PANEL;
                for (int64_t r = 0; r < padded; r += DEPTH) {
                    int64_t count = smaller(DEPTH, padded - r);
                    fetch(flat, right + (s.first + r) * width + panel * PANEL, 0, width, s.count - r,
                          smaller(PANEL, width - panel * PANEL), count, PANEL);
                    memcpy(to + r / PAIR * PANEL, interleave(spare, flat, count, PANEL), count / PAIR * PANEL * 4);
                }
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < pieces * stripes; task++)
                gradient_stripe(left, right_units + start[task / stripes], piece[task / stripes], height, width,
                                task % stripes * STRIPE, out, out_is_float, own);
        }
    }
    free(piece), free(start), free(room), free(right_units);
    return failed;
}
