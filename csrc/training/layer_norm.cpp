// Layer normalisation of the rows of a batch and of segments of its rows; called by kernels/latent_projection.
#include <algorithm>
#include <vector>

#include "checks.hpp"
#include "kernels.hpp"
#include "operations.hpp"
#include "parallel.hpp"
#include "parallel_products.hpp"

namespace spinlock_fast::training {

constexpr Index kRowsPerTask = 64;

// Normalises the rows of x [rows, n] in place; inv_std [rows] = 1 / sqrt(variance + eps).
void normalize(Address x, Index rows, Index n, double eps, Address inv_std, int threads) {
    check_sizes(rows, {n});
    parallel_for(divide_up(rows, kRowsPerTask), threads, [&](Index i) {
        const Index first = i * kRowsPerTask;
        kernels().normalize(pointer<float>(x) + first * n, std::min(kRowsPerTask, rows - first), n,
                            static_cast<float>(eps), pointer<float>(inv_std) + first);
    });
}

void normalize_backward(Address grad, Address normalized, Address inv_std, Index rows, Index n, Address grad_x,
                        int threads) {
    check_sizes(rows, {n});
    parallel_for(divide_up(rows, kRowsPerTask), threads, [&](Index i) {
        const Index first = i * kRowsPerTask;
        kernels().normalize_backward(pointer<const float>(grad) + first * n,
                                     pointer<const float>(normalized) + first * n,
                                     pointer<const float>(inv_std) + first, std::min(kRowsPerTask, rows - first), n,
                                     pointer<float>(grad_x) + first * n);
    });
}

// out = LayerNorm_segment(dropout(x)) * weight + bias for x [B, sum sizes], one segment of columns per group. Dropout
// draws random numbers by row of a larger batch, in which `first_row` is the number of row 0.
void segment_layer_norm(Address x, Index B, const std::vector<Index>& sizes, Address weight, Address bias, double eps,
                        double rate, Address seed, Index first_row, Address normalized, Address inv_std, Address out,
                        int threads) {
    check_sizes(B, sizes);
    check_sizes(first_row, {});
    const Index total = total_size(sizes);
    const Dropout dropout = make_dropout(rate, seed, first_row);
    const float scale = dropout_scale(rate);
    parallel_for(divide_up(B, kRowsPerTask), threads, [&](Index i) {
        kernels().segment_layer_norm(pointer<const float>(x), i * kRowsPerTask, std::min(B, (i + 1) * kRowsPerTask),
                                     total, static_cast<Index>(sizes.size()), sizes.data(),
                                     pointer<const float>(weight), pointer<const float>(bias), static_cast<float>(eps),
                                     dropout, scale, pointer<float>(normalized), pointer<float>(inv_std),
                                     pointer<float>(out));
    });
}

void segment_layer_norm_backward(Address grad, Address normalized, Address inv_std, Index B,
                                 const std::vector<Index>& sizes, Address weight, double rate, Address seed,
                                 Index first_row, Address grad_x, Address grad_weight, Address grad_bias,
                                 int threads) {
    check_sizes(B, sizes);
    check_sizes(first_row, {});
    const Index total = total_size(sizes);
    const Dropout dropout = make_dropout(rate, seed, first_row);
    const float scale = dropout_scale(rate);
    parallel_for(divide_up(B, kRowsPerTask), threads, [&](Index i) {
        kernels().segment_layer_norm_backward(
            pointer<const float>(grad), pointer<const float>(normalized), pointer<const float>(inv_std),
            i * kRowsPerTask, std::min(B, (i + 1) * kRowsPerTask), total, static_cast<Index>(sizes.size()),
            sizes.data(), pointer<const float>(weight), dropout, scale, pointer<float>(grad_x));
    });
    kernels().weighted_column_sums(pointer<const float>(grad), pointer<const float>(normalized), B, total,
                                   pointer<float>(grad_weight), pointer<float>(grad_bias));
}

}  // namespace spinlock_fast::training
