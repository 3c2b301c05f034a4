// Float32 matrix product c = a b for matrices of about the size of the cache.
//
// Compiled once per instruction set, in the namespace SPINLOCK_SIMD. It must not include inline functions that the
// linker could merge with those of another instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace spinlock_fast::SPINLOCK_SIMD {

using Index = std::int64_t;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;  // accumulators: 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6;  // 12 of 16 registers
#else
constexpr int kLanes = 4, kRows = 6;
#endif
constexpr int kVectors = 2;
constexpr int kColumns = kLanes * kVectors;
constexpr Index kDepth = 512;  // maximal depth of a packed block: its panels stream from the second-level cache
constexpr Index kPackedFloats = 1 << 17;  // size of a packed block: 512 KiB

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Strided matrix: element (i, j) is p[i * row + j * column].
struct Matrix {
    const float* p;
    Index row, column;
    Matrix block(Index i, Index j) const { return {p + i * row + j * column, row, column}; }
};

// Memory of one thread.
struct Scratch {
    float* packed;   // kPackedFloats
    float* rows;     // kRows * kDepth
    float* partial;  // M * min(N, width_of_block(K)) if K > kDepth, else unused
};

// tile[r, c] = sum_k a[r, k] b[k, c] for kRows rows and kPanelVectors * kLanes columns, accumulated in registers.
// Element (r, k) of a is a[r * row + k], or a[k * row + r] with kPackedRows.
template <bool kPackedRows, int kPanelVectors>
inline void multiply_tile(const float* a, Index row, Index depth, const float* b, float* tile) {
    Vector sum[kRows][kPanelVectors] = {};
    const float *a0 = a, *a1 = a + 3 * row, *a2 = a + 6 * row, *a3 = a + 9 * row;
    for (Index k = 0; k < depth; ++k) {
        Vector right[kPanelVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v)
            right[v] = *reinterpret_cast<const Vector*>(b + k * kPanelVectors * kLanes + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            float left;
            if constexpr (kPackedRows) {
                left = a[k * row + r];
            } else {
                const float* base = r < 3 ? a0 : r < 6 ? a1 : r < 9 ? a2 : a3;
                left = base[(r % 3) * row + k];
            }
#pragma GCC unroll 2
            for (int v = 0; v < kPanelVectors; ++v) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v)
            *reinterpret_cast<Vector*>(tile + (r * kPanelVectors + v) * kLanes) = sum[r][v];
}

#if defined(__AVX512F__)
// out[r, c] = a[c, r] for r, c < 16: four perfect shuffles of the 256 values.
inline void transpose_tile(const float* a, Index a_row, float* out, Index out_row) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512 x[16], y[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(a + i * a_row);
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; ++stage) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            y[2 * i] = _mm512_permutex2var_ps(x[i], low, x[i + 8]);
            y[2 * i + 1] = _mm512_permutex2var_ps(x[i], high, x[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) x[i] = y[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + i * out_row, x[i]);
}
#endif

// out[r, c] = a[c, r] for r < rows, c < columns.
inline void transpose(const float* a, Index a_row, Index rows, Index columns, float* out, Index out_row) {
    Index whole_rows = 0, whole_columns = 0;
#if defined(__AVX512F__)
    whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
    for (Index c = 0; c < whole_columns; c += 16)
        for (Index r = 0; r < whole_rows; r += 16)
            transpose_tile(a + c * a_row + r, a_row, out + r * out_row + c, out_row);
#endif
    for (Index c = 0; c < columns; ++c)
        for (Index r = c < whole_columns ? whole_rows : 0; r < rows; ++r) out[r * out_row + c] = a[c * a_row + r];
}

// Copies b[0:depth, 0:width] to packed [depth, panel_width], padded with zeros.
inline void pack_panel(Matrix b, Index depth, Index width, Index panel_width, float* packed) {
    if (b.column == 1) {
        for (Index k = 0; k < depth; ++k) {
            float* out = packed + k * panel_width;
            const float* in = b.p + k * b.row;
            if (width == panel_width) {
                for (Index c = 0; c < panel_width; c += kLanes)
                    *reinterpret_cast<Vector*>(out + c) = *reinterpret_cast<const Vector*>(in + c);
            } else {
                for (Index c = 0; c < width; ++c) out[c] = in[c];
                for (Index c = width; c < panel_width; ++c) out[c] = 0.0f;
            }
        }
        return;
    }
    if (b.row == 1) {
        transpose(b.p, b.column, depth, width, packed, panel_width);
    } else {
        for (Index c = 0; c < width; ++c)
            for (Index k = 0; k < depth; ++k) packed[k * panel_width + c] = b.p[k * b.row + c * b.column];
    }
    for (Index c = width; c < panel_width; ++c)
        for (Index k = 0; k < depth; ++k) packed[k * panel_width + c] = 0.0f;
}

// Copies a[0:rows, 0:depth] transposed to packed [depth, kRows], padded with zeros. Row `ones_row` is set to 1.
inline void pack_rows(Matrix a, Index rows, Index depth, float* packed, Index ones_row = -1) {
    if (a.row == 1 && rows == kRows) {
        for (Index k = 0; k < depth; ++k) std::memcpy(packed + k * kRows, a.p + k * a.column, kRows * sizeof(float));
        return;
    }
    for (Index k = 0; k < depth; ++k)
        for (Index r = 0; r < kRows; ++r)
            packed[k * kRows + r] = r == ones_row ? 1.0f : r < rows ? a.p[r * a.row + k * a.column] : 0.0f;
}

// Depth of the blocks of a product: at most kDepth, equal but for the last.
inline Index depth_of_block(Index K) {
    const Index blocks = K > 0 ? (K + kDepth - 1) / kDepth : 1;
    return K > 0 ? (K + blocks - 1) / blocks : 1;
}

// Number of columns that are packed at once.
inline Index width_of_block(Index K) { return (kPackedFloats / depth_of_block(K)) / kColumns * kColumns; }

// Computes a b for a [M, K] and b [K, N] and calls store(row, column, values, width) for parts of its rows.
// The order of the sum over k does not depend on M, N or the position in the result. With `append_ones`, a row of ones
// is appended to a: result row M then holds the column sums of b.
template <class Store>
void multiply(Index M, Index N, Index K, Matrix a, Matrix b, Scratch scratch, Store store, bool append_ones = false) {
    const Index ones_row = append_ones ? M : -1;
    M += append_ones;
    alignas(64) float tile[kRows * kColumns];
    const Index block = depth_of_block(K);
    const Index block_width = width_of_block(K);
    for (Index n0 = 0; n0 < N; n0 += block_width) {
        const Index n1 = n0 + block_width < N ? n0 + block_width : N;
        for (Index k0 = 0; k0 < K || k0 == 0; k0 += block) {
            const Index depth = K - k0 < block ? K - k0 : block;
            const bool first = k0 == 0, last = k0 + depth >= K;
            for (Index n = n0; n < n1; n += kColumns) {
                const Index width = n1 - n < kColumns ? n1 - n : kColumns;
                const Index panel_width = width <= kLanes ? kLanes : kColumns;
                pack_panel(b.block(k0, n), depth, width, panel_width, scratch.packed + (n - n0) * depth);
            }
            for (Index m = 0; m < M; m += kRows) {
                const Index rows = M - m < kRows ? M - m : kRows;
                const Matrix left = a.block(m, k0);
                const bool with_ones = ones_row >= m && ones_row < m + kRows;
                const bool direct = left.column == 1 && rows == kRows && !with_ones;
                if (!direct) pack_rows(left, rows - with_ones, depth, scratch.rows, with_ones ? ones_row - m : -1);
                for (Index n = n0; n < n1; n += kColumns) {
                    const Index width = n1 - n < kColumns ? n1 - n : kColumns;
                    const float* panel = scratch.packed + (n - n0) * depth;
                    const bool narrow = width <= kLanes;
                    if (direct)
                        narrow ? multiply_tile<false, 1>(left.p, left.row, depth, panel, tile)
                               : multiply_tile<false, kVectors>(left.p, left.row, depth, panel, tile);
                    else
                        narrow ? multiply_tile<true, 1>(scratch.rows, kRows, depth, panel, tile)
                               : multiply_tile<true, kVectors>(scratch.rows, kRows, depth, panel, tile);
                    const Index panel_width = narrow ? kLanes : kColumns;
                    if (!(first && last)) {
                        for (Index r = 0; r < rows; ++r) {
                            float* sum = scratch.partial + (m + r) * (n1 - n0) + (n - n0);
                            float* panel_row = tile + r * panel_width;
                            if (!first)
                                for (Index c = 0; c < width; ++c) panel_row[c] += sum[c];
                            if (!last)
                                for (Index c = 0; c < width; ++c) sum[c] = panel_row[c];
                        }
                    }
                    if (last)
                        for (Index r = 0; r < rows; ++r) store(m + r, n, tile + r * panel_width, width);
                }
            }
        }
    }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
