// Correlations of distances: what kernels/topo_loss/native.py calls.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "books.hpp"
#include "checks.hpp"
#include "entries.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

namespace {

constexpr Index kWidth = 32;  // a multiple of every instruction set's columns

Index padded(Index n, Index to) { return (n + to - 1) / to * to; }

// Points with the memory that their distances need.
struct OwnedPoints {
    std::vector<Index> first, dims;
    Floats& memory;
    Points points;

    OwnedPoints(const float* p, Index S, Index row, std::vector<Index> sizes, Floats& space)
        : dims(std::move(sizes)), memory(space) {
        Index column = 0;
        for (const Index d : dims) {
            first.push_back(column);
            column += d;
        }
        const Index wide = padded(S, kWidth), groups = static_cast<Index>(dims.size());
        float* panels = memory.reserve(wide * (column + groups));
        points = {p, S, row, groups, first.data(), dims.data(), panels, panels + wide * column, wide};
    }
};

// Sums over the pairs i < j.
struct Moments {
    double mean[3], square[3], pre, post;
};

// d_x, d_z, d_e are [S, wide], above the diagonal.
Moments moments_of(const float* const d[3], Index S, Index wide) {
    const Kernels& k = kernels();
    Moments m{};
    const double pairs = std::max(1.0, 0.5 * static_cast<double>(S) * static_cast<double>(S - 1));
    for (Index i = 0; i < S; ++i) {
        const float* const row[3] = {d[0] + i * wide, d[1] + i * wide, d[2] + i * wide};
        double sums[3];
        k.row_sums(row, i + 1, S, sums);
        for (int which = 0; which < 3; ++which) m.mean[which] += sums[which] / pairs;
    }
    for (Index i = 0; i < S; ++i) {
        const float* const row[3] = {d[0] + i * wide, d[1] + i * wide, d[2] + i * wide};
        double sums[5];
        k.row_moments(row, i + 1, S, m.mean, sums);
        for (int which = 0; which < 3; ++which) m.square[which] += sums[which] / pairs;
        m.pre += sums[3] / pairs;
        m.post += sums[4] / pairs;
    }
    return m;
}

// Whether a variance of float32 distances is more than the rounding of values about their mean.
bool varies(double mean, double variance) {
    const double rounding = 16.0 * std::numeric_limits<float>::epsilon() * mean;
    return variance > std::max(rounding * rounding, static_cast<double>(std::numeric_limits<float>::min()));
}

// Codes [G, S], which look up a table each.
void check_lookups(const std::int32_t* codes, Index S, const std::vector<Index>& num_codes) {
    check_sizes(S, num_codes);
    for (std::size_t g = 0; g < num_codes.size(); ++g)
        for (const std::int32_t* code = codes + static_cast<Index>(g) * S; code < codes + static_cast<Index>(g + 1) * S; ++code)
            if (*code < 0 || *code >= num_codes[g]) throw std::out_of_range("topographic_correlations: a code outside its codebook");
}

}  // namespace

// Returns the correlations and, for the backward pass, the factors of d_x - mean, d_z - mean, d_e - mean in the
// gradients of both correlations by d_z and by d_e, and the means. `distances` [3, S, wide] is written.
std::tuple<double, double, std::vector<double>> topo_forward(std::uintptr_t x, Index F, std::uintptr_t z,
                                                             std::uintptr_t codes, std::uintptr_t codebook, Index S,
                                                             const std::vector<Index>& num_codes,
                                                             const std::vector<Index>& dims, std::uintptr_t distances,
                                                             std::uintptr_t tables, bool missing, int threads) {
    check_lookups(at<const std::int32_t>(codes), S, num_codes);
    const Kernels& k = kernels();
    const Index G = static_cast<Index>(dims.size()), wide = padded(S, kWidth);
    Index total = 0;
    for (const Index d : dims) total += d;
    thread_local Floats feature_memory, latent_memory;
    const OwnedPoints features(at<const float>(x), S, F, {F}, feature_memory);
    const OwnedPoints latents(at<const float>(z), S, total, dims, latent_memory);
    float* d[3];
    for (int i = 0; i < 3; ++i) d[i] = at<float>(distances) + i * S * wide;
    const std::vector<Book> books = books_of(num_codes, dims);
    std::vector<Index> first_entry(books.size());
    for (std::size_t g = 1; g < books.size(); ++g)
        first_entry[g] = first_entry[g - 1] + num_codes[g - 1] * num_codes[g - 1];
    parallel_for(2 * G + 1, threads, [&](Index i) {
        if (i == 2 * G) {
            k.pack_points(features.points, 0);
        } else if (i % 2 == 0) {
            k.pack_points(latents.points, i / 2);
        } else {
            const Book& b = books[static_cast<std::size_t>(i / 2)];
            k.code_distances(at<const float>(codebook) + b.first_entry, b.codes, b.dims,
                             at<float>(tables) + first_entry[static_cast<std::size_t>(i / 2)]);
        }
    });
    const Workspaces spaces(0, 0);
    const Index blocks = (S + k.rows - 1) / k.rows;
    parallel_for(2 * blocks + blocks, threads, [&](Index task) {
        const Index i = task / 3, first = i * k.rows;
        if (task % 3 == 0) {
            k.distances(latents.points, first, d[1], wide, spaces.here());
        } else if (task % 3 == 1) {
            k.distances(features.points, first, d[0], wide, spaces.here());
        } else {
            const auto* all = at<const std::int32_t>(codes);  // [G, S]
            for (Index r = first; r < std::min(S, first + k.rows); ++r) {
                float* out = d[2] + r * wide;
                std::fill(out, out + wide, 0.0f);
                for (Index g = 0; g < G; ++g) {
                    const auto& b = books[static_cast<std::size_t>(g)];
                    const float* table = at<const float>(tables) + first_entry[static_cast<std::size_t>(g)];
                    k.add_lookup(table + all[g * S + r] * b.codes, b.codes, all + g * S, r + 1, S, out);
                }
                for (Index j = r + 1; j < S; ++j) out[j] /= static_cast<float>(G);
            }
        }
    });
    const Moments m = moments_of(d, S, wide);
    const float* norms = latents.points.norms;
    const bool finite = std::all_of(norms, norms + G * wide, [](float norm) { return std::isfinite(norm); });
    const bool pre_counts = finite && varies(m.mean[0], m.square[0]) && varies(m.mean[1], m.square[1]);
    const bool post_counts = finite && !missing && varies(m.mean[1], m.square[1]) && varies(m.mean[2], m.square[2]);
    const double sx = std::sqrt(m.square[0]), sz = std::sqrt(m.square[1]), se = std::sqrt(m.square[2]);
    const double pre = pre_counts ? m.pre / (sx * sz) : 0.0, post = post_counts ? m.post / (sz * se) : 0.0;
    // dr/db_ij = (a_ij / (s_a s_b) - r b_ij / s_b^2) / pairs for centred a, b.
    std::vector<double> factors(9, 0.0);
    if (pre_counts) {
        factors[0] = 1.0 / (sx * sz);
        factors[1] = -pre / (sz * sz);
    }
    if (post_counts) {
        factors[2] = 1.0 / (sz * se);
        factors[3] = -post / (sz * sz);
        factors[4] = 1.0 / (sz * se);
        factors[5] = -post / (se * se);
    }
    std::copy(m.mean, m.mean + 3, factors.begin() + 6);
    return {pre, post, factors};
}

void topo_backward(double of_pre, double of_post, const std::vector<double>& factors, std::uintptr_t z,
                   std::uintptr_t codes, std::uintptr_t codebook, Index S, const std::vector<Index>& num_codes,
                   const std::vector<Index>& dims, std::uintptr_t distances, std::uintptr_t tables, std::uintptr_t of_z,
                   int threads) {
    check_lookups(at<const std::int32_t>(codes), S, num_codes);
    const Kernels& k = kernels();
    const Index G = static_cast<Index>(dims.size()), wide = padded(S, kWidth);
    Index total = 0;
    for (const Index d : dims) total += d;
    thread_local Floats latent_memory, of_dz, of_de;
    const OwnedPoints latents(at<const float>(z), S, total, dims, latent_memory);
    const float* d[3];
    for (int i = 0; i < 3; ++i) d[i] = at<const float>(distances) + i * S * wide;
    // Each pair once; the mean over codebooks.
    const double share = 2.0 / (std::max(1.0, static_cast<double>(S) * static_cast<double>(S - 1)) * static_cast<double>(G));
    PairWeights weights{};
    for (int i = 0; i < 3; ++i) weights.d[i] = d[i], weights.mean[i] = factors[static_cast<std::size_t>(6 + i)];
    weights.S = S, weights.wide = wide;
    weights.z_by_x = share * of_pre * factors[0];
    weights.z_by_z = share * (of_pre * factors[1] + of_post * factors[3]);
    weights.z_by_e = share * of_post * factors[2];
    weights.e_by_z = share * of_post * factors[4];
    weights.e_by_e = share * of_post * factors[5];
    weights.of_z = of_dz.reserve(S * wide), weights.of_e = of_de.reserve(S * wide);
    const Index blocks = (S + kPairBlock - 1) / kPairBlock;
    parallel_for(blocks + G, threads, [&](Index task) {
        if (task < blocks)
            k.pair_weights(weights, task * kPairBlock);
        else
            k.pack_points(latents.points, task - blocks);
    });
    const std::vector<Book> books = books_of(num_codes, dims);
    Index buffer = 0, partial = 0;
    std::vector<Index> first_entry(books.size());
    for (std::size_t g = 0; g < books.size(); ++g) {
        if (g) first_entry[g] = first_entry[g - 1] + num_codes[g - 1] * num_codes[g - 1];
        buffer = std::max({buffer, k.pull_buffer_floats(S, wide, dims[g]), k.pull_codes_buffer_floats(S, num_codes[g], dims[g])});
        partial = std::max({partial, k.partial_floats(4 * k.rows, dims[g], S), k.partial_floats(S, dims[g], num_codes[g])});
    }
    const Workspaces spaces(partial, buffer);
    const bool with_codes = of_post != 0.0 && factors[4] != 0.0;
    parallel_for(G, threads, [&](Index g) {
        const Book& b = books[static_cast<std::size_t>(g)];
        float* out = at<float>(of_z) + b.first_column;
        k.pull(latents.points, g, weights.of_z, wide, out, total, spaces.here());
        if (with_codes)
            k.pull_codes(at<const float>(tables) + first_entry[static_cast<std::size_t>(g)],
                         at<const float>(codebook) + b.first_entry, b.codes, b.dims, at<const std::int32_t>(codes) + g * S,
                         S, weights.of_e, wide, out, total, spaces.here());
    });
}

}  // namespace spinlock_fast::training
