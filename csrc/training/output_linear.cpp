// Linear projections of the groups to their codebooks; called by kernels/latent_projection.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.hpp"
#include "operations.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "parallel_products.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

namespace {

// First column of every group, and the number of all columns.
std::vector<Index> first_columns(const std::vector<Index>& sizes) {
    std::vector<Index> first{0};
    for (const Index n : sizes) first.push_back(first.back() + n);
    return first;
}

}  // namespace

// out[:, group g] = (x_g gain_g + shift_g) W_g^T + bias for x [G, B, in], gain and shift [G, in], W [sum n, in], out
// [B, sum n]. Gain and shift are folded into the weights: `scaled` [sum n, in] receives W gain.
void output_linear(Address x, Address gain, Address shift, Address weight, Address bias,
                   const std::vector<Index>& sizes, Index B, Index in, Address scaled, Address out, int threads) {
    check_sizes(B, sizes);
    std::vector<Product> products;
    const Index total = total_size(sizes), groups = static_cast<Index>(sizes.size());
    const std::vector<Index> first = first_columns(sizes);
    std::vector<float> offset(static_cast<std::size_t>(total));
    parallel_for(groups, threads, [&](Index g) {
        const float *factors = pointer<const float>(gain) + g * in, *shifts = pointer<const float>(shift) + g * in;
        for (Index c = first[static_cast<std::size_t>(g)]; c < first[static_cast<std::size_t>(g) + 1]; ++c)
            offset[static_cast<std::size_t>(c)] =
                pointer<const float>(bias)[c] + kernels().fold_scale(pointer<const float>(weight) + c * in, factors,
                                                                     shifts, in, pointer<float>(scaled) + c * in);
    });
    Index column = 0;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        const float *x_g = pointer<const float>(x) + g * B * in, *w_g = pointer<const float>(scaled) + column * in;
        Product p{B, n, in, row_major(x_g, in), transposed(w_g, in), pointer<float>(out) + column, total};
        p.bias = offset.data() + column;
        products.push_back(p);
        column += n;
    }
    run_products(products, threads);
}

void output_linear_backward(Address grad, Address x, Address gain, Address shift, Address weight, Address scaled,
                            const std::vector<Index>& sizes, Index B, Index in, Address grad_x, Address grad_gain,
                            Address grad_shift, Address grad_weight, Address grad_bias, int threads) {
    check_sizes(B, sizes);
    std::vector<Product> products;
    const Index total = total_size(sizes);
    Index column = 0;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        const float *x_g = pointer<const float>(x) + g * B * in, *w_g = pointer<const float>(scaled) + column * in;
        const float* grad_g = pointer<const float>(grad) + column;
        float *grad_x_g = pointer<float>(grad_x) + g * B * in, *grad_w_g = pointer<float>(grad_weight) + column * in;
        products.push_back({B, in, n, row_major(grad_g, total), row_major(w_g, in), grad_x_g, in});
        products.push_back({n, in, B, transposed(grad_g, total), row_major(x_g, in), grad_w_g, in});
        column += n;
    }
    run_products(products, threads);
    kernels().column_sums(pointer<const float>(grad), B, total, total, pointer<float>(grad_bias));
    const std::vector<Index> first = first_columns(sizes);
    parallel_for(static_cast<Index>(sizes.size()), threads, [&](Index g) {
        const float *factors = pointer<const float>(gain) + g * in, *shifts = pointer<const float>(shift) + g * in;
        float *gain_sums = pointer<float>(grad_gain) + g * in, *shift_sums = pointer<float>(grad_shift) + g * in;
        std::fill(gain_sums, gain_sums + in, 0.0f);
        std::fill(shift_sums, shift_sums + in, 0.0f);
        for (Index c = first[static_cast<std::size_t>(g)]; c < first[static_cast<std::size_t>(g) + 1]; ++c)
            kernels().fold_scale_backward(pointer<const float>(weight) + c * in, factors, shifts,
                                          pointer<const float>(grad_bias)[c], in, pointer<float>(grad_weight) + c * in,
                                          gain_sums, shift_sums);
    });
}

}  // namespace spinlock_fast::training
