/* Weights in int8 and int4 as `xmoe.quantization.integer` stores them: value = scale * (q - zero), a scale for each group of
 * consecutive inputs of a row. They are decoded into elements, rounded once, on their way to a product.
 */
#ifndef XMOE_CPU_INTEGERS_H
#define XMOE_CPU_INTEGERS_H

#include "product.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DENSE 0 /* forms of a weight; INT4 and INT8 are the bits of a value */
#define INT4 4
#define INT8 8
#define MXFP4 1

/* A stack of matrices [rows of all experts, inner]. Dense: `values` are elements, the rest is not used. MXFP4: packed blocks
 * and scale bytes. Integers: int8, or uint8 beside `zeros`; two nibbles a byte; scales are bf16 [rows, inner / group], zeros
 * uint8 of the same shape, or NULL (int4 stands in its nibble as q + 8 then). */
struct weight {
    const void *values, *scales;
    const uint8_t *zeros;
    int64_t group, form;
};

/* LANES values from value i on, as floats; i is a multiple of LANES */
INLINE vf load_int8(const int8_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}
INLINE vf load_uint8(const uint8_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}
INLINE vf load_nibbles(const uint8_t *p) { /* a byte in each 64 bits: shifted by 28, its high nibble is the upper 32 bits' low one */
#if defined(__AVX512F__)
    __m512i v = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p));
    v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi64(v, 28)), _mm512_set1_epi32(15));
    return (vf)_mm512_cvtepi32_ps(v);
#elif defined(__AVX2__)
    int32_t four;
    memcpy(&four, p, 4);
    __m256i v = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi64(v, 28)), _mm256_set1_epi32(15));
    return (vf)_mm256_cvtepi32_ps(v);
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = p[i / 2] >> (i % 2 * 4) & 15;
    return v;
#endif
}

/* LANES integers from value i of the whole stack on, their zero taken away but before their scale */
INLINE vf integers_at(const struct weight *w, int64_t i, vf zero) {
    if (w->form == INT4) return load_nibbles((const uint8_t *)w->values + i / 2) - zero;
    if (w->zeros) return load_uint8((const uint8_t *)w->values + i) - zero;
    return load_int8((const int8_t *)w->values + i);
}
INLINE vf scale_of(const struct weight *w, int64_t group) { return splat(widen_one(((const uint16_t *)w->scales)[group])); }
INLINE vf zero_of(const struct weight *w, int64_t group) { return splat(w->zeros ? w->zeros[group] : 8.0f); }

/* to[count] = values from column `first` on of one row; both are multiples of 32, and groups of LANES */
INLINE void decode_integers(element *to, const struct weight *w, int64_t inner, int64_t row, int64_t first, int64_t count) {
    int64_t groups = inner / w->group, at = row * inner + first;
    for (int64_t i = 0; i < count;) {
        int64_t g = (first + i) / w->group, stop = smaller(count, (g + 1) * w->group - first), of = row * groups + g;
        vf scale = scale_of(w, of), zero = zero_of(w, of);
        for (; i < stop; i += LANES) store(to + i, integers_at(w, at + i, zero) * scale);
    }
}
#endif
