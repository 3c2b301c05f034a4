// Gradient of sum_{i<j} w_ij |z_i - z_j| with respect to z_i: sum_j w_ij (z_i - z_j) / d_ij.
#pragma once

#include "pairwise_distances_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

constexpr Index kGradientRows = 4 * kRows;

Index distance_gradient_buffer_floats(Index S, Index padded_columns, Index dims) {
    return (kGradientRows + 1) * padded_columns + (2 * S + 2 * kRows) * whole_vectors(dims);
}

// Sets pair_weights = w_ij / d_ij for rows i in [m, m + kRows) and columns j from n0 on, and adds them to sums[i] and
// sums[j].
inline void weigh_by_inverse_distance(const Points& z, Index g, Index m, Index n0, const float* panels,
                                      const float* weight, Index weight_row, float* pair_weights, float* sums,
                                      const Workspace& w) {
    alignas(64) float tile[kRows * kColumns];
    const Index D = z.dims[g], rows = z.S - m < kRows ? z.S - m : kRows;
    const float* norms = z.norms + g * z.padded_columns;
    const float tolerance = relative_rounding(D);
    Vector row_sums[kRows] = {};
    for (Index n = n0; n < z.padded_columns; n += kColumns) {
        point_products(z, g, m, panels + n * D, w, tile);
        for (int v = 0; v < kVectors; ++v) {
            const Index c = n + v * kLanes;
            Vector column_sum = load(sums + c);
            for (Index r = 0; r < rows; ++r) {
                const Vector square =
                    squared_distances(load(tile + r * kColumns + v * kLanes), load(norms + c), norms[m + r], tolerance);
                const Vector pair_weight =
                    square > Vector{} ? load(weight + (m + r) * weight_row + c) * rsqrt(square) : Vector{};
                store(pair_weights + r * z.padded_columns + c, pair_weight);
                row_sums[r] += pair_weight;
                column_sum += pair_weight;
            }
            store(sums + c, column_sum);
        }
    }
    for (Index r = 0; r < rows; ++r) sums[m + r] += horizontal_sum(row_sums[r]);
}

// out[r] += sum_k a[r, k] b[k] for kRows rows of `width` columns, a multiple of kLanes. b is packed in panels of
// depth S.
template <bool kTransposed>
inline void accumulate_product(const float* a, Index row, Index first, Index depth, const float* b, Index S,
                               Index width, float* out) {
    alignas(64) float tile[kRows * kColumns];
    for (Index c = 0; c < width; c += kColumns) {
        const Index panel_columns = width - c < kColumns ? kLanes : kColumns;
        const float* panel = b + c * S + first * panel_columns;
        if (panel_columns == kLanes)
            multiply_tile<kTransposed, 1>(a, row, depth, panel, tile);
        else
            multiply_tile<kTransposed, kVectors>(a, row, depth, panel, tile);
        for (Index r = 0; r < kRows; ++r)
            for (Index v = 0; v < panel_columns; v += kLanes) {
                float* values = out + r * width + c + v;
                store(values, load(values) + load(tile + r * panel_columns + v));
            }
    }
}

// With p_ij = w_ij / d_ij (w upper triangular): out_i = z_i sum_j (p_ij + p_ji) - sum_j (p_ij + p_ji) z_j.
void distance_gradient(const Points& z, Index g, const float* weight, Index weight_row, float* out, Index out_row,
                       const Workspace& w) {
    const Index S = z.S, D = z.dims[g], padded = z.padded_columns, width = whole_vectors(D);
    const float *panels = z.panels + z.first_column[g] * padded, *points = z.p + z.first_column[g];
    float* pair_weights = w.buffer;                       // [kGradientRows, padded_columns]
    float* sums = pair_weights + kGradientRows * padded;  // [padded_columns] sum_j p_ij + p_ji
    float* packed_points = sums + padded;                 // [S, width] in panels of kColumns
    float* weighted_sums = packed_points + S * width;     // [S + 2 kRows, width] sum_j (p_ij + p_ji) z_j
    std::memset(sums, 0, static_cast<std::size_t>(padded) * sizeof(float));
    std::memset(weighted_sums, 0, static_cast<std::size_t>((S + 2 * kRows) * width) * sizeof(float));
    for (Index c = 0; c < width; c += kColumns) {
        const Index panel_columns = width - c < kColumns ? kLanes : kColumns,
                    count = D - c < panel_columns ? D - c : panel_columns;
        pack_panel({points + c, z.row, 1}, S, count, panel_columns, packed_points + c * S);
    }
    for (Index m0 = 0; m0 < S; m0 += kGradientRows) {
        const Index last = S - m0 < kGradientRows ? S : m0 + kGradientRows, n0 = m0 / kColumns * kColumns;
        for (Index m = m0; m < last; m += kRows) {
            float* tile_rows = pair_weights + (m - m0) * padded;
            const Index n = m / kColumns * kColumns;
            for (Index r = 0; r < kRows; ++r)
                std::memset(tile_rows + r * padded + n0, 0, static_cast<std::size_t>(n - n0) * sizeof(float));
            weigh_by_inverse_distance(z, g, m, n, panels, weight, weight_row, tile_rows, sums, w);
            accumulate_product<false>(tile_rows + n, padded, n, S - n, packed_points, S, width,
                                      weighted_sums + m * width);
        }
        // The weights are upper triangular: add the transposed part.
        for (Index j = n0; j < S; j += kRows)
            accumulate_product<true>(pair_weights + j, padded, m0, last - m0, packed_points, S, width,
                                     weighted_sums + j * width);
    }
    for (Index i = 0; i < S; ++i)
        for (Index d = 0; d < D; ++d)
            out[i * out_row + d] = points[i * z.row + d] * sums[i] - weighted_sums[i * width + d];
}

Index code_distance_gradient_buffer_floats(Index S, Index K, Index) { return K * S + S; }

// Adds the gradient of sum_{i<j} w_ij |e_(k_i) - e_(k_j)| by the code vectors of rows i to `out`; w symmetric. Weights
// of rows with equal codes are summed first: gathered[k, i] = sum over rows j of code k of w_ij.
void code_distance_gradient(const float* table, const float* vectors, Index K, Index D, const std::int32_t* codes,
                            Index S, const float* weight, Index weight_row, float* out, Index out_row,
                            const Workspace& w) {
    float* gathered = w.buffer;      // [K, S]
    float* sums = gathered + K * S;  // [S]
    std::memset(gathered, 0, static_cast<std::size_t>(K * S) * sizeof(float));
    for (Index j = 0; j < S; ++j) {
        float* sum = gathered + codes[j] * S;
        const float* row = weight + j * weight_row;
        for (Index i = 0; i < S; ++i) sum[i] += row[i];
    }
    std::memset(sums, 0, static_cast<std::size_t>(S) * sizeof(float));
    for (Index k = 0; k < K; ++k) {
        float* row = gathered + k * S;
        for (Index i = 0; i < S; ++i) {
            const float distance = table[k * K + codes[i]];
            row[i] = distance > 0.0f ? row[i] / distance : 0.0f;
            sums[i] += row[i];
        }
    }
    multiply(S, D, K, {gathered, 1, S}, {vectors, D, 1}, scratch(w), [&](Index i, Index j, const float* v, Index n) {
        const float* code_vector = vectors + codes[i] * D + j;
        float* o = out + i * out_row + j;
        for (Index c = 0; c < n; ++c) o[c] += code_vector[c] * sums[i] - v[c];
    });
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
