// Networks of two layers, many at once: what kernels/grouped_mlp/native.py calls.
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

void mlp_forward(const PyOperand& x, const PyOperand& w1, std::uintptr_t b1, const PyOperand& w2, Index w2_group,
                 std::uintptr_t b2, const std::vector<Index>& sizes, Index B, Index H, Index E, double rate,
                 std::uintptr_t seed, std::uintptr_t hidden, std::uintptr_t out, int threads) {
    check_sizes(B, sizes);
    check_sizes(H, {E});
    const Dropout dropout = dropout_of(rate, seed);
    std::vector<Product> first, second;
    Index column = 0;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        Product p{B, H, n, block(operand(x), 0, column), block(operand(w1), column, 0),
                  at<float>(hidden) + g * B * H, H};
        p.bias = at<const float>(b1) + g * H;
        p.relu = true;
        p.dropout = dropout;
        p.first_row = g * B;
        first.push_back(p);
        Operand weight = operand(w2);
        weight.p += g * w2_group;
        Product q{B, E, H, {at<const float>(hidden) + g * B * H, H, 1}, weight, at<float>(out) + g * B * E, E};
        q.alpha = dropout_scale(rate);
        q.sparse = true;
        q.bias = at<const float>(b2) + g * E;
        second.push_back(q);
        column += n;
    }
    run(first, threads);
    run(second, threads);
}

namespace {

// The networks of all groups, as the forward pass left them.
struct Networks {
    Operand x, w1, w2;
    Index w2_group;
    const float* hidden;  // [G, B, H]
    const std::vector<Index>& sizes;
    Index B, H, E;
    float scale;

    Index groups() const { return static_cast<Index>(sizes.size()); }
    const float* hidden_of(Index g) const { return hidden + g * B * H; }
    Operand w2_turned(Index g) const { return {w2.p + g * w2_group, w2.column, w2.row}; }
};

// Where gradients are read and written.
struct Gradients {
    const float* of_out;  // [G, B, E]
    float *of_hidden, *of_x, *of_w1;
    Index w1_row, w1_column;
    float *of_b1, *of_w2, *of_b2;
};

// Gradients of the second layers' parameters.
std::vector<Product> second_layers(const Networks& n, const Gradients& to) {
    std::vector<Product> products;
    for (Index g = 0; g < n.groups(); ++g) {
        const Operand dy{to.of_out + g * n.B * n.E, n.E, 1};
        Product p{n.H, n.E, n.B, {n.hidden_of(g), 1, n.H}, dy, to.of_w2 + g * n.H * n.E, n.E};
        p.alpha = n.scale;
        p.sparse = true;
        p.column_sums = to.of_b2 + g * n.E;
        products.push_back(p);
    }
    return products;
}

// All gradients, that of the inputs among them: those of hidden values exist in memory.
void backward_to_inputs(const Networks& n, const Gradients& to, int threads) {
    std::vector<Product> to_hidden, rest = second_layers(n, to);
    Index column = 0, total = 0;
    for (const Index size : n.sizes) total += size;
    for (Index g = 0; g < n.groups(); ++g) {
        const Index size = n.sizes[static_cast<std::size_t>(g)];
        const Operand inputs = block(n.x, 0, column), back = block(n.w1, column, 0);
        const Operand dy{to.of_out + g * n.B * n.E, n.E, 1}, dh{to.of_hidden + g * n.B * n.H, n.H, 1};
        Product p{n.B, n.H, n.E, dy, n.w2_turned(g), to.of_hidden + g * n.B * n.H, n.H};
        p.alpha = n.scale;
        p.positive = n.hidden_of(g);
        to_hidden.push_back(p);
        float* weights = to.of_w1 + column * to.w1_row;
        Product of_weights{size, n.H, n.B, {inputs.p, inputs.column, inputs.row}, dh, weights, to.w1_row};
        if (to.w1_column != 1) {  // turned: then the zeros of dh can be left out
            of_weights = {n.H, size, n.B, {dh.p, 1, n.H}, inputs, weights, to.w1_column};
            of_weights.sparse = true;
        }
        rest.push_back(of_weights);
        Product of_inputs{n.B, size, n.H, dh, {back.p, back.column, back.row}, to.of_x + column, total};
        of_inputs.sparse = true;
        rest.push_back(of_inputs);
        column += size;
    }
    run(to_hidden, threads);
    run(rest, threads);
    for (Index g = 0; g < n.groups(); ++g)
        kernels().column_sums(to.of_hidden + g * n.B * n.H, n.B, n.H, n.H, to.of_b1 + g * n.H);
}

// Gradients of parameters alone: those of hidden values exist for some rows at a time.
void backward_to_parameters(const Networks& n, const Gradients& to, int threads) {
    const Kernels& k = kernels();
    constexpr Index kRows = 256;  // of a task, whatever the number of threads: the parts are added up in one order
    const Index parts = std::max<Index>((n.B + kRows - 1) / kRows, 1);
    std::vector<FirstLayerTask> firsts;
    Index column = 0, rows_of_sums = n.groups(), partial = 0, buffer = 0;
    for (const Index size : n.sizes) rows_of_sums += size;
    thread_local Floats memory;
    float* sums = memory.reserve(rows_of_sums * parts * n.H);  // per group and part [size + 1, H]
    for (Index g = 0; g < n.groups(); ++g) {
        const Index size = n.sizes[static_cast<std::size_t>(g)];
        for (Index part = 0; part < parts; ++part) {
            const Index first = part * kRows, rows = std::max<Index>(std::min(kRows, n.B - first), 0);
            float* out = sums + ((column + g) * parts + part * (size + 1)) * n.H;
            firsts.push_back({rows, size, n.H, n.E, block(n.x, first, column), to.of_out + (g * n.B + first) * n.E,
                              n.w2_turned(g), n.hidden_of(g) + first * n.H, n.scale, out});
            partial = std::max({partial, k.partial_floats(rows, n.H, n.E), k.partial_floats(size + 1, n.H, rows)});
            buffer = std::max(buffer, k.first_layer_buffer_floats(rows, n.H));
        }
        column += size;
    }
    const std::vector<Product> pieces = split(second_layers(n, to), threads);
    const Workspaces spaces = spaces_of(pieces, partial, buffer);
    const auto count = static_cast<Index>(firsts.size());
    parallel_for(count + static_cast<Index>(pieces.size()), threads, [&](Index i) {
        if (i < count)
            k.first_layer(firsts[static_cast<std::size_t>(i)], spaces.here());
        else
            k.product(pieces[static_cast<std::size_t>(i - count)], spaces.here());
    });
    column = 0;
    for (Index g = 0; g < n.groups(); ++g) {
        const Index size = n.sizes[static_cast<std::size_t>(g)];
        for (Index f = 0; f <= size; ++f) {
            const float* first = sums + ((column + g) * parts + f) * n.H;
            float* out = f < size ? to.of_w1 + (column + f) * to.w1_row : to.of_b1 + g * n.H;
            std::copy(first, first + n.H, out);
            for (Index part = 1; part < parts; ++part)
                for (Index c = 0; c < n.H; ++c) out[c] += first[part * (size + 1) * n.H + c];
        }
        column += size;
    }
}

}  // namespace

// `of_hidden` and `of_x` are 0 where the inputs need no gradient. of_w1 lies by rows, or, with `of_x`, by columns.
void mlp_backward(std::uintptr_t grad, const PyOperand& x, const PyOperand& w1, const PyOperand& w2, Index w2_group,
                  std::uintptr_t hidden, const std::vector<Index>& sizes, Index B, Index H, Index E, double rate,
                  std::uintptr_t of_hidden, std::uintptr_t of_x, const PyOperand& of_w1, std::uintptr_t of_b1,
                  std::uintptr_t of_w2, std::uintptr_t of_b2, int threads) {
    check_sizes(B, sizes);
    check_sizes(H, {E});
    const Networks networks{operand(x), operand(w1), operand(w2), w2_group, at<const float>(hidden), sizes, B, H, E,
                            dropout_scale(rate)};
    const auto [weights, w1_row, w1_column] = of_w1;
    const Gradients to{at<const float>(grad), at<float>(of_hidden), at<float>(of_x), at<float>(weights), w1_row,
                       w1_column, at<float>(of_b1), at<float>(of_w2), at<float>(of_b2)};
    if (of_x)
        backward_to_inputs(networks, to, threads);
    else
        backward_to_parameters(networks, to, threads);
}

}  // namespace spinlock_fast::training
