// Distances of all pairs of points: d_ij = sqrt(|z_i|^2 + |z_j|^2 - 2 z_i . z_j), averaged over groups of columns, and
// their moments over the pairs i < j. See kernels/topo_loss.
#pragma once

#include "product_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::Points;

// Bound of the rounding error of |a|^2 + |b|^2 - 2 a.b relative to |a|^2 + |b|^2; as in kernels/topo_loss/reference.py.
inline float relative_rounding(Index dims) {
    return (8.0f + __builtin_sqrtf(static_cast<float>(dims))) * 1.1920929e-7f;
}

// Transposes a group of points into panels and computes their squared norms; columns beyond S are zero.
void pack_points(const Points& z, Index g) {
    const Index D = z.dims[g];
    const float* p = z.p + z.first_column[g];
    float* panels = z.panels + z.first_column[g] * z.padded_columns;
    for (Index n = 0; n < z.padded_columns; n += kColumns) {
        const Index width = z.S - n < kColumns ? (z.S > n ? z.S - n : 0) : kColumns;
        pack_panel({p + n * z.row, 1, z.row}, D, width, kColumns, panels + n * D);
    }
    float* norms = z.norms + g * z.padded_columns;
    for (Index j = 0; j < z.padded_columns; ++j) norms[j] = j < z.S ? dot(p + j * z.row, p + j * z.row, D) : 0.0f;
}

// Tile of dot products of points [m, m + kRows) with the points of one panel.
inline void point_products(const Points& z, Index g, Index m, const float* panel, const Workspace& w, float* tile) {
    const float* p = z.p + m * z.row + z.first_column[g];
    if (m + kRows <= z.S) {
        multiply_tile<false, kVectors>(p, z.row, z.dims[g], panel, tile);
    } else {
        pack_rows({p, z.row, 1}, z.S - m, z.dims[g], w.rows);
        multiply_tile<true, kVectors>(w.rows, kRows, z.dims[g], panel, tile);
    }
}

// Squared distances, set to 0 below the rounding error.
inline Vector squared_distances(Vector products, Vector norms, float norm, float tolerance) {
    const Vector norm_sum = norms + norm, square = norm_sum - 2.0f * products;
    return square > tolerance * norm_sum ? square : Vector{};
}

// Distances of rows [m, m + kRows), averaged over the groups, for columns from about m on.
void mean_distances(const Points& z, Index m, float* out, Index out_row, const Workspace& w) {
    alignas(64) float tile[kRows * kColumns];
    const Index rows = z.S - m < kRows ? z.S - m : kRows;
    const float scale = 1.0f / static_cast<float>(z.groups);
    for (Index n = m / kColumns * kColumns; n < z.padded_columns; n += kColumns) {
        Vector sum[kRows][kVectors] = {};
        const float* panels = z.panels;
        for (Index g = 0; g < z.groups; ++g) {
            const Index D = z.dims[g];
            point_products(z, g, m, panels + n * D, w, tile);
            panels += D * z.padded_columns;
            const float* norms = z.norms + g * z.padded_columns;
            const float tolerance = relative_rounding(D);
            for (Index r = 0; r < rows; ++r)
                for (int v = 0; v < kVectors; ++v)
                    sum[r][v] += fast_sqrt(squared_distances(load(tile + r * kColumns + v * kLanes),
                                                             load(norms + n + v * kLanes), norms[m + r], tolerance));
        }
        for (Index r = 0; r < rows; ++r)
            for (int v = 0; v < kVectors; ++v) store(out + (m + r) * out_row + n + v * kLanes, sum[r][v] * scale);
    }
}

// Sums over j > i of row i of the distances d_x, d_z, d_e.
void row_sums(const float* const d[3], Index first, Index last, double* sums) {
    for (int i = 0; i < 3; ++i) sums[i] = static_cast<double>(reduce_sum(d[i] + first, last - first));
}

// Sums over j > i of row i of x^2, z^2, e^2, x z, z e, where x, z, e are the distances minus their means.
void row_moments(const float* const d[3], Index first, Index last, const double* means, double* sums) {
    const float mean[3] = {static_cast<float>(means[0]), static_cast<float>(means[1]), static_cast<float>(means[2])};
    const Index n = last - first, whole = n / kLanes * kLanes;
    Vector sum[5] = {};
    float tail[5] = {};
    for (Index i = 0; i < whole; i += kLanes) {
        const Vector x = load(d[0] + first + i) - mean[0], z = load(d[1] + first + i) - mean[1];
        const Vector e = load(d[2] + first + i) - mean[2];
        sum[0] += x * x, sum[1] += z * z, sum[2] += e * e, sum[3] += x * z, sum[4] += z * e;
    }
    for (Index i = first + whole; i < last; ++i) {
        const float x = d[0][i] - mean[0], z = d[1][i] - mean[1], e = d[2][i] - mean[2];
        tail[0] += x * x, tail[1] += z * z, tail[2] += e * e, tail[3] += x * z, tail[4] += z * e;
    }
    for (int i = 0; i < 5; ++i) sums[i] = static_cast<double>(horizontal_sum(sum[i]) + tail[i]);
}

// Gradients of the correlations with respect to d_z (stored above the diagonal) and d_e (stored symmetrically), for the
// pairs of rows [m, m + kPairBlock): grad_z = z_by_x x + z_by_z z + z_by_e e, grad_e = e_by_z z + e_by_e e, where x, z,
// e are the distances minus their means.
void correlation_gradient(const training::CorrelationGradient& p, Index m) {
    constexpr Index kBlock = training::kPairBlock;
    const Index m1 = m + kBlock < p.S ? m + kBlock : p.S;
    for (Index i = m; i < m1; ++i) {
        for (Index j = 0; j <= i; ++j) p.grad_z[i * p.row_stride + j] = 0.0f;
        for (Index j = p.S; j < p.row_stride; ++j) p.grad_z[i * p.row_stride + j] = 0.0f;
        p.grad_e[i * p.row_stride + i] = 0.0f;
    }
    for (Index n = m; n < p.S; n += kBlock) {
        const Index n1 = n + kBlock < p.S ? n + kBlock : p.S;
        for (Index i = m; i < m1; ++i) {
            const Index first = n > i ? n : i + 1;
            // In double: the rounding error of a mean would add up over all pairs of a row.
            for (Index j = first; j < n1; ++j) {
                const double x = p.d[0][i * p.row_stride + j] - p.mean[0], z = p.d[1][i * p.row_stride + j] - p.mean[1];
                const double e = p.d[2][i * p.row_stride + j] - p.mean[2];
                p.grad_z[i * p.row_stride + j] = static_cast<float>(p.z_by_x * x + p.z_by_z * z + p.z_by_e * e);
                p.grad_e[i * p.row_stride + j] = static_cast<float>(p.e_by_z * z + p.e_by_e * e);
            }
            for (Index j = first; j < n1; ++j) p.grad_e[j * p.row_stride + i] = p.grad_e[i * p.row_stride + j];
        }
    }
}

// table[a, b] = |e_a - e_b|, [K, K].
void code_distance_table(const float* codes, Index K, Index D, float* table) {
    for (Index a = 0; a < K; ++a) {
        table[a * K + a] = 0.0f;
        for (Index b = 0; b < a; ++b)
            table[a * K + b] = table[b * K + a] = __builtin_sqrtf(squared_distance(codes + a * D, codes + b * D, D));
    }
}

// out[j] += table_row[codes[j]] for j in [first, last).
void add_code_distances(const float* table_row, Index K, const std::int32_t* codes, Index first, Index last,
                        float* out) {
#if defined(__AVX512F__)
    if (K <= 32) {  // a row of the table fits two registers: one permutation looks up 16 elements
        const auto part = [&](Index from) {
            const Index n = K - from < 0 ? 0 : K - from > 16 ? 16 : K - from;
            return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), table_row + from);
        };
        const __m512 low = part(0), high = K > 16 ? part(16) : _mm512_setzero_ps();
        for (; first + kLanes <= last; first += kLanes) {
            const __m512i index = _mm512_loadu_si512(codes + first);
            const __m512 distances = _mm512_permutex2var_ps(low, index, high);
            _mm512_storeu_ps(out + first, _mm512_add_ps(_mm512_loadu_ps(out + first), distances));
        }
    }
#else
    (void)K;
#endif
    for (Index j = first; j < last; ++j) out[j] += table_row[codes[j]];
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
