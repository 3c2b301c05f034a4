// Matrix products c = a b that skip zeros of the left operand: ReLU sets about half of the hidden values to 0.
//
// A result tile is one row high, and its panel of b is read from the first-level cache. This is faster than `multiply`
// up to about 80 % nonzeros. Sums over k run in the order of `multiply` up to depth `kDepth`; skipped zeros do not
// change them.
#pragma once

#include "dense_gemm.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using Mask = std::uint64_t;  // bit k: entry k is not 0

constexpr Index kSkipDepth = 64;              // panel depth: the nonzeros of a row fit one 64-bit mask
constexpr Index kSkipColumns = 8 * kLanes;    // panel width: a panel takes at most 32 KiB
constexpr double kMaxDensity = 0.75;          // above this share of nonzeros, `multiply` is used
constexpr Index kTransposedFloats = 1 << 17;  // size of a transposed block of the left operand
constexpr Index kMaxTransposedDepth = 4096;   // maximal K of a transposed left operand

inline Index mask_words(Index M, Index K) { return (M + 1) * ((K + kSkipDepth - 1) / kSkipDepth); }

// Mask of the nonzeros of n <= kSkipDepth values.
inline Mask nonzeros(const float* p, Index n) {
    Mask mask = 0;
    Index k = 0;
#if defined(__AVX512F__)
    for (; k + 16 <= n; k += 16)
        mask |= Mask{_mm512_cmp_ps_mask(_mm512_loadu_ps(p + k), _mm512_setzero_ps(), _CMP_NEQ_UQ)} << k;
#elif defined(__AVX2__)
    for (; k + 8 <= n; k += 8) {
        const __m256 differs = _mm256_cmp_ps(_mm256_loadu_ps(p + k), _mm256_setzero_ps(), _CMP_NEQ_UQ);
        mask |= static_cast<Mask>(_mm256_movemask_ps(differs)) << k;
    }
#endif
    for (; k < n; ++k) mask |= Mask{p[k] != 0.0f} << k;
    return mask;
}

// Sets bit k % 64 of masks[k / 64 * (M + 1) + r] where a[r, k] is not 0. Returns the number of nonzeros.
inline Index find_nonzeros(const float* a, Index row, Index M, Index K, Mask* masks) {
    Index count = 0;
    for (Index r = 0; r < M; ++r)
        for (Index k = 0; k < K; k += kSkipDepth) {
            const Mask mask = nonzeros(a + r * row + k, K - k < kSkipDepth ? K - k : kSkipDepth);
            masks[k / kSkipDepth * (M + 1) + r] = mask;
            count += __builtin_popcountll(mask);
        }
    for (Index k = 0; k < K; k += kSkipDepth)
        masks[k / kSkipDepth * (M + 1) + M] = 0;  // skip_panel reads one mask ahead
    return count;
}

// One panel of `multiply_skipping`: kPanelVectors vectors wide, `depth` deep.
template <int kPanelVectors, class Store>
inline void skip_panel(Index M, Index depth, const float* a, Index a_row, const Mask* masks, const float* panel,
                       float* partial, bool first, bool last, Store store) {
    constexpr Index kPanel = kPanelVectors * kLanes;
    alignas(64) float result[kPanel];
    Mask next = masks[0];
    for (Index m = 0; m < M; ++m) {
        const float* row = a + m * a_row;
        float* sums = partial + m * kPanel;
        Mask left = next;
        next = masks[m + 1];
        for (Index k = 0; k < depth; k += 16) __builtin_prefetch(row + 4 * a_row + k);
        Vector sum[kPanelVectors] = {};
        if (!first) {
            __builtin_prefetch(sums + 2 * kPanel);
            for (int v = 0; v < kPanelVectors; ++v) sum[v] = *reinterpret_cast<const Vector*>(sums + v * kLanes);
        }
        for (; left; left &= left - 1) {
            const int k = __builtin_ctzll(left);
            const float* right = panel + k * kPanel;
#pragma GCC unroll 8
            for (int v = 0; v < kPanelVectors; ++v)
                sum[v] += row[k] * *reinterpret_cast<const Vector*>(right + v * kLanes);
        }
        float* out = last ? result : sums;
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) *reinterpret_cast<Vector*>(out + v * kLanes) = sum[v];
        if (last) store(m, result);
    }
}

// Like `multiply`, for row-major a [M, K] with the `masks` of `find_nonzeros`; partial: M * kSkipColumns floats.
template <class Store>
void multiply_skipping(Index M, Index N, Index K, const float* a, Index a_row, const Mask* masks, Matrix b,
                       float* packed, float* partial, Store store) {
    for (Index n = 0; n < N; n += kSkipColumns) {
        const Index width = N - n < kSkipColumns ? N - n : kSkipColumns;
        const Mask* block_masks = masks;
        for (Index k = 0; k < K; k += kSkipDepth, block_masks += M + 1) {
            const Index depth = K - k < kSkipDepth ? K - k : kSkipDepth;
            const auto panel = [&]<int kPanelVectors>() {
                pack_panel(b.block(k, n), depth, width, kPanelVectors * kLanes, packed);
                skip_panel<kPanelVectors>(M, depth, a + k, a_row, block_masks, packed, partial, k == 0, k + depth >= K,
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
constexpr Index kDotBlock = 64;  // E is processed in blocks of 64 columns: 4 registers

// out[m, k] (+)= scale a_m . b_k over 16 kPanelVectors columns where the mask bit is set; 0 elsewhere.
template <int kPanelVectors>
inline void masked_dots(Index M, Index K, const float* a, Index a_row, const float* b, Index b_row, const Mask* masks,
                        float scale, float* out, bool add) {
    constexpr int kChains = 2;
    constexpr Index kBlock = 32;  // rows of b that fit the first-level cache
    for (Index k0 = 0; k0 < K; k0 += kBlock) {
        const Index block = K - k0 < kBlock ? K - k0 : kBlock;
        const Mask* block_masks = masks + k0 / kSkipDepth * (M + 1);
        const Index shift = k0 % kSkipDepth;
        for (Index m = 0; m < M; ++m) {
            const float* row = a + m * a_row;
            __m512 left[kPanelVectors];
#pragma GCC unroll 16
            for (int v = 0; v < kPanelVectors; ++v) left[v] = _mm512_loadu_ps(row + v * 16);
#pragma GCC unroll 16
            for (int v = 0; v < kPanelVectors; ++v) __builtin_prefetch(row + a_row + v * 16);
            alignas(64) float dots[kBlock] = {};
            for (auto mask = static_cast<std::uint32_t>(block_masks[m] >> shift); mask; mask &= mask - 1) {
                const int k = __builtin_ctz(mask);
                const float* right = b + (k0 + k) * b_row;
                __m512 sum[kChains];
#pragma GCC unroll 2
                for (int i = 0; i < kChains; ++i) sum[i] = left[i] * _mm512_loadu_ps(right + i * 16);
#pragma GCC unroll 16
                for (int v = kChains; v < kPanelVectors; ++v)
                    sum[v % kChains] = _mm512_fmadd_ps(left[v], _mm512_loadu_ps(right + v * 16), sum[v % kChains]);
                dots[k] = _mm512_reduce_add_ps(sum[0] + sum[1]);
            }
            float* out_row = out + m * K + k0;
            for (Index k = 0; k < block; k += 16) {
                const auto inside = static_cast<__mmask16>(block - k < 16 ? (1u << (block - k)) - 1u : 0xffffu);
                __m512 result = _mm512_load_ps(dots + k) * scale;
                if (add) result += _mm512_maskz_loadu_ps(inside, out_row + k);
                _mm512_mask_storeu_ps(out_row + k, inside, result);
            }
        }
    }
}

// out[m, k] = scale a_m . b_k where the mask bit is set, 0 elsewhere. Rows have E columns, a multiple of kDotBlock.
inline void masked_products(Index M, Index K, Index E, const float* a, Index a_row, const float* b, Index b_row,
                            const Mask* masks, float scale, float* out) {
    for (Index e = 0; e < E;) {
        if (E - e >= 256) {
            masked_dots<16>(M, K, a + e, a_row, b + e, b_row, masks, scale, out, e > 0);
            e += 256;
        } else {
            masked_dots<4>(M, K, a + e, a_row, b + e, b_row, masks, scale, out, e > 0);
            e += 64;
        }
    }
}
#endif

}  // namespace spinlock_fast::SPINLOCK_SIMD
