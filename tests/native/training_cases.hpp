// Inputs of every operation of `entries.hpp`, in memory of exactly their sizes, and the values that it writes.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "entries.hpp"

namespace spinlock_fast::testing {

using training::Index;
using Floats = std::vector<float>;
using Sizes = std::vector<Index>;

template <class T>
std::uintptr_t address(const std::vector<T>& values) {
    return values.empty() ? 0 : reinterpret_cast<std::uintptr_t>(values.data());
}

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

// Standard normal values, a share of them 0.
inline Floats normal(Index n, unsigned seed, double zeros = 0.0) {
    std::mt19937 random(seed);
    std::normal_distribution<float> value;
    std::bernoulli_distribution zero(zeros);
    Floats out(static_cast<std::size_t>(n));
    for (float& x : out) x = zero(random) ? 0.0f : value(random);
    return out;
}

// Memory for results: what no kernel writes stays NaN.
inline Floats unwritten(Index n) {
    return Floats(static_cast<std::size_t>(n), std::numeric_limits<float>::quiet_NaN());
}

inline training::PyOperand matrix(const Floats& values, Index columns) { return {address(values), columns, 1}; }

// Codes of N rows: [N, G], or [G, N] if turned.
template <class Code>
std::vector<Code> random_codes(Index N, const Sizes& num_codes, unsigned seed, bool turned) {
    std::mt19937 random(seed);
    const auto G = static_cast<Index>(num_codes.size());
    std::vector<Code> out(static_cast<std::size_t>(N * G));
    for (Index i = 0; i < N; ++i)
        for (Index g = 0; g < G; ++g) {
            std::uniform_int_distribution<Index> code(0, num_codes[static_cast<std::size_t>(g)] - 1);
            out[static_cast<std::size_t>(turned ? g * N + i : i * G + g)] = static_cast<Code>(code(random));
        }
    return out;
}

// What one run of an operation wrote, one array after the other.
using Results = std::vector<Floats>;

// Sizes of one run of all operations.
struct Shape {
    Index rows, hidden, width, features;  // of networks; features of the decoded rows
    Sizes inputs, outputs;                // columns of each network's input and output
    Sizes num_codes, dims;                // of codebooks
    bool missing;                         // some rows have no code, or are masked
    double dropout;
};

inline Results two_layers(const Shape& s, int threads, bool with_inputs, bool turned) {
    const auto G = static_cast<Index>(s.inputs.size());
    const Index n = sum(s.inputs), B = s.rows, H = s.hidden, E = s.width;
    const Floats x = normal(B * n, 1), w1 = normal(n * H, 2), b1 = normal(G * H, 3), w2 = normal(G * H * E, 4);
    const Floats b2 = normal(G * E, 5), grad = normal(G * B * E, 6);
    const std::vector<std::uint64_t> seed{42};
    const training::PyOperand first = turned ? training::PyOperand{address(w1), 1, n} : matrix(w1, H);
    const training::PyOperand second = turned ? training::PyOperand{address(w2), 1, H} : matrix(w2, E);
    Floats hidden = unwritten(G * B * H), out = unwritten(G * B * E);
    training::mlp_forward(matrix(x, n), first, address(b1), second, H * E, address(b2), s.inputs, B, H, E, s.dropout,
                          address(seed), address(hidden), address(out), threads);
    Floats of_hidden = unwritten(with_inputs ? G * B * H : 0), of_x = unwritten(with_inputs ? B * n : 0);
    Floats of_w1 = unwritten(n * H), of_b1 = unwritten(G * H), of_w2 = unwritten(G * H * E), of_b2 = unwritten(G * E);
    const training::PyOperand of_first =
        turned && with_inputs ? training::PyOperand{address(of_w1), 1, n} : matrix(of_w1, H);
    training::mlp_backward(address(grad), matrix(x, n), first, second, H * E, address(hidden), s.inputs, B, H, E,
                           s.dropout, address(of_hidden), address(of_x), of_first, address(of_b1), address(of_w2),
                           address(of_b2), threads);
    return {hidden, out, of_hidden, of_x, of_w1, of_b1, of_w2, of_b2};
}

inline Results projections(const Shape& s, int threads) {
    const auto G = static_cast<Index>(s.outputs.size());
    const Index n = sum(s.outputs), B = s.rows, in = s.width;
    const Floats x = normal(G * B * in, 1), gain = normal(G * in, 2), shift = normal(G * in, 3);
    const Floats weight = normal(n * in, 4), bias = normal(n, 5), grad = normal(B * n, 6);
    const std::vector<std::uint64_t> seed{7};
    Floats scaled = unwritten(n * in), out = unwritten(B * n), of_x = unwritten(G * B * in), of_gain = unwritten(G * in);
    Floats of_shift = unwritten(G * in), of_weight = unwritten(n * in), of_bias = unwritten(n);
    training::output_linear(address(x), address(gain), address(shift), address(weight), address(bias), s.outputs, B, in,
                            address(scaled), address(out), threads);
    training::output_linear_backward(address(grad), address(x), address(gain), address(shift), address(weight),
                                     address(scaled), s.outputs, B, in, address(of_x), address(of_gain),
                                     address(of_shift), address(of_weight), address(of_bias), threads);
    Floats normed = x, deviation = unwritten(G * B), of_normed = unwritten(G * B * in);
    training::normalize(address(normed), G * B, in, 1e-5, address(deviation), threads);
    training::normalize_backward(address(x), address(normed), address(deviation), G * B, in, address(of_normed), threads);
    const Floats part_weight = normal(n, 8), part_bias = normal(n, 9);
    Floats parts = unwritten(B * n), part_deviation = unwritten(B * G), part_out = unwritten(B * n);
    Floats of_parts = unwritten(B * n), of_part_weight = unwritten(n), of_part_bias = unwritten(n);
    training::segments(address(out), B, s.outputs, address(part_weight), address(part_bias), 1e-5, s.dropout,
                       address(seed), address(parts), address(part_deviation), address(part_out), threads);
    training::segments_backward(address(grad), address(parts), address(part_deviation), B, s.outputs,
                                address(part_weight), s.dropout, address(seed), address(of_parts),
                                address(of_part_weight), address(of_part_bias), threads);
    return {out,   of_x,           of_gain,  of_shift, of_weight,      of_bias,      normed, deviation, of_normed,
            parts, part_deviation, part_out, of_parts, of_part_weight, of_part_bias};
}

inline Floats as_floats(const std::vector<std::int64_t>& codes) { return Floats(codes.begin(), codes.end()); }

// Rows that are not masked: all but every third, where some are missing.
inline std::vector<std::uint8_t> mask_of(const Shape& s) {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(s.missing ? s.rows : 0), 1);
    for (std::size_t i = 0; i < mask.size(); i += 3) mask[i] = 0;
    return mask;
}

inline Results nearest(const Shape& s, int threads, bool centred, bool with_sums) {
    const auto G = static_cast<Index>(s.dims.size());
    const Index D = sum(s.dims), B = s.rows, row = D + 3;  // rows that lie apart
    Floats z = normal(B * row, 1);
    const Floats codebook = normal(entries(s.num_codes, s.dims), 2), grad = normal(B * D, 3), of_error = normal(G, 4);
    const std::vector<std::uint8_t> mask = mask_of(s);
    if (s.missing) z[static_cast<std::size_t>(row)] = std::numeric_limits<float>::infinity();
    std::vector<std::int64_t> codes(static_cast<std::size_t>(B * G), -7);
    Floats quantized = unwritten(B * D), error = unwritten(G), counts = unwritten(with_sums ? sum(s.num_codes) : 0);
    Floats sums = unwritten(with_sums ? entries(s.num_codes, s.dims) : 0);
    training::assign(address(z), row, B, address(codebook), address(mask), centred, s.num_codes, s.dims, address(codes),
                     address(quantized), address(error), address(counts), address(sums), threads);
    Floats of_z = unwritten(B * D);
    const Floats packed = normal(B * D, 5);
    training::assign_backward(address(grad), address(of_error), address(packed), address(quantized), address(codes), B,
                              s.dims, address(of_z), threads);
    return {as_floats(codes), quantized, error, counts, sums, of_z};
}

inline Results residual(const Shape& s, int threads, bool cosine, int gradient) {
    const auto Q = static_cast<Index>(s.num_codes.size());
    const Index D = s.width, B = s.rows, row = D + 2, K = sum(s.num_codes);
    Floats x = normal(B * row, 1);
    const Floats codebook = normal(K * D, 2), grad = normal(B * D, 3), of_errors = normal(Q, 4);
    const std::vector<std::uint8_t> mask = mask_of(s);
    if (s.missing && B > 2) x[static_cast<std::size_t>(2 * row)] = std::numeric_limits<float>::quiet_NaN();
    std::vector<std::int64_t> codes(static_cast<std::size_t>(B * Q), -7);
    Floats quantized = unwritten(B * D), errors = unwritten(Q), counts = unwritten(K), sums = unwritten(K * D);
    training::residual_assign(address(x), row, B, D, address(codebook), s.num_codes, address(mask), cosine, gradient,
                              address(codes), address(quantized), address(errors), address(counts), address(sums),
                              threads);
    Floats of_x = unwritten(B * D);
    training::residual_backward(address(grad), address(of_errors), address(x), row, B, D, address(codebook), s.num_codes,
                                address(mask), address(codes), cosine, gradient, address(of_x), threads);
    return {as_floats(codes), quantized, errors, counts, sums, of_x};
}

inline Results decoders(const Shape& s, int threads, bool with_rows) {
    const auto G = static_cast<Index>(s.dims.size());
    const Index B = s.rows, F = s.features, H = s.hidden, D = sum(s.dims), K = sum(s.num_codes);
    const Floats x = normal(B * F, 1), mean = normal(F, 2), codebook = normal(entries(s.num_codes, s.dims), 3);
    const Floats w1 = normal(D * H, 4), b1 = normal(G * H, 5), w2 = normal(G * H * F, 6), b2 = normal(G * F, 7);
    auto codes = random_codes<std::int64_t>(B, s.num_codes, 8, false);
    if (s.missing) codes.front() = -1;
    Floats hidden = unwritten(K * H), decoded = unwritten(K * F), off = unwritten(K * F);
    const double loss = training::decoders_forward(
        address(x), address(mean), address(codes), address(codebook), address(w1), address(b1), address(w2), address(b2),
        s.num_codes, s.dims, B, F, H, address(hidden), address(decoded), address(off), threads);
    Floats of_quantized = unwritten(with_rows ? B * D : 0), of_w1 = unwritten(D * H), of_b1 = unwritten(G * H);
    Floats of_w2 = unwritten(G * H * F), of_b2 = unwritten(G * F);
    training::decoders_backward(0.5, address(x), address(codes), address(codebook), address(w1), address(w2), s.num_codes,
                                s.dims, B, F, H, address(hidden), address(decoded), address(off), address(of_quantized),
                                address(of_w1), address(of_b1), address(of_w2), address(of_b2), threads);
    return {{static_cast<float>(loss)}, hidden, decoded, off, of_quantized, of_w1, of_b1, of_w2, of_b2};
}

inline Results topographic(const Shape& s, int threads) {
    const Index S = s.rows, F = s.features, D = sum(s.dims), wide = (S + 31) / 32 * 32;
    const Floats x = normal(S * F, 1), z = normal(S * D, 2), codebook = normal(entries(s.num_codes, s.dims), 3);
    const auto codes = random_codes<std::int32_t>(S, s.num_codes, 4, true);
    Index squares = 0;
    for (const Index K : s.num_codes) squares += K * K;
    Floats distances = unwritten(3 * S * wide), tables = unwritten(squares), of_z = unwritten(S * D);
    const auto [pre, post, factors] =
        training::topo_forward(address(x), F, address(z), address(codes), address(codebook), S, s.num_codes, s.dims,
                               address(distances), address(tables), false, threads);
    training::topo_backward(0.3, 0.7, factors, address(z), address(codes), address(codebook), S, s.num_codes, s.dims,
                            address(distances), address(tables), address(of_z), threads);
    return {{static_cast<float>(pre), static_cast<float>(post)}, tables, of_z};
}

}  // namespace spinlock_fast::testing
