// Matrix products with a fused epilogue: out = epilogue(alpha a b + bias), where the epilogue is the identity, ReLU and
// dropout, or the gradient of ReLU; optionally also the column sums of b.
#pragma once

#include "dropout.hpp"
#include "kernels.hpp"
#include "sparse_gemm.hpp"
#include "vector.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::FirstLayerGradientTask;
using training::Operand;
using training::Product;
using training::Workspace;

inline Matrix matrix(Operand o) { return {o.p, o.row, o.column}; }
inline Scratch scratch(const Workspace& w) { return {w.packed, w.rows, w.partial}; }

// out[c] = sum_r a[r, c], summed in blocks of rows to reduce rounding errors.
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
            for (int v = 0; v < 4; ++v) store(out + c + v * kLanes, load(out + c + v * kLanes) + sum[v]);
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
    const Index width = width_of_block(K);
    return M * (N < width ? N : width);
}

// Number of rows per block of `multiply_skipping`; a transposed left operand is copied block by block.
inline Index skip_block_rows(Index M, Index K, bool transposed) {
    constexpr Index kMaxRows = 1024;
    const Index fit = transposed ? kTransposedFloats / (K + kLanes) / kLanes * kLanes : kMaxRows;
    const Index rows = fit < kLanes ? kLanes : fit < kMaxRows ? fit : kMaxRows;
    return M < rows ? M : rows;
}

// Size of `Workspace::buffer` for a product with `sparse` set.
Index sparse_buffer_floats(Index M, Index K) {
    const Index rows = skip_block_rows(M, K, false), transposed = skip_block_rows(M, K, true);
    return rows * kSkipColumns + 2 * mask_words(rows, K) + transposed * (K + kLanes);
}

// Computes rows [m, m + rows) with `multiply_skipping`; returns false without a result if there are too few zeros.
template <class Store>
inline bool try_skip_zeros(const Product& p, Index m, Index rows, const Workspace& w, Store store) {
    float* partial = w.buffer;
    Mask* masks = reinterpret_cast<Mask*>(partial + rows * kSkipColumns);
    const float* a = p.a.p + m * p.a.row;
    Index a_row = p.a.row;
    if (p.a.column != 1) {
        float* transposed = partial + rows * kSkipColumns + 2 * mask_words(rows, p.K);
        a_row = p.K + kLanes;  // padding: rows 2 KiB apart would map to the same cache sets
        transpose(a, p.a.column, rows, p.K, transposed, a_row);
        a = transposed;
    }
    const Index count = find_nonzeros(a, a_row, rows, p.K, masks);
    const bool many = static_cast<double>(count) > kMaxDensity * static_cast<double>(rows) * static_cast<double>(p.K);
    // Beyond kDepth the two algorithms sum in different orders. The choice between them depends on the rows of a block,
    // so falling back there would make results depend on the number of threads.
    if (many && p.K <= kDepth) return false;
    multiply_skipping(rows, p.N, p.K, a, a_row, masks, matrix(p.b), w.packed, partial, store);
    return true;
}

// Whether `multiply_any` may skip zeros.
inline bool can_skip_zeros(const Product& p) {
    if (!p.sparse || p.K == 0 || (p.column_sums && p.b.column != 1)) return false;
    // A deeper transposed operand would be cut into blocks of few rows, each of which packs all of b.
    if (p.a.column != 1) return p.a.row == 1 && p.K <= kMaxTransposedDepth;
    // Deeper products are summed in blocks by `multiply`: a row's result would depend on the zeros of its block.
    return p.K <= kDepth;
}

template <class Store>
inline void multiply_any(const Product& p, const Workspace& w, Store store) {
    if (!can_skip_zeros(p)) {
        multiply(p.M, p.N, p.K, matrix(p.a), matrix(p.b), scratch(w), store, p.column_sums != nullptr);
        return;
    }
    const Index block = skip_block_rows(p.M, p.K, p.a.column != 1);
    for (Index m = 0; m < p.M; m += block) {
        const Index rows = p.M - m < block ? p.M - m : block;
        const auto store_block = [&](Index i, Index j, const float* values, Index n) { store(m + i, j, values, n); };
        if (!try_skip_zeros(p, m, rows, w, store_block))
            multiply(rows, p.N, p.K, matrix(p.a).block(m, 0), matrix(p.b), scratch(w), store_block);
    }
    if (p.column_sums) column_sums(p.b.p, p.K, p.N, p.b.row, p.column_sums);
}

// epilogue(row) returns a function (vector, column, valid lanes) -> vector.
template <class Epilogue>
inline void product_with_epilogue(const Product& p, const Workspace& w, Epilogue epilogue) {
    multiply_any(p, w, [&](Index i, Index j, const float* values, Index n) {
        if (i == p.M) {
            std::memcpy(p.column_sums + j, values, static_cast<std::size_t>(n) * sizeof(float));
            return;
        }
        const auto row_epilogue = epilogue(i);
        for (Index c = 0; c < n; c += kLanes) {
            const Index count = n - c < kLanes ? n - c : kLanes;
            Vector v = load(values + c) * p.alpha;
            if (p.bias) v += load_partial(p.bias + j + c, count);
            store_partial(p.out + i * p.out_row + j + c, count, row_epilogue(v, j + c, count));
        }
    });
}

void product(const Product& p, const Workspace& w) {
    const auto relu = [](Vector v) { return v <= Vector{} ? Vector{} : v; };  // propagates NaN
    if (p.relu && p.dropout.threshold) {
        product_with_epilogue(p, w, [&](Index i) {
            const RowDropout dropout(p.dropout, p.first_row + i);
            return [=](Vector v, Index column, Index) { return dropout(relu(v), column, 1.0f); };
        });
    } else if (p.relu) {
        product_with_epilogue(p, w, [&](Index) { return [=](Vector v, Index, Index) { return relu(v); }; });
    } else if (p.relu_output) {
        product_with_epilogue(p, w, [&](Index i) {
            const float* hidden = p.relu_output + i * p.out_row;
            return [=](Vector v, Index column, Index count) {
                return load_partial(hidden + column, count) <= Vector{} ? Vector{} : v;
            };
        });
    } else {
        product_with_epilogue(p, w, [](Index) { return [](Vector v, Index, Index) { return v; }; });
    }
}

// Floats that the masks of [rows, H] take, rounded up so that what follows them is aligned to a cache line.
inline Index mask_floats(Index rows, Index H) { return (2 * mask_words(rows, H) + 15) / 16 * 16; }

Index first_layer_gradient_buffer_floats(Index rows, Index H) { return mask_floats(rows, H) + rows * H; }

// dh = scale (grad w2^T) where hidden > 0, else 0; first_layer_grad = [x | 1]^T dh. dh is kept for `rows` rows only.
void first_layer_gradient(const FirstLayerGradientTask& t, const Workspace& w) {
    Mask* masks = reinterpret_cast<Mask*>(w.buffer);
    float* grad_hidden = w.buffer + mask_floats(t.rows, t.H);  // [rows, H]
    bool skipped = false;
#if defined(__AVX512F__)
    if (t.w2_transposed.row == 1 && t.E % kDotBlock == 0) {
        const Index count = find_nonzeros(t.hidden, t.H, t.rows, t.H, masks);
        skipped = static_cast<double>(count) <= kMaxDensity * static_cast<double>(t.rows) * static_cast<double>(t.H);
        if (skipped)
            masked_products(t.rows, t.H, t.E, t.grad, t.E, t.w2_transposed.p, t.w2_transposed.column, masks, t.scale,
                            grad_hidden);
    }
#else
    (void)masks;
#endif
    if (!skipped) {
        Product p{t.rows, t.H, t.E, {t.grad, t.E, 1}, t.w2_transposed, grad_hidden, t.H};
        p.alpha = t.scale;
        p.relu_output = t.hidden;
        product(p, w);
    }
    const Matrix x_transposed{t.x.p, t.x.column, t.x.row};
    const auto store = [&](Index i, Index j, const float* values, Index n) {
        std::memcpy(t.first_layer_grad + i * t.H + j, values, static_cast<std::size_t>(n) * sizeof(float));
    };
    multiply(t.n, t.H, t.rows, x_transposed, {grad_hidden, t.H, 1}, scratch(w), store, true);
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
