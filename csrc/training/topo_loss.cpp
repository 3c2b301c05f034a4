// Topographic loss: correlations of pairwise distances; called by kernels/topo_loss.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "codebook_layout.hpp"
#include "checks.hpp"
#include "operations.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

namespace {

// Row stride of the distances: S rounded up to a multiple of the tile width of every instruction set.
Index padded_columns(Index S) { return divide_up(S, 32) * 32; }

// Points together with the memory of their packed form.
struct PointStorage {
    std::vector<Index> first_column, dims;
    Points points;

    PointStorage(const float* p, Index S, std::vector<Index> sizes, AlignedFloats& memory) : dims(std::move(sizes)) {
        Index column = 0;
        for (const Index d : dims) {
            first_column.push_back(column);
            column += d;
        }
        const Index padded = padded_columns(S), groups = static_cast<Index>(dims.size());
        float* panels = memory.reserve(padded * (column + groups));
        points = {p, S, column, groups, first_column.data(), dims.data(), panels, panels + padded * column, padded};
    }
};

// Moments over the pairs i < j of the distances d_x, d_z, d_e.
struct Moments {
    double mean[3], variance[3], cov_xz, cov_ze;
};

// The distances are [S, row_stride], valid above the diagonal.
Moments moments_of(const float* const d[3], Index S, Index row_stride, int threads) {
    const Kernels& k = kernels();
    Moments m{};
    const double pairs = std::max(1.0, 0.5 * static_cast<double>(S) * static_cast<double>(S - 1));
    // Sums of the rows are added in order, whatever the number of threads.
    std::vector<std::array<double, 5>> sums(static_cast<std::size_t>(S));
    const auto for_rows = [&](const auto& reduce) {
        parallel_for(divide_up(S, kPairBlock), threads, [&](Index task) {
            for (Index i = task * kPairBlock; i < std::min(S, (task + 1) * kPairBlock); ++i) {
                const float* const row[3] = {d[0] + i * row_stride, d[1] + i * row_stride, d[2] + i * row_stride};
                reduce(row, i, sums[static_cast<std::size_t>(i)].data());
            }
        });
    };
    for_rows([&](const float* const* row, Index i, double* out) { k.row_sums(row, i + 1, S, out); });
    for (const auto& row : sums)
        for (std::size_t c = 0; c < 3; ++c) m.mean[c] += row[c] / pairs;
    for_rows([&](const float* const* row, Index i, double* out) { k.row_moments(row, i + 1, S, m.mean, out); });
    for (const auto& row : sums) {
        for (std::size_t c = 0; c < 3; ++c) m.variance[c] += row[c] / pairs;
        m.cov_xz += row[3] / pairs;
        m.cov_ze += row[4] / pairs;
    }
    return m;
}

// Whether the variance of float32 distances exceeds the rounding error of values near their mean.
bool exceeds_rounding(double mean, double variance) {
    const double relative_rounding = 16.0 * std::numeric_limits<float>::epsilon() * mean;
    return variance >
           std::max(relative_rounding * relative_rounding, static_cast<double>(std::numeric_limits<float>::min()));
}

// Throws std::out_of_range unless all of codes [G, S] index their codebook.
void check_code_indices(const std::int32_t* codes, Index S, const std::vector<Index>& num_codes) {
    check_sizes(S, num_codes);
    for (std::size_t g = 0; g < num_codes.size(); ++g)
        for (const std::int32_t* code = codes + static_cast<Index>(g) * S; code < codes + static_cast<Index>(g + 1) * S;
             ++code)
            if (*code < 0 || *code >= num_codes[g])
                throw std::out_of_range("topographic_correlations: a code outside its codebook");
}

// Rows [first, last) of d_e: distances of code vectors, averaged over the codebooks, for columns after the diagonal.
void code_distance_rows(const std::int32_t* codes, const float* tables, const std::vector<CodebookSlice>& slices,
                        Index S, Index row_stride, Index first, Index last, float* d_e) {
    const Index G = static_cast<Index>(slices.size());
    for (Index r = first; r < last; ++r) {
        float* out = d_e + r * row_stride;
        std::fill(out, out + row_stride, 0.0f);
        for (Index g = 0; g < G; ++g) {
            const CodebookSlice& slice = slices[static_cast<std::size_t>(g)];
            const std::int32_t* row_codes = codes + g * S;
            kernels().add_code_distances(tables + slice.first_table + row_codes[r] * slice.num_codes, slice.num_codes,
                                         row_codes, r + 1, S, out);
        }
        for (Index j = r + 1; j < S; ++j) out[j] /= static_cast<float>(G);
    }
}

// Correlations from the moments, and the factors of `topo_forward`.
std::tuple<double, double, std::vector<double>> correlations(const Moments& m, bool pre_defined, bool post_defined) {
    const double sx = std::sqrt(m.variance[0]), sz = std::sqrt(m.variance[1]), se = std::sqrt(m.variance[2]);
    const double pre = pre_defined ? m.cov_xz / (sx * sz) : 0.0, post = post_defined ? m.cov_ze / (sz * se) : 0.0;
    // dr/db_ij = (a_ij / (s_a s_b) - r b_ij / s_b^2) / pairs for centered a, b with standard deviations s.
    std::vector<double> factors(9, 0.0);
    if (pre_defined) {
        factors[0] = 1.0 / (sx * sz);
        factors[1] = -pre / (sz * sz);
    }
    if (post_defined) {
        factors[2] = 1.0 / (sz * se);
        factors[3] = -post / (sz * sz);
        factors[4] = 1.0 / (sz * se);
        factors[5] = -post / (se * se);
    }
    std::copy(m.mean, m.mean + 3, factors.begin() + 6);
    return {pre, post, factors};
}

}  // namespace

// pre = corr(d_x, d_z) and post = corr(d_z, d_e) over the pairs i < j, where d_x, d_z, d_e are distances of features,
// latents (mean over codebooks) and code vectors (mean over codebooks). A correlation is 0 if a variance is within
// rounding or, for post, if a code is missing. Also returns nine factors for the backward pass: six coefficients of the
// centered distances in the gradients (see below), then the three means. Writes `distances` [3, S, row_stride] and
// `tables` [sum K^2].
std::tuple<double, double, std::vector<double>> topo_forward(Address x, Index F, Address z, Address codes,
                                                             Address codebook, Index S,
                                                             const std::vector<Index>& num_codes,
                                                             const std::vector<Index>& dims, Address distances,
                                                             Address tables, bool missing, int threads) {
    check_code_indices(pointer<const std::int32_t>(codes), S, num_codes);
    const Kernels& k = kernels();
    const std::vector<CodebookSlice> slices = codebook_slices(num_codes, dims);
    const Index G = static_cast<Index>(dims.size()), row_stride = padded_columns(S);
    thread_local AlignedFloats feature_memory, latent_memory;
    const PointStorage features(pointer<const float>(x), S, {F}, feature_memory);
    const PointStorage latents(pointer<const float>(z), S, dims, latent_memory);
    float* d[3];
    for (int i = 0; i < 3; ++i) d[i] = pointer<float>(distances) + i * S * row_stride;
    parallel_for(2 * G + 1, threads, [&](Index i) {
        if (i == 2 * G) {
            k.pack_points(features.points, 0);
        } else if (i % 2 == 0) {
            k.pack_points(latents.points, i / 2);
        } else {
            const CodebookSlice& slice = slices[static_cast<std::size_t>(i / 2)];
            k.code_distance_table(pointer<const float>(codebook) + slice.first_entry, slice.num_codes, slice.dims,
                                  pointer<float>(tables) + slice.first_table);
        }
    });
    const Workspaces workspaces(0, 0);
    parallel_for(3 * divide_up(S, k.rows), threads, [&](Index task) {
        const Index first = task / 3 * k.rows;
        if (task % 3 == 0)
            k.mean_distances(latents.points, first, d[1], row_stride, workspaces.for_this_thread());
        else if (task % 3 == 1)
            k.mean_distances(features.points, first, d[0], row_stride, workspaces.for_this_thread());
        else
            code_distance_rows(pointer<const std::int32_t>(codes), pointer<const float>(tables), slices, S, row_stride,
                               first, std::min(S, first + k.rows), d[2]);
    });
    const Moments m = moments_of(d, S, row_stride, threads);
    const float* norms = latents.points.norms;
    const bool finite = std::all_of(norms, norms + G * row_stride, [](float norm) { return std::isfinite(norm); });
    bool varies[3];
    for (int i = 0; i < 3; ++i) varies[i] = exceeds_rounding(m.mean[i], m.variance[i]);
    return correlations(m, finite && varies[0] && varies[1], finite && !missing && varies[1] && varies[2]);
}

// grad_z = d(grad_pre pre + grad_post post) / dz; the gradient with respect to the codes passes straight through to z.
void topo_backward(double grad_pre, double grad_post, const std::vector<double>& factors, Address z, Address codes,
                   Address codebook, Index S, const std::vector<Index>& num_codes, const std::vector<Index>& dims,
                   Address distances, Address tables, Address grad_z, int threads) {
    check_code_indices(pointer<const std::int32_t>(codes), S, num_codes);
    const Kernels& k = kernels();
    const std::vector<CodebookSlice> slices = codebook_slices(num_codes, dims);
    const Index G = static_cast<Index>(dims.size()), row_stride = padded_columns(S);
    thread_local AlignedFloats latent_memory, grad_dz_memory, grad_de_memory;
    const PointStorage latents(pointer<const float>(z), S, dims, latent_memory);
    // Mean over pairs and over codebooks.
    const double scale =
        2.0 / (std::max(1.0, static_cast<double>(S) * static_cast<double>(S - 1)) * static_cast<double>(G));
    CorrelationGradient weights{};
    for (int i = 0; i < 3; ++i) {
        weights.d[i] = pointer<const float>(distances) + i * S * row_stride;
        weights.mean[i] = factors[static_cast<std::size_t>(6 + i)];
    }
    weights.S = S, weights.row_stride = row_stride;
    weights.z_by_x = scale * grad_pre * factors[0];
    weights.z_by_z = scale * (grad_pre * factors[1] + grad_post * factors[3]);
    weights.z_by_e = scale * grad_post * factors[2];
    weights.e_by_z = scale * grad_post * factors[4];
    weights.e_by_e = scale * grad_post * factors[5];
    weights.grad_z = grad_dz_memory.reserve(S * row_stride), weights.grad_e = grad_de_memory.reserve(S * row_stride);
    const Index blocks = divide_up(S, kPairBlock);
    parallel_for(blocks + G, threads, [&](Index task) {
        if (task < blocks)
            k.correlation_gradient(weights, task * kPairBlock);
        else
            k.pack_points(latents.points, task - blocks);
    });
    Index buffer = 0, partial = 0;
    for (const CodebookSlice& slice : slices) {
        const Index K = slice.num_codes, D = slice.dims;
        buffer = std::max({buffer, k.distance_gradient_buffer_floats(S, row_stride, D),
                           k.code_distance_gradient_buffer_floats(S, K, D)});
        partial = std::max({partial, k.partial_floats(4 * k.rows, D, S), k.partial_floats(S, D, K)});
    }
    const Workspaces workspaces(partial, buffer);
    const bool with_codes = grad_post != 0.0 && factors[4] != 0.0;
    parallel_for(G, threads, [&](Index g) {
        const CodebookSlice& slice = slices[static_cast<std::size_t>(g)];
        float* out = pointer<float>(grad_z) + slice.first_column;
        k.distance_gradient(latents.points, g, weights.grad_z, row_stride, out, latents.points.row,
                            workspaces.for_this_thread());
        if (with_codes)
            k.code_distance_gradient(pointer<const float>(tables) + slice.first_table,
                                     pointer<const float>(codebook) + slice.first_entry, slice.num_codes, slice.dims,
                                     pointer<const std::int32_t>(codes) + g * S, S, weights.grad_e, row_stride, out,
                                     latents.points.row, workspaces.for_this_thread());
    });
}

}  // namespace spinlock_fast::training
