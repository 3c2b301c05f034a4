// Distances of all pairs of points, their moments, and the pull of points on each other: see kernels/topo_loss.
#pragma once

#include "products_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::Points;

// As kernels/topo_loss/reference.py: the rounding error of |a|^2 + |b|^2 - 2 a.b, relative to |a|^2 + |b|^2.
inline float rounding(Index dims) { return (8.0f + __builtin_sqrtf(static_cast<float>(dims))) * 1.1920929e-7f; }

// The panels of one group of points, transposed, and its squared norms; columns beyond S are points at the origin.
void pack_points(const Points& z, Index g) {
    Index before = 0;
    for (Index i = 0; i < g; ++i) before += z.dims[i];
    const Index D = z.dims[g];
    const float* p = z.p + z.first[g];
    float* panels = z.panels + before * z.padded_columns;
    for (Index n = 0; n < z.padded_columns; n += kColumns) {
        const Index width = z.S - n < kColumns ? (z.S > n ? z.S - n : 0) : kColumns;
        pack_panel({p + n * z.row, 1, z.row}, D, width, kColumns, panels + n * D);
    }
    float* norms = z.norms + g * z.padded_columns;
    for (Index j = 0; j < z.padded_columns; ++j) norms[j] = j < z.S ? dot(p + j * z.row, p + j * z.row, D) : 0.0f;
}

// The tile of products of points [m, m + kRows) with those of one panel.
inline void point_products(const Points& z, Index g, Index m, const float* panel, const Workspace& w, float* tile) {
    const float* p = z.p + m * z.row + z.first[g];
    if (m + kRows <= z.S) {
        multiply_tile<false, kVectors>(p, z.row, z.dims[g], panel, tile);
    } else {
        pack_rows({p, z.row, 1}, z.S - m, z.dims[g], w.rows);
        multiply_tile<true, kVectors>(w.rows, kRows, z.dims[g], panel, tile);
    }
}

// Squared distances, 0 where rounding is all there is.
inline Vector squares(Vector products, Vector norms, float norm, float least) {
    const Vector both = norms + norm, square = both - 2.0f * products;
    return square > least * both ? square : Vector{};
}

void distances(const Points& z, Index m, float* out, Index out_row, const Workspace& w) {
    alignas(64) float tile[kRows * kColumns];
    const Index rows = z.S - m < kRows ? z.S - m : kRows;
    const float share = 1.0f / static_cast<float>(z.groups);
    for (Index n = m / kColumns * kColumns; n < z.padded_columns; n += kColumns) {
        Vector sum[kRows][kVectors] = {};
        const float* panels = z.panels;
        for (Index g = 0; g < z.groups; ++g) {
            const Index D = z.dims[g];
            point_products(z, g, m, panels + n * D, w, tile);
            panels += D * z.padded_columns;
            const float* norms = z.norms + g * z.padded_columns;
            const float least = rounding(D);
            for (Index r = 0; r < rows; ++r)
                for (int v = 0; v < kVectors; ++v)
                    sum[r][v] += root_of_square(squares(load(tile + r * kColumns + v * kLanes),
                                                        load(norms + n + v * kLanes), norms[m + r], least));
        }
        for (Index r = 0; r < rows; ++r)
            for (int v = 0; v < kVectors; ++v) keep(out + (m + r) * out_row + n + v * kLanes, sum[r][v] * share);
    }
}

// Sums over the pairs (i, j), j > i, of one row of the distances d_x, d_z, d_e.
void row_sums(const float* const d[3], Index first, Index last, double* sums) {
    for (int which = 0; which < 3; ++which) sums[which] = static_cast<double>(sum_of(d[which] + first, last - first));
}

// Squares of the deviations from the means, and products of those of d_x with d_z and of d_z with d_e.
void row_moments(const float* const d[3], Index first, Index last, const double* means, double* sums) {
    const float mean[3] = {static_cast<float>(means[0]), static_cast<float>(means[1]), static_cast<float>(means[2])};
    const Index n = last - first, whole = n / kLanes * kLanes;
    Vector sum[5] = {};
    float rest[5] = {};
    for (Index i = 0; i < whole; i += kLanes) {
        const Vector x = load(d[0] + first + i) - mean[0], z = load(d[1] + first + i) - mean[1];
        const Vector e = load(d[2] + first + i) - mean[2];
        sum[0] += x * x, sum[1] += z * z, sum[2] += e * e, sum[3] += x * z, sum[4] += z * e;
    }
    for (Index i = first + whole; i < last; ++i) {
        const float x = d[0][i] - mean[0], z = d[1][i] - mean[1], e = d[2][i] - mean[2];
        rest[0] += x * x, rest[1] += z * z, rest[2] += e * e, rest[3] += x * z, rest[4] += z * e;
    }
    for (int i = 0; i < 5; ++i) sums[i] = static_cast<double>(total(sum[i]) + rest[i]);
}

// Weights of the pairs of rows [m, m + kBlock) in the pull of latents (above the diagonal) and of codes (both ways).
void pair_weights(const training::PairWeights& p, Index m) {
    constexpr Index kBlock = training::kPairBlock;
    const Index m1 = m + kBlock < p.S ? m + kBlock : p.S;
    for (Index i = m; i < m1; ++i) {
        for (Index j = 0; j <= i; ++j) p.of_z[i * p.wide + j] = 0.0f;
        for (Index j = p.S; j < p.wide; ++j) p.of_z[i * p.wide + j] = 0.0f;
        p.of_e[i * p.wide + i] = 0.0f;
    }
    for (Index n = m; n < p.S; n += kBlock) {
        const Index n1 = n + kBlock < p.S ? n + kBlock : p.S;
        for (Index i = m; i < m1; ++i) {
            const Index first = n > i ? n : i + 1;
            // In double: an error of a mean would add up over all pairs of a row.
            for (Index j = first; j < n1; ++j) {
                const double x = p.d[0][i * p.wide + j] - p.mean[0], z = p.d[1][i * p.wide + j] - p.mean[1];
                const double e = p.d[2][i * p.wide + j] - p.mean[2];
                p.of_z[i * p.wide + j] = static_cast<float>(p.z_by_x * x + p.z_by_z * z + p.z_by_e * e);
                p.of_e[i * p.wide + j] = static_cast<float>(p.e_by_z * z + p.e_by_e * e);
            }
            for (Index j = first; j < n1; ++j) p.of_e[j * p.wide + i] = p.of_e[i * p.wide + j];
        }
    }
}

constexpr Index kPullRows = 4 * kRows;

Index pull_buffer_floats(Index S, Index padded_columns, Index dims) {
    return (kPullRows + 1) * padded_columns + (2 * S + 2 * kRows) * whole_vectors(dims);
}

// Rows [m, m + here) of weight_ij / d_ij for columns from n0 on, and their sums, added to those of rows and of columns.
inline void pull_weights(const Points& z, Index g, Index m, Index n0, const float* panels, const float* weight,
                         Index weight_row, float* pulls, float* sums, const Workspace& w) {
    alignas(64) float tile[kRows * kColumns];
    const Index D = z.dims[g], here = z.S - m < kRows ? z.S - m : kRows;
    const float* norms = z.norms + g * z.padded_columns;
    const float least = rounding(D);
    Vector row_sums[kRows] = {};
    for (Index n = n0; n < z.padded_columns; n += kColumns) {
        point_products(z, g, m, panels + n * D, w, tile);
        for (int v = 0; v < kVectors; ++v) {
            const Index c = n + v * kLanes;
            Vector column = load(sums + c);
            for (Index r = 0; r < here; ++r) {
                const Vector square =
                    squares(load(tile + r * kColumns + v * kLanes), load(norms + c), norms[m + r], least);
                const Vector one = square > Vector{} ? load(weight + (m + r) * weight_row + c) * inverse_root(square)
                                                     : Vector{};
                keep(pulls + r * z.padded_columns + c, one);
                row_sums[r] += one;
                column += one;
            }
            keep(sums + c, column);
        }
    }
    for (Index r = 0; r < here; ++r) sums[m + r] += total(row_sums[r]);
}

// out[r] += sum over k of a[r, k] b[k] for kRows rows of `width` columns, whole vectors; b lies in panels of depth S.
template <bool kTurned>
inline void add_pulls(const float* a, Index row, Index first, Index depth, const float* b, Index S, Index width,
                      float* out) {
    alignas(64) float tile[kRows * kColumns];
    for (Index c = 0; c < width; c += kColumns) {
        const Index wide = width - c < kColumns ? kLanes : kColumns;
        const float* panel = b + c * S + first * wide;
        if (wide == kLanes)
            multiply_tile<kTurned, 1>(a, row, depth, panel, tile);
        else
            multiply_tile<kTurned, kVectors>(a, row, depth, panel, tile);
        for (Index r = 0; r < kRows; ++r)
            for (Index v = 0; v < wide; v += kLanes) {
                float* here = out + r * width + c + v;
                keep(here, load(here) + load(tile + r * wide + v));
            }
    }
}

void pull(const Points& z, Index g, const float* weight, Index weight_row, float* out, Index out_row, const Workspace& w) {
    const Index S = z.S, D = z.dims[g], wide = z.padded_columns, width = whole_vectors(D);
    Index before = 0;
    for (Index i = 0; i < g; ++i) before += z.dims[i];
    const float *panels = z.panels + before * wide, *points = z.p + z.first[g];
    float* pulls = w.buffer;                     // [kPullRows, wide]
    float* sums = pulls + kPullRows * wide;      // [wide] of a row and of a column
    float* rows_of_points = sums + wide;         // panels of [S, kColumns]
    float* others = rows_of_points + S * width;  // [S and two tiles, width] sum over j of pull_ij z_j
    std::memset(sums, 0, static_cast<std::size_t>(wide) * sizeof(float));
    std::memset(others, 0, static_cast<std::size_t>((S + 2 * kRows) * width) * sizeof(float));
    for (Index c = 0; c < width; c += kColumns) {
        const Index padded = width - c < kColumns ? kLanes : kColumns, few = D - c < padded ? D - c : padded;
        pack_panel({points + c, z.row, 1}, S, few, padded, rows_of_points + c * S);
    }
    for (Index m0 = 0; m0 < S; m0 += kPullRows) {
        const Index last = S - m0 < kPullRows ? S : m0 + kPullRows, n0 = m0 / kColumns * kColumns;
        for (Index m = m0; m < last; m += kRows) {
            float* tile_rows = pulls + (m - m0) * wide;
            const Index n = m / kColumns * kColumns;
            for (Index r = 0; r < kRows; ++r)
                std::memset(tile_rows + r * wide + n0, 0, static_cast<std::size_t>(n - n0) * sizeof(float));
            pull_weights(z, g, m, n, panels, weight, weight_row, tile_rows, sums, w);
            add_pulls<false>(tile_rows + n, wide, n, S - n, rows_of_points, S, width, others + m * width);
        }
        // The weight is 0 on and below the diagonal: each pair is met once, and pulls both ways.
        for (Index j = n0; j < S; j += kRows)
            add_pulls<true>(pulls + j, wide, m0, last - m0, rows_of_points, S, width, others + j * width);
    }
    for (Index i = 0; i < S; ++i)
        for (Index d = 0; d < D; ++d) out[i * out_row + d] = points[i * z.row + d] * sums[i] - others[i * width + d];
}

void code_distances(const float* codes, Index K, Index D, float* table) {
    for (Index a = 0; a < K; ++a)
        for (Index b = 0; b < K; ++b) {
            float square = 0.0f;
            for (Index d = 0; d < D; ++d) {
                const float difference = codes[a * D + d] - codes[b * D + d];
                square += difference * difference;
            }
            table[a * K + b] = __builtin_sqrtf(square);
        }
}

void add_lookup(const float* table_row, Index K, const std::int32_t* codes, Index first, Index last, float* out) {
#if defined(__AVX512F__)
    if (K <= 32) {  // the row fits into two registers: one permutation looks up sixteen entries
        const auto part = [&](Index from) {
            const Index n = K - from < 0 ? 0 : K - from > 16 ? 16 : K - from;
            return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), table_row + from);
        };
        const __m512 low = part(0), high = K > 16 ? part(16) : _mm512_setzero_ps();
        for (; first + kLanes <= last; first += kLanes) {
            const __m512i index = _mm512_loadu_si512(codes + first);
            const __m512 found = _mm512_permutex2var_ps(low, index, high);
            _mm512_storeu_ps(out + first, _mm512_add_ps(_mm512_loadu_ps(out + first), found));
        }
    }
#else
    (void)K;
#endif
    for (Index j = first; j < last; ++j) out[j] += table_row[codes[j]];
}

Index pull_codes_buffer_floats(Index S, Index K, Index) { return K * S + S; }

void pull_codes(const float* table, const float* vectors, Index K, Index D, const std::int32_t* codes, Index S,
                const float* weight, Index weight_row, float* out, Index out_row, const Workspace& w) {
    float* gathered = w.buffer;      // [K, S] weight of a row with all rows of a code
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
        const float* own = vectors + codes[i] * D + j;
        float* o = out + i * out_row + j;
        for (Index c = 0; c < n; ++c) o[c] += own[c] * sums[i] - v[c];
    });
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
