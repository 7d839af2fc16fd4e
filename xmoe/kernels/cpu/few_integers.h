/* columns_by_rows of few.c for weights in int8 and int4, read as they lie.
 *
 * Where there are instructions for it, bf16 activations become 16-bit integers, 15 bits and a sign under a scale for each
 * group of the weight (or for 128 values of a longer one), which rounds all but those below a hundredth of the largest less
 * than bf16 has. Products of such integers take fewer instructions than decoding the weight into bf16 first, so that for one
 * row memory stays the limit. Elsewhere, and for float activations, the weight is decoded vector by vector.
 */
#ifndef XMOE_CPU_FEW_INTEGERS_H
#define XMOE_CPU_FEW_INTEGERS_H

#include "activations.h"

#if SHORTS
/* SHORTS integers from value i of the stack on, their zero taken away */
INLINE vi shorts_at(const struct weight *w, int64_t i, vi zero) {
    const uint8_t *p = (const uint8_t *)w->values + (w->form == INT4 ? i / 2 : i);
#if defined(__AVX512F__)
    __m512i v;
    if (w->form == INT4) { /* a byte in each 32 bits: shifted by 12, its high nibble is the upper 16 bits' low one */
        v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
        v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 12)), _mm512_set1_epi32(0x000f000f));
    } else if (w->zeros) v = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
    else return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
    return (vi)_mm512_sub_epi16(v, (__m512i)zero);
#else
    __m256i v;
    if (w->form == INT4) {
        v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
        v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 12)), _mm256_set1_epi32(0x000f000f));
    } else if (w->zeros) v = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    else return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
    return (vi)_mm256_sub_epi16(v, (__m256i)zero);
#endif
}
/* acc + a b, two neighbouring products a lane */
INLINE vi add_pairs(vi acc, vi a, vi b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
    return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
    return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

/* columns_by_rows for integers; `first` is the row of the stack that column 0 is. inner and the groups are multiples of 32. */
INLINE void integer_columns_by_rows(int rows, const struct weight *w, int64_t first, struct activations x, int64_t inner,
                                    int64_t columns, const void *bias, int bias_is_float, void *y, int64_t y_row, int y_is_float) {
    int64_t each = (columns + STREAMS - 1) / STREAMS, groups = inner / w->group, half = w->form == INT4;
    for (int64_t c = 0; c < each; c++) {
        vf sums[STREAMS][AT_ONCE] = {0};
        int64_t column[STREAMS];
        for (int i = 0; i < STREAMS; i++) column[i] = smaller(c + i * each, columns - 1);
        for (int64_t k = 0, next; k < inner; k = next) {
            int64_t g = k / w->group;
            next = block_end(k, w->group); /* so few products of 255 * 32767 at most add up within 32 bits */
#pragma GCC unroll 4
            for (int i = 0; i < STREAMS; i++) {
                int64_t row = first + column[i], of = row * groups + g, from = row * inner;
                vi sum[AT_ONCE] = {0}, zero = (vi){0} + (w->zeros ? w->zeros[of] : 8) * 0x00010001;
                for (int64_t j = k; j < next; j += SHORTS) {
                    vi weights = shorts_at(w, from + j, zero);
#pragma GCC unroll 4
                    for (int r = 0; r < rows; r++) sum[r] = add_pairs(sum[r], weights, (vi)load_unit(x.shorts + j + r * x.row));
                }
                __builtin_prefetch((const char *)w->values + ((from + k) >> half) + AHEAD, 0, 2);
                vf scale = scale_of(w, of);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++)
                    sums[i][r] += __builtin_convertvector(sum[r], vf) * (scale * x.scale[(k + r * x.row) / 32]);
            }
        }
        write_sums(rows, sums, column, bias, bias_is_float, y, y_row, y_is_float);
    }
}
#else
/* a vector of the weight from value i on, rounded once as decode_integers rounds it */
INLINE vu integer_units(const struct weight *w, int64_t i, vf scale, vf zero) {
#if PAIR == 2
    element both[STEP];
    store(both, integers_at(w, i, zero) * scale), store(both + LANES, integers_at(w, i + LANES, zero) * scale);
    return load_unit(both);
#elif defined(XMOE_ELEMENT_BF16)
    return (vu)widen(narrow(integers_at(w, i, zero) * scale));
#else
    return (vu)(integers_at(w, i, zero) * scale);
#endif
}
INLINE void integer_columns_by_rows(int rows, const struct weight *w, int64_t first, struct activations x, int64_t inner,
                                    int64_t columns, const void *bias, int bias_is_float, void *y, int64_t y_row, int y_is_float) {
    int64_t each = (columns + STREAMS - 1) / STREAMS, groups = inner / w->group;
    for (int64_t c = 0; c < each; c++) {
        vf sums[STREAMS][AT_ONCE] = {0};
        int64_t column[STREAMS];
        for (int i = 0; i < STREAMS; i++) column[i] = smaller(c + i * each, columns - 1);
        for (int64_t g = 0; g < groups; g++)
#pragma GCC unroll 4
            for (int i = 0; i < STREAMS; i++) {
                int64_t row = first + column[i], of = row * groups + g, from = row * inner;
                vf scale = scale_of(w, of), zero = zero_of(w, of);
                for (int64_t k = g * w->group; k < (g + 1) * w->group; k += STEP) {
                    vu units = integer_units(w, from + k, scale, zero);
#pragma GCC unroll 4
                    for (int r = 0; r < rows; r++) sums[i][r] = multiply_add(sums[i][r], load_unit(x.x + k + r * x.row), units);
                }
            }
        write_sums(rows, sums, column, bias, bias_is_float, y, y_row, y_is_float);
    }
}
#endif
#endif
