// Matrix products that leave out zeros: half of the hidden values behind a ReLU are 0, and so are their gradients.
//
// A row of the left operand skips its zeros one by one, so a tile of the result is one row high and reads its panel of
// the right operand from the first-level cache. That is worth it up to about four fifths of values that are not 0.
// The sum over k runs in the order of `multiply` up to its depth of a block: zeros left out change no bit of it.
#pragma once

#include "gemm.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using Bits = std::uint64_t;

constexpr Index kSkipDepth = 64;             // of a panel: one word tells which entries of a row are not 0
constexpr Index kSkipColumns = 8 * kLanes;   // of a panel: 32 KiB at most
constexpr double kSkipShare = 0.75;          // of entries that are not 0: beyond it `multiply` is faster
constexpr Index kTurnedFloats = 1 << 17;     // of a transposed block of the left operand
constexpr Index kSkipDeepest = 4096;         // of a transposed left operand

inline Index words_of(Index M, Index K) { return (M + 1) * ((K + kSkipDepth - 1) / kSkipDepth); }

// Which of n <= kSkipDepth values are not 0.
inline Bits nonzeros(const float* p, Index n) {
    Bits found = 0;
    Index k = 0;
#if defined(__AVX512F__)
    for (; k + 16 <= n; k += 16)
        found |= Bits{_mm512_cmp_ps_mask(_mm512_loadu_ps(p + k), _mm512_setzero_ps(), _CMP_NEQ_UQ)} << k;
#elif defined(__AVX2__)
    for (; k + 8 <= n; k += 8) {
        const __m256 differs = _mm256_cmp_ps(_mm256_loadu_ps(p + k), _mm256_setzero_ps(), _CMP_NEQ_UQ);
        found |= static_cast<Bits>(_mm256_movemask_ps(differs)) << k;
    }
#endif
    for (; k < n; ++k) found |= Bits{p[k] != 0.0f} << k;
    return found;
}

// Bit k % 64 of bits[k / 64 * (M + 1) + r]: whether a[r, k] is not 0. Returns how many are not.
inline Index find_nonzeros(const float* a, Index row, Index M, Index K, Bits* bits) {
    Index count = 0;
    for (Index r = 0; r < M; ++r)
        for (Index k = 0; k < K; k += kSkipDepth) {
            const Bits found = nonzeros(a + r * row + k, K - k < kSkipDepth ? K - k : kSkipDepth);
            bits[k / kSkipDepth * (M + 1) + r] = found;
            count += __builtin_popcountll(found);
        }
    for (Index k = 0; k < K; k += kSkipDepth) bits[k / kSkipDepth * (M + 1) + M] = 0;  // is read ahead
    return count;
}

// One panel of `multiply_skipping`, kWide vectors wide and `depth` deep.
template <int kWide, class Store>
inline void skip_panel(Index M, Index depth, const float* a, Index a_row, const Bits* bits, const float* panel,
                       float* partial, bool first, bool last, Store store) {
    constexpr Index kPanel = kWide * kLanes;
    alignas(64) float result[kPanel];
    Bits next = bits[0];
    for (Index m = 0; m < M; ++m) {
        const float* row = a + m * a_row;
        float* sums = partial + m * kPanel;
        Bits left = next;
        next = bits[m + 1];
        for (Index k = 0; k < depth; k += 16) __builtin_prefetch(row + 4 * a_row + k);
        Vector sum[kWide] = {};
        if (!first) {
            __builtin_prefetch(sums + 2 * kPanel);
            for (int v = 0; v < kWide; ++v) sum[v] = *reinterpret_cast<const Vector*>(sums + v * kLanes);
        }
        for (; left; left &= left - 1) {
            const int k = __builtin_ctzll(left);
            const float* right = panel + k * kPanel;
#pragma GCC unroll 8
            for (int v = 0; v < kWide; ++v) sum[v] += row[k] * *reinterpret_cast<const Vector*>(right + v * kLanes);
        }
        float* out = last ? result : sums;
#pragma GCC unroll 8
        for (int v = 0; v < kWide; ++v) *reinterpret_cast<Vector*>(out + v * kLanes) = sum[v];
        if (last) store(m, result);
    }
}

// `multiply` for rows of a [M, K] that lie side by side and whose `bits` are known; `partial`: M * kSkipColumns floats.
template <class Store>
void multiply_skipping(Index M, Index N, Index K, const float* a, Index a_row, const Bits* bits, Matrix b,
                       float* packed, float* partial, Store store) {
    for (Index n = 0; n < N; n += kSkipColumns) {
        const Index width = N - n < kSkipColumns ? N - n : kSkipColumns;
        const Bits* known = bits;
        for (Index k = 0; k < K; k += kSkipDepth, known += M + 1) {
            const Index depth = K - k < kSkipDepth ? K - k : kSkipDepth;
            const auto panel = [&]<int kWide>() {
                pack_panel(b.block(k, n), depth, width, kWide * kLanes, packed);
                skip_panel<kWide>(M, depth, a + k, a_row, known, packed, partial, k == 0, k + depth >= K,
                                  [&](Index m, float* values) { store(m, n, values, width); });
            };
            if (width > 4 * kLanes)
                panel.template operator()<8>();
            else if (width > kLanes)
                panel.template operator()<4>();
            else
                panel.template operator()<1>();
        }
    }
}

#if defined(__AVX512F__)
constexpr Index kDotBlock = 64;  // columns of the rows that are multiplied: 4 registers

// out[m, k] (+)= scale a_m . b_k, over 16 kWide columns, where a bit says so; 0 elsewhere.
template <int kWide>
inline void masked_dots(Index M, Index K, const float* a, Index a_row, const float* b, Index b_row, const Bits* bits,
                        float scale, float* out, bool add) {
    constexpr int kChains = 2;
    constexpr Index kBlock = 32;  // rows of b that stay in the first-level cache
    for (Index k0 = 0; k0 < K; k0 += kBlock) {
        const Index block = K - k0 < kBlock ? K - k0 : kBlock;
        const Bits* known = bits + k0 / kSkipDepth * (M + 1);
        const Index shift = k0 % kSkipDepth;
        for (Index m = 0; m < M; ++m) {
            const float* row = a + m * a_row;
            __m512 left[kWide];
#pragma GCC unroll 16
            for (int v = 0; v < kWide; ++v) left[v] = _mm512_loadu_ps(row + v * 16);
#pragma GCC unroll 16
            for (int v = 0; v < kWide; ++v) __builtin_prefetch(row + a_row + v * 16);
            alignas(64) float found[kBlock] = {};
            for (auto wanted = static_cast<std::uint32_t>(known[m] >> shift); wanted; wanted &= wanted - 1) {
                const int k = __builtin_ctz(wanted);
                const float* right = b + (k0 + k) * b_row;
                __m512 sum[kChains];
#pragma GCC unroll 2
                for (int i = 0; i < kChains; ++i) sum[i] = left[i] * _mm512_loadu_ps(right + i * 16);
#pragma GCC unroll 16
                for (int v = kChains; v < kWide; ++v)
                    sum[v % kChains] = _mm512_fmadd_ps(left[v], _mm512_loadu_ps(right + v * 16), sum[v % kChains]);
                found[k] = _mm512_reduce_add_ps(sum[0] + sum[1]);
            }
            float* here = out + m * K + k0;
            for (Index k = 0; k < block; k += 16) {
                const auto inside = static_cast<__mmask16>(block - k < 16 ? (1u << (block - k)) - 1u : 0xffffu);
                __m512 result = _mm512_load_ps(found + k) * scale;
                if (add) result += _mm512_maskz_loadu_ps(inside, here + k);
                _mm512_mask_storeu_ps(here + k, inside, result);
            }
        }
    }
}

// out[m, k] = scale a_m . b_k where a bit says so, 0 elsewhere, for rows of E columns, a multiple of kDotBlock.
inline void masked_products(Index M, Index K, Index E, const float* a, Index a_row, const float* b, Index b_row,
                            const Bits* bits, float scale, float* out) {
    for (Index e = 0; e < E;) {
        if (E - e >= 256) {
            masked_dots<16>(M, K, a + e, a_row, b + e, b_row, bits, scale, out, e > 0);
            e += 256;
        } else {
            masked_dots<4>(M, K, a + e, a_row, b + e, b_row, bits, scale, out, e > 0);
            e += 64;
        }
    }
}
#endif

}  // namespace spinlock_fast::SPINLOCK_SIMD
