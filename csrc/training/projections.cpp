// Projections from categories to codebooks, and normalisation: what kernels/grouped_mlp/native.py calls.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.hpp"
#include "entries.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "products.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

// (x gain + shift) W^T + bias for x [G, B, in], gain and shift [G, in], W [sum n, in], to columns of out [B, sum n]:
// gain and shift go into the weights. `scaled` [sum n, in] is what is left of them.
void output_linear(std::uintptr_t x, std::uintptr_t gain, std::uintptr_t shift, std::uintptr_t weight,
                   std::uintptr_t bias, const std::vector<Index>& sizes, Index B, Index in, std::uintptr_t scaled,
                   std::uintptr_t out, int threads) {
    check_sizes(B, sizes);
    std::vector<Product> products;
    Index column = 0, total = 0;
    for (const Index n : sizes) total += n;
    std::vector<float> offset(static_cast<std::size_t>(total));
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const float *factors = at<const float>(gain) + g * in, *shifts = at<const float>(shift) + g * in;
        for (const Index end = column + sizes[static_cast<std::size_t>(g)]; column < end; ++column) {
            const float* row = at<const float>(weight) + column * in;
            float* result = at<float>(scaled) + column * in;
            float sum = 0.0f;
            for (Index i = 0; i < in; ++i) {
                result[i] = row[i] * factors[i];
                sum += row[i] * shifts[i];
            }
            offset[static_cast<std::size_t>(column)] = at<const float>(bias)[column] + sum;
        }
    }
    column = 0;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        Product p{B, n, in, {at<const float>(x) + g * B * in, in, 1}, {at<const float>(scaled) + column * in, 1, in},
                  at<float>(out) + column, total};
        p.bias = offset.data() + column;
        products.push_back(p);
        column += n;
    }
    run(products, threads);
}

void output_linear_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t gain, std::uintptr_t shift,
                            std::uintptr_t weight, std::uintptr_t scaled, const std::vector<Index>& sizes, Index B,
                            Index in, std::uintptr_t of_x, std::uintptr_t of_gain, std::uintptr_t of_shift,
                            std::uintptr_t of_weight, std::uintptr_t of_bias, int threads) {
    check_sizes(B, sizes);
    std::vector<Product> products;
    Index column = 0, total = 0;
    for (const Index n : sizes) total += n;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        const float* part = at<const float>(grad) + column;
        products.push_back({B, in, n, {part, total, 1}, {at<const float>(scaled) + column * in, in, 1},
                            at<float>(of_x) + g * B * in, in});
        products.push_back({n, in, B, {part, 1, total}, {at<const float>(x) + g * B * in, in, 1},
                            at<float>(of_weight) + column * in, in});
        column += n;
    }
    run(products, threads);
    kernels().column_sums(at<const float>(grad), B, total, total, at<float>(of_bias));
    column = 0;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const float *factors = at<const float>(gain) + g * in, *shifts = at<const float>(shift) + g * in;
        float *gains = at<float>(of_gain) + g * in, *of_shifts = at<float>(of_shift) + g * in;
        std::fill(gains, gains + in, 0.0f);
        std::fill(of_shifts, of_shifts + in, 0.0f);
        for (const Index end = column + sizes[static_cast<std::size_t>(g)]; column < end; ++column) {
            const float *row = at<const float>(weight) + column * in, offset = at<const float>(of_bias)[column];
            float* result = at<float>(of_weight) + column * in;  // still by the scaled weights
            for (Index i = 0; i < in; ++i) {
                gains[i] += result[i] * row[i];
                of_shifts[i] += offset * row[i];
                result[i] = result[i] * factors[i] + offset * shifts[i];
            }
        }
    }
}

constexpr Index kRowsOfATask = 64;

void normalize(std::uintptr_t x, Index rows, Index n, double eps, std::uintptr_t deviation, int threads) {
    check_sizes(rows, {n});
    parallel_for((rows + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index i) {
        const Index first = i * kRowsOfATask;
        kernels().normalize(at<float>(x) + first * n, std::min(kRowsOfATask, rows - first), n, static_cast<float>(eps),
                            at<float>(deviation) + first);
    });
}

void normalize_backward(std::uintptr_t grad, std::uintptr_t normed, std::uintptr_t deviation, Index rows, Index n,
                        std::uintptr_t of_x, int threads) {
    check_sizes(rows, {n});
    parallel_for((rows + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index i) {
        const Index first = i * kRowsOfATask;
        kernels().normalize_backward(at<const float>(grad) + first * n, at<const float>(normed) + first * n,
                                     at<const float>(deviation) + first, std::min(kRowsOfATask, rows - first), n,
                                     at<float>(of_x) + first * n);
    });
}

void segments(std::uintptr_t x, Index B, const std::vector<Index>& sizes, std::uintptr_t weight, std::uintptr_t bias,
              double eps, double rate, std::uintptr_t seed, std::uintptr_t normed, std::uintptr_t deviation,
              std::uintptr_t out, int threads) {
    check_sizes(B, sizes);
    Index total = 0;
    for (const Index n : sizes) total += n;
    const Dropout dropout = dropout_of(rate, seed);
    const float scale = dropout_scale(rate);
    parallel_for((B + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index i) {
        kernels().segments(at<const float>(x), i * kRowsOfATask, std::min(B, (i + 1) * kRowsOfATask), total,
                           static_cast<Index>(sizes.size()), sizes.data(), at<const float>(weight),
                           at<const float>(bias), static_cast<float>(eps), dropout, scale, at<float>(normed),
                           at<float>(deviation), at<float>(out));
    });
}

void segments_backward(std::uintptr_t grad, std::uintptr_t normed, std::uintptr_t deviation, Index B,
                       const std::vector<Index>& sizes, std::uintptr_t weight, double rate, std::uintptr_t seed,
                       std::uintptr_t of_x, std::uintptr_t of_weight, std::uintptr_t of_bias, int threads) {
    check_sizes(B, sizes);
    Index total = 0;
    for (const Index n : sizes) total += n;
    const Dropout dropout = dropout_of(rate, seed);
    const float scale = dropout_scale(rate);
    parallel_for((B + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index i) {
        kernels().segments_backward(at<const float>(grad), at<const float>(normed), at<const float>(deviation),
                                    i * kRowsOfATask, std::min(B, (i + 1) * kRowsOfATask), total,
                                    static_cast<Index>(sizes.size()), sizes.data(), at<const float>(weight), dropout,
                                    scale, at<float>(of_x));
    });
    kernels().weighted_column_sums(at<const float>(grad), at<const float>(normed), B, total, at<float>(of_weight),
                                   at<float>(of_bias));
}

}  // namespace spinlock_fast::training
