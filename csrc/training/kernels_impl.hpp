// The kernels of `kernels.hpp` for the instruction set that this file is compiled for.
#pragma once

#include "gemm.hpp"
#include "kernels.hpp"
#include "sparse.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace spinlock_fast::SPINLOCK_SIMD {

using training::AssignTask;
using training::Book;
using training::DecoderTask;
using training::Dropout;
using training::FirstLayerTask;
using training::Operand;
using training::Points;
using training::Product;
using training::Workspace;

inline Matrix matrix(Operand o) { return {o.p, o.row, o.column}; }
inline Scratch scratch(const Workspace& w) { return {w.packed, w.rows, w.partial}; }
inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void keep(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
inline Vector all(float x) { return x - Vector{}; }

inline Vector root(Vector x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<Vector>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// 1 / sqrt(x) for x > 0, to the last bit or two.
inline Vector inverse_root(Vector x) {
#if defined(__AVX512F__)
    const Vector guess = reinterpret_cast<Vector>(_mm512_rsqrt14_ps(reinterpret_cast<__m512>(x)));
    return guess * (1.5f - 0.5f * x * guess * guess);
#else
    return 1.0f / root(x);
#endif
}

inline Vector root_of_square(Vector x) {
#if defined(__AVX512F__)
    return x > Vector{} ? x * inverse_root(x) : Vector{};  // in half the time of the division unit's root
#else
    return root(x);
#endif
}

inline float total(Vector x) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
}

// ---- dropout

inline std::uint64_t mixed(std::uint64_t x) {  // splitmix64 (Steele, Lea and Flood 2014)
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Zeroes what dropout drops of row[0:n], the columns from `column` on, and multiplies the rest by `scale`.
inline void drop(float* row, Index n, Dropout dropout, Index row_index, Index column, float scale) {
    const std::uint64_t key = mixed(dropout.seed ^ mixed(static_cast<std::uint64_t>(row_index)));
    const auto offset = static_cast<std::uint32_t>(key), factor = static_cast<std::uint32_t>(key >> 32) | 1u;
    const std::uint32_t threshold = dropout.threshold;
    for (Index c = 0; c < n; ++c) {
        std::uint32_t h = static_cast<std::uint32_t>(column + c) * 0x9e3779b9u + offset;
        h ^= h >> 16;
        h *= 0x7feb352du;  // the multipliers and shifts of lowbias32 (Wellons 2018), the second keyed
        h ^= h >> 15;
        h *= factor;
        h ^= h >> 16;
        row[c] = h >= threshold ? row[c] * scale : 0.0f;
    }
}

// ---- products

// In blocks of rows, so that errors of rounding add up less.
void column_sums(const float* a, Index rows, Index columns, Index row, float* out) {
    constexpr Index kBlock = 64;
    std::memset(out, 0, static_cast<std::size_t>(columns) * sizeof(float));
    for (Index r0 = 0; r0 < rows; r0 += kBlock) {
        const Index r1 = rows - r0 < kBlock ? rows : r0 + kBlock;
        Index c = 0;
        for (; c + 4 * kLanes <= columns; c += 4 * kLanes) {
            Vector sum[4] = {};
            for (Index r = r0; r < r1; ++r)
                for (int v = 0; v < 4; ++v) sum[v] += load(a + r * row + c + v * kLanes);
            for (int v = 0; v < 4; ++v) keep(out + c + v * kLanes, load(out + c + v * kLanes) + sum[v]);
        }
        for (; c < columns; ++c) {
            float sum = 0.0f;
            for (Index r = r0; r < r1; ++r) sum += a[r * row + c];
            out[c] += sum;
        }
    }
}

Index partial_floats(Index M, Index N, Index K) {
    if (K <= kDepth) return 0;
    const Index wide = width_of_block(K);
    return M * (N < wide ? N : wide);
}

// Of `Workspace::buffer`, for a product of which `sparse` is set.
Index sparse_buffer_floats(Index M, Index K) {
    const Index most = kTurnedFloats > kLanes * K ? kTurnedFloats : kLanes * K;
    return M * kSkipColumns + 2 * words_of(M, K) + most + kLanes;
}

// Rows [m, m + rows) of a product whose left operand has many zeros; false if there are too few of them.
template <class Store>
inline bool skipped(const Product& p, Index m, Index rows, const Workspace& w, Store store) {
    float* partial = w.buffer;
    Bits* bits = reinterpret_cast<Bits*>(partial + p.M * kSkipColumns);
    float* turned = partial + p.M * kSkipColumns + 2 * words_of(p.M, p.K);
    const float* a = p.a.p + m * p.a.row;
    Index a_row = p.a.row;
    if (p.a.column != 1) {
        transpose(a, p.a.column, rows, p.K, turned, p.K);
        a = turned, a_row = p.K;
    }
    const Index count = find_nonzeros(a, a_row, rows, p.K, bits);
    if (static_cast<double>(count) > kSkipShare * static_cast<double>(rows) * static_cast<double>(p.K)) return false;
    multiply_skipping(rows, p.N, p.K, a, a_row, bits, matrix(p.b), w.packed, partial, store);
    return true;
}

template <class Store>
inline void any_product(const Product& p, const Workspace& w, Store store) {
    const bool sums = p.column_sums != nullptr, turned = p.a.column != 1;
    if (!p.sparse || p.K == 0 || (turned && p.a.row != 1) || (sums && p.b.column != 1)) {
        multiply(p.M, p.N, p.K, matrix(p.a), matrix(p.b), scratch(w), store, sums);
        return;
    }
    const Index fit = kTurnedFloats / p.K / kLanes * kLanes;
    const Index block = !turned ? p.M : fit > kLanes ? fit : kLanes;
    for (Index m = 0; m < p.M; m += block) {
        const Index rows = p.M - m < block ? p.M - m : block;
        const auto moved = [&](Index i, Index j, float* values, Index n) { store(m + i, j, values, n); };
        if (!skipped(p, m, rows, w, moved))
            multiply(rows, p.N, p.K, matrix(p.a).block(m, 0), matrix(p.b), scratch(w), moved);
    }
    if (sums) column_sums(p.b.p, p.K, p.N, p.b.row, p.column_sums);
}

template <class Then>
inline void product_then(const Product& p, const Workspace& w, Then then) {
    const auto store = [&](Index i, Index j, float* values, Index n) {
        if (i == p.M) {
            for (Index c = 0; c < n; ++c) p.column_sums[j + c] = values[c];
            return;
        }
        float* out = p.out + i * p.out_row + j;
        if (n % kLanes == 0) {  // whole vectors, which is what most rows are made of
            for (Index c = 0; c < n; c += kLanes) {
                Vector v = load(values + c) * p.alpha;
                if (p.bias) v += load(p.bias + j + c);
                keep(values + c, v);
            }
        } else {
            for (Index c = 0; c < n; ++c) values[c] = values[c] * p.alpha + (p.bias ? p.bias[j + c] : 0.0f);
        }
        then(i, j, values, n, out);
        if (n % kLanes == 0)
            for (Index c = 0; c < n; c += kLanes) keep(out + c, load(values + c));
        else
            for (Index c = 0; c < n; ++c) out[c] = values[c];
    };
    any_product(p, w, store);
}

void product(const Product& p, const Workspace& w) {
    if (p.relu) {
        product_then(p, w, [&](Index i, Index j, float* values, Index n, float*) {
            if (n % kLanes == 0)
                for (Index c = 0; c < n; c += kLanes) keep(values + c, load(values + c) <= Vector{} ? Vector{} : load(values + c));
            else
                for (Index c = 0; c < n; ++c) values[c] = values[c] <= 0.0f ? 0.0f : values[c];
            if (p.dropout.threshold) drop(values, n, p.dropout, p.first_row + i, j, 1.0f);
        });
    } else if (p.positive) {
        product_then(p, w, [&](Index i, Index j, float* values, Index n, float*) {
            const float* mask = p.positive + i * p.out_row + j;
            if (n % kLanes == 0)
                for (Index c = 0; c < n; c += kLanes)
                    keep(values + c, load(mask + c) <= Vector{} ? Vector{} : load(values + c));
            else
                for (Index c = 0; c < n; ++c) values[c] = mask[c] <= 0.0f ? 0.0f : values[c];
        });
    } else {
        product_then(p, w, [](Index, Index, float*, Index, float*) {});
    }
}

Index first_layer_buffer_floats(Index rows, Index H) { return rows * H + 2 * words_of(rows, H); }

void first_layer(const FirstLayerTask& t, const Workspace& w) {
    float* of_hidden = w.buffer;  // [rows, H]
    Bits* bits = reinterpret_cast<Bits*>(of_hidden + t.rows * t.H);
    bool done = false;
#if defined(__AVX512F__)
    if (t.w2_turned.row == 1 && t.E % kDotBlock == 0) {
        const Index count = find_nonzeros(t.hidden, t.H, t.rows, t.H, bits);
        done = static_cast<double>(count) <= kSkipShare * static_cast<double>(t.rows) * static_cast<double>(t.H);
        if (done)
            masked_products(t.rows, t.H, t.E, t.grad, t.E, t.w2_turned.p, t.w2_turned.column, bits, t.scale, of_hidden);
    }
#else
    (void)bits;
#endif
    if (!done) {
        Product p{t.rows, t.H, t.E, {t.grad, t.E, 1}, t.w2_turned, of_hidden, t.H};
        p.alpha = t.scale;
        p.positive = t.hidden;
        product(p, w);
    }
    const Matrix x_turned{t.x.p, t.x.column, t.x.row};
    multiply(t.n, t.H, t.rows, x_turned, {of_hidden, t.H, 1}, scratch(w), [&](Index i, Index j, const float* values, Index n) {
        std::memcpy(t.of_first + i * t.H + j, values, static_cast<std::size_t>(n) * sizeof(float));
    }, true);
}

// ---- normalisation

// f(i) summed over [0, n), lane by lane.
template <class F>
inline float vector_sum(Index n, F f) {
    Vector sum = {};
    Index i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += f(i);
    return total(sum);
}

inline float sum_of(const float* x, Index n) {
    Index whole = n / kLanes * kLanes;
    float sum = vector_sum(whole, [&](Index i) { return load(x + i); });
    for (Index i = whole; i < n; ++i) sum += x[i];
    return sum;
}

inline float dot(const float* x, const float* y, Index n) {
    Index whole = n / kLanes * kLanes;
    float sum = vector_sum(whole, [&](Index i) { return load(x + i) * load(y + i); });
    for (Index i = whole; i < n; ++i) sum += x[i] * y[i];
    return sum;
}

// x to mean 0 and variance 1; returns 1 / sqrt(variance + eps).
inline float normalize_one(float* x, Index n, float eps) {
    const float count = static_cast<float>(n);
    const float mean = sum_of(x, n) / count;
    for (Index i = 0; i < n; ++i) x[i] -= mean;
    const float deviation = 1.0f / __builtin_sqrtf(dot(x, x, n) / count + eps);
    for (Index i = 0; i < n; ++i) x[i] *= deviation;
    return deviation;
}

// (g - mean(g) - normed mean(g normed)) * deviation, in place of g.
inline void normalize_one_backward(float* g, const float* normed, Index n, float deviation) {
    const float count = static_cast<float>(n);
    const float mean = sum_of(g, n) / count, along = dot(g, normed, n) / count;
    for (Index i = 0; i < n; ++i) g[i] = (g[i] - mean - normed[i] * along) * deviation;
}

void normalize(float* x, Index rows, Index n, float eps, float* deviation) {
    for (Index r = 0; r < rows; ++r) deviation[r] = normalize_one(x + r * n, n, eps);
}

void normalize_backward(const float* grad, const float* normed, const float* deviation, Index rows, Index n, float* of_x) {
    for (Index r = 0; r < rows; ++r) {
        if (of_x != grad) std::memcpy(of_x + r * n, grad + r * n, static_cast<std::size_t>(n) * sizeof(float));
        normalize_one_backward(of_x + r * n, normed + r * n, n, deviation[r]);
    }
}

void segments(const float* x, Index first, Index last, Index width, Index groups, const Index* sizes,
              const float* weight, const float* bias, float eps, Dropout dropout, float scale, float* normed,
              float* deviation, float* out) {
    for (Index b = first; b < last; ++b) {
        float* row = normed + b * width;
        std::memcpy(row, x + b * width, static_cast<std::size_t>(width) * sizeof(float));
        if (dropout.threshold) drop(row, width, dropout, b, 0, scale);
        Index column = 0;
        for (Index g = 0; g < groups; column += sizes[g], ++g)
            deviation[b * groups + g] = normalize_one(row + column, sizes[g], eps);
        for (Index c = 0; c < width; ++c) out[b * width + c] = row[c] * weight[c] + bias[c];
    }
}

void segments_backward(const float* grad, const float* normed, const float* deviation, Index first, Index last,
                       Index width, Index groups, const Index* sizes, const float* weight, Dropout dropout, float scale,
                       float* of_x) {
    for (Index b = first; b < last; ++b) {
        float* row = of_x + b * width;
        for (Index c = 0; c < width; ++c) row[c] = grad[b * width + c] * weight[c];
        Index column = 0;
        for (Index g = 0; g < groups; column += sizes[g], ++g)
            normalize_one_backward(row + column, normed + b * width + column, sizes[g], deviation[b * groups + g]);
        if (dropout.threshold) drop(row, width, dropout, b, 0, scale);
    }
}

void weighted_column_sums(const float* grad, const float* normed, Index rows, Index width, float* of_weight,
                          float* of_bias) {
    for (Index c = 0; c < width; ++c) of_weight[c] = of_bias[c] = 0.0f;
    for (Index b = 0; b < rows; ++b)
        for (Index c = 0; c < width; ++c) {
            of_weight[c] += grad[b * width + c] * normed[b * width + c];
            of_bias[c] += grad[b * width + c];
        }
}

// ---- nearest codes

inline bool finite(float x) { return x - x == 0.0f; }

Index nearest_buffer_floats(Index rows, Index K, Index D) { return K * D + K + D + rows * D + rows; }

void nearest(const AssignTask& t, const Workspace& w) {
    const Index K = t.book.codes, D = t.book.dims, N = t.last - t.first;
    const float* source = t.codebook + t.book.first_entry;
    float* codes = w.buffer;        // [K, D]
    float* norms = codes + K * D;   // [K]
    float* centre = norms + K;      // [D]
    float* rows = centre + D;       // [N, D], where they are moved
    float* best = rows + N * D;     // [N]
    std::memcpy(codes, source, static_cast<std::size_t>(K * D) * sizeof(float));
    Matrix z{t.z + t.first * t.z_row + t.book.first_column, t.z_row, 1};
    if (t.centred) {
        for (Index d = 0; d < D; ++d) centre[d] = 0.0f;
        for (Index k = 0; k < K; ++k)
            for (Index d = 0; d < D; ++d) centre[d] += finite(codes[k * D + d]) ? codes[k * D + d] : 0.0f;
        for (Index d = 0; d < D; ++d) centre[d] = finite(centre[d]) ? centre[d] / static_cast<float>(K) : 0.0f;
        for (Index k = 0; k < K; ++k)
            for (Index d = 0; d < D; ++d) codes[k * D + d] -= centre[d];
        for (Index i = 0; i < N; ++i)
            for (Index d = 0; d < D; ++d) rows[i * D + d] = z.p[i * z.row + d] - centre[d];
        z = {rows, D, 1};
    }
    for (Index k = 0; k < K; ++k) norms[k] = dot(codes + k * D, codes + k * D, D);
    std::int64_t* found = t.codes + t.first * t.G + t.g;
    for (Index i = 0; i < N; ++i) {
        best[i] = __builtin_inff();
        found[i * t.G] = -1;
    }
    // Equal codes go through the same operations, so that the first of them wins.
    multiply(N, K, D, z, {codes, 1, D}, scratch(w), [&](Index i, Index j, float* products, Index n) {
        float least = best[i];
        Index code = -1;
        for (Index c = 0; c < n; ++c) {
            const float distance = norms[j + c] - 2.0f * products[c];
            if (distance < least) {
                least = distance;
                code = j + c;
            }
        }
        if (code >= 0) {
            best[i] = least;
            found[i * t.G] = code;
        }
    });
    for (Index i = 0; i < N; ++i) {
        float* out = t.quantized + (t.first + i) * t.total_dims + t.book.first_column;
        const float* row = t.z + (t.first + i) * t.z_row + t.book.first_column;
        bool counts = !t.mask || t.mask[t.first + i];
        for (Index d = 0; d < D; ++d) counts = counts && finite(z.p[i * z.row + d]) && finite(row[d]);
        if (!counts) found[i * t.G] = -1;
        const Index code = found[i * t.G];
        for (Index d = 0; d < D; ++d) out[d] = code < 0 ? __builtin_nanf("") : source[code * D + d];
    }
}

double tally(const AssignTask& t, float* counts, float* sums) {
    const Index K = t.book.codes, D = t.book.dims;
    if (counts) {
        for (Index k = 0; k < K; ++k) counts[k] = 0.0f;
        std::memset(sums, 0, static_cast<std::size_t>(K * D) * sizeof(float));
    }
    double error = 0.0;
    for (Index i = 0; i < t.last; ++i) {
        const Index code = t.codes[i * t.G + t.g];
        if (code < 0) continue;
        const float* z = t.z + i * t.z_row + t.book.first_column;
        const float* e = t.quantized + i * t.total_dims + t.book.first_column;
        float part = 0.0f;
        for (Index d = 0; d < D; ++d) part += (z[d] - e[d]) * (z[d] - e[d]);
        error += static_cast<double>(part);
        if (!counts) continue;
        counts[code] += 1.0f;
        for (Index d = 0; d < D; ++d) sums[code * D + d] += z[d];
    }
    return error;
}

// ---- partial decoders

constexpr Index kGathered = 256;  // rows of one code that are multiplied at once

Index decoder_buffer_floats(Index B, Index F, Index H, Index K, Index D) {
    return K * (F + H) + H * (F + D) + F * D + kGathered * F + B + K + 1;
}

inline void simple_product(Index M, Index N, Index K, Operand a, Operand b, float* out, Index out_row, const Workspace& w,
                           const float* bias = nullptr, float* column_sums = nullptr) {
    Product p{M, N, K, a, b, out, out_row};
    p.bias = bias;
    p.column_sums = column_sums;
    product(p, w);
}

double decoder_forward(const DecoderTask& t, const Workspace& w) {
    const Index K = t.book.codes, D = t.book.dims, F = t.F, H = t.H;
    float* hidden = t.hidden + t.book.first_code * H;
    float* decoded = t.decoded + t.book.first_code * F;
    float* off = t.off + t.book.first_code * F;
    Product first{K, H, D, {t.codebook + t.book.first_entry, D, 1}, {t.w1 + t.book.first_column * H, H, 1}, hidden, H};
    first.bias = t.b1 + t.g * H;
    first.relu = true;
    product(first, w);
    float* bias = w.buffer;
    float* counts = w.buffer + F;
    for (Index f = 0; f < F; ++f) bias[f] = t.b2[t.g * F + f] - t.mean[f];
    simple_product(K, F, H, {hidden, H, 1}, {t.w2 + t.g * H * F, F, 1}, decoded, F, w, bias);
    std::memset(off, 0, static_cast<std::size_t>(K * F) * sizeof(float));
    for (Index k = 0; k < K; ++k) counts[k] = 0.0f;
    for (Index b = 0; b < t.B; ++b) {
        const Index k = t.codes[b * t.G + t.g];
        if (k < 0) continue;
        counts[k] += 1.0f;
        const float* x = t.x + b * F;
        float* sum = off + k * F;
        for (Index f = 0; f < F; ++f) sum[f] += x[f];
    }
    double loss = 0.0;
    for (Index k = 0; k < K; ++k) {
        const float n = counts[k], inverse = n > 0.0f ? 1.0f / n : 0.0f;
        float part = 0.0f, around = 0.0f;
        for (Index f = 0; f < F; ++f) {
            const float mean = off[k * F + f] * inverse, difference = decoded[k * F + f] - mean;
            part += difference * difference;
            around += mean * mean;
            off[k * F + f] = n > 0.0f ? difference * n : 0.0f;
        }
        if (n > 0.0f) loss += static_cast<double>(n) * (static_cast<double>(part) - static_cast<double>(around));
    }
    return loss;
}

void decoder_backward(const DecoderTask& t, const Workspace& w) {
    const Index K = t.book.codes, D = t.book.dims, F = t.F, H = t.H, column = t.book.first_column;
    const float* hidden = t.hidden + t.book.first_code * H;
    const float* decoded = t.decoded + t.book.first_code * F;
    const float* vectors = t.codebook + t.book.first_entry;
    const float* w1 = t.w1 + column * H;
    const Operand w2_turned{t.w2 + t.g * H * F, 1, F};
    float* of_decoded = w.buffer;           // [K, F]
    float* of_hidden = of_decoded + K * F;  // [K, H]
    float* of_active = of_hidden + K * H;   // [H, F] rows of the second weights
    float* to_active = of_active + H * F;   // [H, D]
    float* jacobian = to_active + H * D;    // [F, D]
    float* difference = jacobian + F * D;   // [kGathered, F]
    auto* order = reinterpret_cast<std::int32_t*>(difference + kGathered * F);  // [B]
    auto* starts = order + t.B;                                           // [K + 1]
    const float* off = t.off + t.book.first_code * F;
    const float scale = t.scale;
    for (Index i = 0; i < K * F; ++i) of_decoded[i] = off[i] * scale;
    simple_product(H, F, K, {hidden, 1, H}, {of_decoded, F, 1}, t.of_w2 + t.g * H * F, F, w, nullptr, t.of_b2 + t.g * F);
    Product p{K, H, F, {of_decoded, F, 1}, w2_turned, of_hidden, H};
    p.positive = hidden;
    product(p, w);
    simple_product(D, H, K, {vectors, 1, D}, {of_hidden, H, 1}, t.of_w1 + column * H, H, w, nullptr, t.of_b1 + t.g * H);
    if (!t.of_quantized) return;
    // Rows by code: those of code k are order[starts[k] : starts[k + 1]].
    for (Index k = 0; k <= K; ++k) starts[k] = 0;
    for (Index row = 0; row < t.B; ++row)
        if (const Index k = t.codes[row * t.G + t.g]; k >= 0) ++starts[k + 1];
    for (Index k = 0; k < K; ++k) starts[k + 1] += starts[k];
    for (Index row = 0; row < t.B; ++row) {
        const Index k = t.codes[row * t.G + t.g];
        if (k >= 0)
            order[starts[k]++] = static_cast<std::int32_t>(row);
        else
            for (Index d = 0; d < D; ++d) t.of_quantized[row * t.total_dims + column + d] = 0.0f;
    }
    for (Index k = K; k > 0; --k) starts[k] = starts[k - 1];
    starts[0] = 0;
    for (Index k = 0; k < K; ++k) {
        const Index n = starts[k + 1] - starts[k];
        if (n == 0) continue;
        // The Jacobian of the decoder at this code, turned: only hidden units above 0 take part.
        Index active = 0;
        for (Index h = 0; h < H; ++h) {
            if (!(hidden[k * H + h] > 0.0f)) continue;
            std::memcpy(of_active + active * F, t.w2 + (t.g * H + h) * F, static_cast<std::size_t>(F) * sizeof(float));
            for (Index d = 0; d < D; ++d) to_active[active * D + d] = w1[d * H + h];
            ++active;
        }
        simple_product(F, D, active, {of_active, 1, F}, {to_active, D, 1}, jacobian, D, w);
        for (Index i0 = 0; i0 < n; i0 += kGathered) {
            const std::int32_t* rows = order + starts[k] + i0;
            const Index few = n - i0 < kGathered ? n - i0 : kGathered;
            for (Index i = 0; i < few; ++i) {
                const float *x = t.x + rows[i] * F, *goal = decoded + k * F;
                for (Index f = 0; f < F; ++f) difference[i * F + f] = (goal[f] - x[f]) * scale;
            }
            const Matrix left{difference, F, 1}, right{jacobian, D, 1};
            multiply(few, D, F, left, right, scratch(w), [&](Index i, Index j, float* v, Index c) {
                float* out = t.of_quantized + rows[i] * t.total_dims + column + j;
                for (Index d = 0; d < c; ++d) out[d] = v[d];
            });
        }
    }
}

// ---- distances

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

// Columns of a group's points, rounded up to whole vectors.
inline Index whole_vectors(Index n) { return (n + kLanes - 1) / kLanes * kLanes; }

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

// out[r] += sum over k of a[r, k] b[k] for kRows rows of `width` columns, in whole vectors; b lies in panels of depth S.
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

#include "residual_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

constexpr training::Kernels kKernels = {
    nearest, nearest_buffer_floats, tally,
    kLanes, kRows, kColumns, kPackedFloats, kRows * kDepth,
    partial_floats, product, sparse_buffer_floats, first_layer, first_layer_buffer_floats, column_sums, normalize, normalize_backward, segments, segments_backward,
    weighted_column_sums, decoder_forward, decoder_backward, decoder_buffer_floats, pack_points, distances, pull,
    pull_buffer_floats, code_distances, add_lookup, pull_codes, pull_codes_buffer_floats, row_sums, row_moments,
    pair_weights, residual_prepare, residual_rows, residual_buffer_floats, residual_tally, residual_backward,
};

}  // namespace spinlock_fast::SPINLOCK_SIMD
