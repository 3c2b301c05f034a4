// Calls of every operation of `operations.hpp` with random inputs in memory of exactly their sizes.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "operations.hpp"

namespace spinlock_fast::testing {

using training::Index;
using Sizes = std::vector<Index>;

inline Index sum(const Sizes& sizes) {
    Index total = 0;
    for (const Index n : sizes) total += n;
    return total;
}

inline Index entries(const Sizes& num_codes, const Sizes& dims) {
    Index total = 0;
    for (std::size_t g = 0; g < dims.size(); ++g) total += num_codes[g] * dims[g];
    return total;
}

inline training::MatrixAddress matrix(const Floats& values, Index columns) { return {address(values), columns, 1}; }

// Codes of N rows: [N, G], or [G, N] if transposed.
template <class Code>
std::vector<Code> random_codes(Index N, const Sizes& num_codes, unsigned seed, bool transposed) {
    std::mt19937 random(seed);
    const auto G = static_cast<Index>(num_codes.size());
    std::vector<Code> out(static_cast<std::size_t>(N * G));
    for (Index i = 0; i < N; ++i)
        for (Index g = 0; g < G; ++g) {
            std::uniform_int_distribution<Index> code(0, num_codes[static_cast<std::size_t>(g)] - 1);
            out[static_cast<std::size_t>(transposed ? g * N + i : i * G + g)] = static_cast<Code>(code(random));
        }
    return out;
}

// The arrays that an operation wrote.
using Results = std::vector<Floats>;

// Sizes of the arguments of all operations.
struct Shape {
    Index rows, hidden, width, features;  // features: of decoded rows
    Sizes inputs, outputs;                // columns of each network's input and output
    Sizes num_codes, dims;                // of codebooks
    bool missing;                         // some rows have no code or are masked
    double dropout;
};

inline Results two_layers(const Shape& s, int threads, bool with_inputs, bool transposed) {
    const auto G = static_cast<Index>(s.inputs.size());
    const Index n = sum(s.inputs), B = s.rows, H = s.hidden, E = s.width;
    const Floats x = normal(B * n, 1), w1 = normal(n * H, 2), b1 = normal(G * H, 3), w2 = normal(G * H * E, 4);
    const Floats b2 = normal(G * E, 5), grad = normal(G * B * E, 6);
    const std::vector<std::uint64_t> seed{42};
    const training::MatrixAddress first = transposed ? training::MatrixAddress{address(w1), 1, n} : matrix(w1, H);
    const training::MatrixAddress second = transposed ? training::MatrixAddress{address(w2), 1, H} : matrix(w2, E);
    Floats hidden = unwritten(G * B * H), out = unwritten(G * B * E);
    training::mlp_forward(matrix(x, n), first, address(b1), second, H * E, address(b2), s.inputs, B, H, E, s.dropout,
                          address(seed), 3, B + 5, address(hidden), address(out), threads);
    Floats grad_hidden = unwritten(with_inputs ? G * B * H : 0), grad_x = unwritten(with_inputs ? B * n : 0);
    Floats grad_w1 = unwritten(n * H), grad_b1 = unwritten(G * H), grad_w2 = unwritten(G * H * E),
           grad_b2 = unwritten(G * E);
    const training::MatrixAddress grad_first =
        transposed && with_inputs ? training::MatrixAddress{address(grad_w1), 1, n} : matrix(grad_w1, H);
    training::mlp_backward(address(grad), matrix(x, n), first, second, H * E, address(hidden), s.inputs, B, H, E,
                           s.dropout, address(grad_hidden), address(grad_x), grad_first, address(grad_b1),
                           address(grad_w2), address(grad_b2), threads);
    return {hidden, out, grad_hidden, grad_x, grad_w1, grad_b1, grad_w2, grad_b2};
}

inline Results projections(const Shape& s, int threads) {
    const auto G = static_cast<Index>(s.outputs.size());
    const Index n = sum(s.outputs), B = s.rows, in = s.width;
    const Floats x = normal(G * B * in, 1), gain = normal(G * in, 2), shift = normal(G * in, 3);
    const Floats weight = normal(n * in, 4), bias = normal(n, 5), grad = normal(B * n, 6);
    const std::vector<std::uint64_t> seed{7};
    Floats scaled = unwritten(n * in), out = unwritten(B * n), grad_x = unwritten(G * B * in),
           grad_gain = unwritten(G * in);
    Floats grad_shift = unwritten(G * in), grad_weight = unwritten(n * in), grad_bias = unwritten(n);
    training::output_linear(address(x), address(gain), address(shift), address(weight), address(bias), s.outputs, B, in,
                            address(scaled), address(out), threads);
    training::output_linear_backward(address(grad), address(x), address(gain), address(shift), address(weight),
                                     address(scaled), s.outputs, B, in, address(grad_x), address(grad_gain),
                                     address(grad_shift), address(grad_weight), address(grad_bias), threads);
    Floats normalized = x, inv_std = unwritten(G * B), grad_normalized = unwritten(G * B * in);
    training::normalize(address(normalized), G * B, in, 1e-5, address(inv_std), threads);
    training::normalize_backward(address(x), address(normalized), address(inv_std), G * B, in, address(grad_normalized),
                                 threads);
    const Floats part_weight = normal(n, 8), part_bias = normal(n, 9);
    Floats parts = unwritten(B * n), part_inv_std = unwritten(B * G), part_out = unwritten(B * n);
    Floats grad_parts = unwritten(B * n), grad_part_weight = unwritten(n), grad_part_bias = unwritten(n);
    training::segment_layer_norm(address(out), B, s.outputs, address(part_weight), address(part_bias), 1e-5, s.dropout,
                                 address(seed), 3, address(parts), address(part_inv_std), address(part_out), threads);
    training::segment_layer_norm_backward(address(grad), address(parts), address(part_inv_std), B, s.outputs,
                                          address(part_weight), s.dropout, address(seed), 3,
                                          address(grad_parts), address(grad_part_weight), address(grad_part_bias),
                                          threads);
    return {out,          grad_x,     grad_gain,  grad_shift,       grad_weight,
            grad_bias,    normalized, inv_std,    grad_normalized,  parts,
            part_inv_std, part_out,   grad_parts, grad_part_weight, grad_part_bias};
}

inline Floats as_floats(const std::vector<std::int64_t>& codes) { return Floats(codes.begin(), codes.end()); }

// Mask of rows to assign: all but every third, if some are missing.
inline std::vector<std::uint8_t> mask_of(const Shape& s) {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(s.missing ? s.rows : 0), 1);
    for (std::size_t i = 0; i < mask.size(); i += 3) mask[i] = 0;
    return mask;
}

inline Results nearest(const Shape& s, int threads, bool centered, bool with_sums) {
    const auto G = static_cast<Index>(s.dims.size());
    const Index D = sum(s.dims), B = s.rows, row = D + 3;  // strided rows
    Floats z = normal(B * row, 1);
    const Floats codebook = normal(entries(s.num_codes, s.dims), 2), grad = normal(B * D, 3), grad_error = normal(G, 4);
    const std::vector<std::uint8_t> mask = mask_of(s);
    if (s.missing) z[static_cast<std::size_t>(row)] = std::numeric_limits<float>::infinity();
    std::vector<std::int64_t> codes(static_cast<std::size_t>(B * G), -7);
    Floats quantized = unwritten(B * D), error = unwritten(G), counts = unwritten(with_sums ? sum(s.num_codes) : 0);
    Floats sums = unwritten(with_sums ? entries(s.num_codes, s.dims) : 0);
    training::assign(address(z), row, B, address(codebook), address(mask), centered, s.num_codes, s.dims,
                     address(codes), address(quantized), address(error), address(counts), address(sums), threads);
    Floats grad_z = unwritten(B * D);
    const Floats packed = normal(B * D, 5);
    training::assign_backward(address(grad), address(grad_error), address(packed), address(quantized), address(codes),
                              B, s.dims, address(grad_z), threads);
    return {as_floats(codes), quantized, error, counts, sums, grad_z};
}

inline Results residual(const Shape& s, int threads, bool cosine, int gradient) {
    const auto Q = static_cast<Index>(s.num_codes.size());
    const Index D = s.width, B = s.rows, row = D + 2, K = sum(s.num_codes);
    Floats x = normal(B * row, 1);
    const Floats codebook = normal(K * D, 2), grad = normal(B * D, 3), grad_errors = normal(Q, 4);
    const std::vector<std::uint8_t> mask = mask_of(s);
    if (s.missing && B > 2) x[static_cast<std::size_t>(2 * row)] = std::numeric_limits<float>::quiet_NaN();
    std::vector<std::int64_t> codes(static_cast<std::size_t>(B * Q), -7);
    Floats quantized = unwritten(B * D), errors = unwritten(Q), counts = unwritten(K), sums = unwritten(K * D);
    training::residual_assign(address(x), row, B, D, address(codebook), s.num_codes, address(mask), cosine, gradient,
                              address(codes), address(quantized), address(errors), address(counts), address(sums),
                              threads);
    Floats grad_x = unwritten(B * D);
    training::residual_backward(address(grad), address(grad_errors), address(x), row, B, D, address(codebook),
                                s.num_codes, address(mask), address(codes), cosine, gradient, address(grad_x), threads);
    return {as_floats(codes), quantized, errors, counts, sums, grad_x};
}

// A training step of one codebook: the copies for the backward pass, and the update of the averages.
inline Results quantize_step(const Shape& s, int threads, bool cosine) {
    const Index D = s.width, B = s.rows, K = s.num_codes.front();
    Floats x = normal(B * D, 1), codebook = normal(K * D, 2), code_sum = codebook;
    const Floats grad = normal(B * D, 3), grad_loss = normal(1, 4);
    Floats cluster_size(static_cast<std::size_t>(K), 1.0f), quantized = unwritten(B * D), loss = unwritten(1);
    std::vector<std::int64_t> codes(static_cast<std::size_t>(B), -7), saved_codes = codes;
    std::vector<std::int64_t> usage(static_cast<std::size_t>(K), 0);
    Floats saved_codebook = unwritten(K * D), grad_x = unwritten(B * D);
    training::quantize_step(address(x), B, D, address(codebook), K, cosine, 2, 0.5, address(codes), address(quantized),
                            address(loss), address(saved_codebook), address(saved_codes), 0, 0, address(cluster_size),
                            address(code_sum), address(usage), 0.2, 1e-5, threads);
    training::quantize_step_backward(address(grad), address(grad_loss), address(x), B, D, address(saved_codebook), K,
                                     address(saved_codes), cosine, 2, 0.5, address(grad_x), threads);
    return {as_floats(codes), quantized, loss, codebook, cluster_size, code_sum, as_floats(usage), grad_x};
}

inline Results decoders(const Shape& s, int threads, bool with_rows) {
    const auto G = static_cast<Index>(s.dims.size());
    const Index B = s.rows, F = s.features, H = s.hidden, D = sum(s.dims), K = sum(s.num_codes);
    const Floats x = normal(B * F, 1), mean = normal(F, 2), codebook = normal(entries(s.num_codes, s.dims), 3);
    const Floats w1 = normal(D * H, 4), b1 = normal(G * H, 5), w2 = normal(G * H * F, 6), b2 = normal(G * F, 7);
    auto codes = random_codes<std::int64_t>(B, s.num_codes, 8, false);
    if (s.missing) codes.front() = -1;
    Floats hidden = unwritten(K * H), decoded = unwritten(K * F), error_sums = unwritten(K * F);
    const double loss = training::decoders_forward(
        address(x), address(mean), address(codes), address(codebook), address(w1), address(b1), address(w2),
        address(b2), s.num_codes, s.dims, B, F, H, address(hidden), address(decoded), address(error_sums), threads);
    Floats grad_quantized = unwritten(with_rows ? B * D : 0), grad_w1 = unwritten(D * H), grad_b1 = unwritten(G * H);
    Floats grad_w2 = unwritten(G * H * F), grad_b2 = unwritten(G * F);
    training::decoders_backward(0.5, address(x), address(codes), address(codebook), address(w1), address(w2),
                                s.num_codes, s.dims, B, F, H, address(hidden), address(decoded), address(error_sums),
                                address(grad_quantized), address(grad_w1), address(grad_b1), address(grad_w2),
                                address(grad_b2), threads);
    return {{static_cast<float>(loss)}, grad_quantized, grad_w1, grad_b1, grad_w2, grad_b2};
}

inline Results code_network(const Shape& s, int threads) {
    const Index B = s.rows, E = s.features, H = s.hidden, D = sum(s.dims), K = sum(s.num_codes);
    const Floats codebook = normal(entries(s.num_codes, s.dims), 1), w1 = normal(D * H, 2), b1 = normal(H, 3);
    const Floats w2 = normal(H * E, 4), b2 = normal(E, 5), grad = normal(B * E, 6);
    auto codes = random_codes<std::int64_t>(B, s.num_codes, 7, false);
    if (s.missing) codes.front() = -1;
    const std::uint64_t seed = 8;
    const training::MatrixAddress first{address(w1), 1, D}, second{address(w2), 1, H};
    Floats tables = unwritten(K * H), hidden = unwritten(B * H), out = unwritten(B * E);
    training::code_mlp_forward(address(codes), address(codebook), first, address(b1), second, address(b2), s.num_codes,
                               s.dims, B, H, E, s.dropout, reinterpret_cast<training::Address>(&seed), address(tables),
                               address(hidden), address(out), threads);
    Floats grad_hidden = unwritten(B * H), sums = unwritten(K * H), grad_quantized = unwritten(B * D);
    Floats grad_w1 = unwritten(H * D), grad_b1 = unwritten(H), grad_w2 = unwritten(H * E), grad_b2 = unwritten(E);
    training::code_mlp_backward(address(grad), address(codes), address(codebook), first, second, address(hidden),
                                s.num_codes, s.dims, B, H, E, s.dropout, address(grad_hidden), address(sums),
                                address(grad_quantized), address(grad_w1), address(grad_b1), address(grad_w2),
                                address(grad_b2), threads);
    const double cosine = training::code_cosines(address(codebook), s.num_codes, s.dims, threads);
    return {hidden, out, grad_quantized, grad_w1, grad_b1, grad_w2, grad_b2, {static_cast<float>(cosine)}};
}

inline Results joint_search(const Shape& s, int threads, bool with_cost, bool with_linear = false) {
    const Index B = s.rows, R = (s.hidden + 15) / 16 * 16, K = sum(s.num_codes), columns = training::kHeadComponents;
    const Index linear_units = with_linear ? (s.features + 15) / 16 * 16 : 0, H = R + linear_units;
    const Index tail_columns = 16;
    const Floats tables = normal(K * H, 1), head = normal(R * columns, 2), tail = normal(R * tail_columns, 3);
    const Floats cost = normal(with_cost ? B * K : 0, 4), tolerance(static_cast<std::size_t>(B), 1e-3f);
    const Floats linear_head = normal(K * columns, 8), linear_gradient = normal(K * R, 9), w2 = normal(R * linear_units, 10);
    Floats sums = normal(B * H, 5), gradient = normal(B * H, 6), filter, gram;
    const auto dot = [](const float* a, const float* b, Index n) {
        float total = 0.0f;
        for (Index j = 0; j < n; ++j) total += a[j] * b[j];
        return total;
    };
    for (float& value : gradient) value *= 50.0f;  // so that some codes change
    for (Index b = 0; b < B; ++b)
        std::fill_n(sums.begin() + b * H + R, linear_units, 0.0f);
    for (Index h = 0; h < R; ++h) {
        for (Index j = 0; j < training::kFilterComponents; ++j)
            filter.push_back(head[static_cast<std::size_t>(h * columns + j)]);
        for (Index other = 0; other < R; ++other)
            gram.push_back(dot(head.data() + h * columns, head.data() + other * columns, columns) +
                           dot(tail.data() + h * tail_columns, tail.data() + other * tail_columns, tail_columns));
        gram.insert(gram.end(), w2.begin() + h * linear_units, w2.begin() + (h + 1) * linear_units);
    }
    auto codes = random_codes<std::int64_t>(B, s.num_codes, 7, false);
    training::joint_search(address(codes), address(sums), address(gradient), address(tolerance), address(cost),
                           address(tables), address(filter), address(head), address(tail), address(gram),
                           address(linear_head), address(linear_gradient), s.num_codes, B, H, linear_units,
                           tail_columns, 2, threads);
    return {as_floats(codes), sums, gradient};
}

inline Results topographic(const Shape& s, int threads) {
    const Index S = s.rows, F = s.features, D = sum(s.dims), row_stride = (S + 31) / 32 * 32;
    const Floats x = normal(S * F, 1), z = normal(S * D, 2), codebook = normal(entries(s.num_codes, s.dims), 3);
    const auto codes = random_codes<std::int32_t>(S, s.num_codes, 4, true);
    Index squares = 0;
    for (const Index K : s.num_codes) squares += K * K;
    Floats distances = unwritten(3 * S * row_stride), tables = unwritten(squares), grad_z = unwritten(S * D);
    const auto [pre, post, factors] =
        training::topo_forward(address(x), F, address(z), address(codes), address(codebook), S, s.num_codes, s.dims,
                               address(distances), address(tables), false, threads);
    training::topo_backward(0.3, 0.7, factors, address(z), address(codes), address(codebook), S, s.num_codes, s.dims,
                            address(distances), address(tables), address(grad_z), threads);
    return {{static_cast<float>(pre), static_cast<float>(post)}, tables, grad_z};
}

}  // namespace spinlock_fast::testing
