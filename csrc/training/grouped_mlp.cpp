// Two-layer networks of all groups: y = dropout(relu(x W1 + b1)) W2 + b2; called by kernels/grouped_mlp.
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

// Sets hidden [G, B, H] and out [G, B, E] for rows first_row .. first_row + B of a batch of batch_rows rows, for which
// dropout draws random numbers.
void mlp_forward(const MatrixAddress& x, const MatrixAddress& w1, Address b1, const MatrixAddress& w2, Index w2_group,
                 Address b2, const std::vector<Index>& sizes, Index B, Index H, Index E, double rate, Address seed,
                 Index first_row, Index batch_rows, Address hidden, Address out, int threads) {
    check_sizes(B, sizes);
    check_sizes(H, {E});
    check_sizes(first_row, {batch_rows - first_row - B});
    const Dropout dropout = make_dropout(rate, seed, first_row);
    std::vector<Product> first, second;
    Index column = 0;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        float* hidden_g = pointer<float>(hidden) + g * B * H;
        Product p{B, H, n, block(operand(x), 0, column), block(operand(w1), column, 0), hidden_g, H};
        p.bias = pointer<const float>(b1) + g * H;
        p.relu = true;
        p.dropout = dropout;
        p.first_row = g * batch_rows;
        first.push_back(p);
        Operand weight = operand(w2);
        weight.p += g * w2_group;
        Product q{B, E, H, row_major(hidden_g, H), weight, pointer<float>(out) + g * B * E, E};
        q.alpha = dropout_scale(rate);
        q.sparse = true;
        q.bias = pointer<const float>(b2) + g * E;
        second.push_back(q);
        column += n;
    }
    run_products(first, threads);
    run_products(second, threads);
}

namespace {

// Inputs and activations of the networks of all groups.
struct Networks {
    Operand x, w1, w2;
    Index w2_group;
    const float* hidden;  // [G, B, H]
    const std::vector<Index>& sizes;
    Index B, H, E;
    float scale;

    Index groups() const { return static_cast<Index>(sizes.size()); }
    const float* hidden_group(Index g) const { return hidden + g * B * H; }
    Operand w2_transposed(Index g) const { return {w2.p + g * w2_group, w2.column, w2.row}; }
};

// Output gradients (read) and input and parameter gradients (written).
struct Gradients {
    const float* grad_out;  // [G, B, E]
    float *grad_hidden, *grad_x, *grad_w1;
    Index w1_row, w1_column;
    float *grad_b1, *grad_w2, *grad_b2;
};

// Gradients of the parameters of the second layers: dW2 = scale h^T dy, db2 = column sums of dy.
std::vector<Product> second_layer_products(const Networks& n, const Gradients& grads) {
    std::vector<Product> products;
    for (Index g = 0; g < n.groups(); ++g) {
        const Operand dy{grads.grad_out + g * n.B * n.E, n.E, 1};
        Product p{n.H, n.E, n.B, {n.hidden_group(g), 1, n.H}, dy, grads.grad_w2 + g * n.H * n.E, n.E};
        p.alpha = n.scale;
        p.sparse = true;
        p.column_sums = grads.grad_b2 + g * n.E;
        products.push_back(p);
    }
    return products;
}

// Gradients of inputs and parameters; stores the gradients of all hidden values.
void backward_to_inputs(const Networks& n, const Gradients& grads, int threads) {
    std::vector<Product> hidden_products, products = second_layer_products(n, grads);
    const Index total = total_size(n.sizes);
    Index column = 0;
    for (Index g = 0; g < n.groups(); ++g) {
        const Index size = n.sizes[static_cast<std::size_t>(g)];
        const Operand inputs = block(n.x, 0, column), back = block(n.w1, column, 0);
        const Operand dy{grads.grad_out + g * n.B * n.E, n.E, 1}, dh{grads.grad_hidden + g * n.B * n.H, n.H, 1};
        Product p{n.B, n.H, n.E, dy, n.w2_transposed(g), grads.grad_hidden + g * n.B * n.H, n.H};
        p.alpha = n.scale;
        p.relu_output = n.hidden_group(g);
        hidden_products.push_back(p);
        float* weights = grads.grad_w1 + column * grads.w1_row;
        Product weight_grad{size, n.H, n.B, {inputs.p, inputs.column, inputs.row}, dh, weights, grads.w1_row};
        if (grads.w1_column != 1) {  // compute the transpose: zeros of dh can be skipped
            weight_grad = {n.H, size, n.B, {dh.p, 1, n.H}, inputs, weights, grads.w1_column};
            weight_grad.sparse = true;
        }
        products.push_back(weight_grad);
        Product input_grad{n.B, size, n.H, dh, {back.p, back.column, back.row}, grads.grad_x + column, total};
        input_grad.sparse = true;
        products.push_back(input_grad);
        column += size;
    }
    run_products(hidden_products, threads);
    run_products(products, threads);
    for (Index g = 0; g < n.groups(); ++g)
        kernels().column_sums(grads.grad_hidden + g * n.B * n.H, n.B, n.H, n.H, grads.grad_b1 + g * n.H);
}

// Gradients of the parameters only; gradients of hidden values are computed for a block of rows at a time.
void backward_to_parameters(const Networks& n, const Gradients& grads, int threads) {
    const Kernels& k = kernels();
    constexpr Index kRows = 256;  // per task, for any number of threads: the order of the sums stays the same
    const Index parts = std::max<Index>((n.B + kRows - 1) / kRows, 1);
    std::vector<FirstLayerGradientTask> first_layer_tasks;
    Index column = 0, rows_of_sums = n.groups(), partial = 0, buffer = 0;
    for (const Index size : n.sizes) rows_of_sums += size;
    thread_local AlignedFloats memory;
    float* sums = memory.reserve(rows_of_sums * parts * n.H);  // [size + 1, H] per group and part
    for (Index g = 0; g < n.groups(); ++g) {
        const Index size = n.sizes[static_cast<std::size_t>(g)];
        for (Index part = 0; part < parts; ++part) {
            const Index first = part * kRows, rows = std::max<Index>(std::min(kRows, n.B - first), 0);
            float* out = sums + ((column + g) * parts + part * (size + 1)) * n.H;
            first_layer_tasks.push_back({rows, size, n.H, n.E, block(n.x, first, column),
                                         grads.grad_out + (g * n.B + first) * n.E, n.w2_transposed(g),
                                         n.hidden_group(g) + first * n.H, n.scale, out});
            partial = std::max({partial, k.partial_floats(rows, n.H, n.E), k.partial_floats(size + 1, n.H, rows)});
            buffer = std::max(buffer, k.first_layer_gradient_buffer_floats(rows, n.H));
        }
        column += size;
    }
    const std::vector<Product> pieces = split_rows(second_layer_products(n, grads), threads);
    const Workspaces workspaces = workspaces_for(pieces, partial, buffer);
    const auto count = static_cast<Index>(first_layer_tasks.size());
    parallel_for(count + static_cast<Index>(pieces.size()), threads, [&](Index i) {
        if (i < count)
            k.first_layer_gradient(first_layer_tasks[static_cast<std::size_t>(i)], workspaces.for_this_thread());
        else
            k.product(pieces[static_cast<std::size_t>(i - count)], workspaces.for_this_thread());
    });
    column = 0;
    for (Index g = 0; g < n.groups(); ++g) {
        const Index size = n.sizes[static_cast<std::size_t>(g)];
        for (Index f = 0; f <= size; ++f) {
            const float* first = sums + ((column + g) * parts + f) * n.H;
            float* out = f < size ? grads.grad_w1 + (column + f) * grads.w1_row : grads.grad_b1 + g * n.H;
            std::copy(first, first + n.H, out);
            for (Index part = 1; part < parts; ++part)
                for (Index c = 0; c < n.H; ++c) out[c] += first[part * (size + 1) * n.H + c];
        }
        column += size;
    }
}

}  // namespace

// grad_hidden and grad_x are null if the inputs need no gradient. grad_w1 is row-major, or optionally column-major if
// grad_x is given.
void mlp_backward(Address grad, const MatrixAddress& x, const MatrixAddress& w1, const MatrixAddress& w2,
                  Index w2_group, Address hidden, const std::vector<Index>& sizes, Index B, Index H, Index E,
                  double rate, Address grad_hidden, Address grad_x, const MatrixAddress& grad_w1, Address grad_b1,
                  Address grad_w2, Address grad_b2, int threads) {
    check_sizes(B, sizes);
    check_sizes(H, {E});
    const Networks networks{operand(x), operand(w1), operand(w2), w2_group, pointer<const float>(hidden),
                            sizes,      B,           H,           E,        dropout_scale(rate)};
    const auto [weights, w1_row, w1_column] = grad_w1;
    const Gradients grads{pointer<const float>(grad),
                          pointer<float>(grad_hidden),
                          pointer<float>(grad_x),
                          pointer<float>(weights),
                          w1_row,
                          w1_column,
                          pointer<float>(grad_b1),
                          pointer<float>(grad_w2),
                          pointer<float>(grad_b2)};
    if (grad_x)
        backward_to_inputs(networks, grads, threads);
    else
        backward_to_parameters(networks, grads, threads);
}

}  // namespace spinlock_fast::training
