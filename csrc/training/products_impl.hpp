// Matrix products with what follows them: bias, ReLU, dropout, masks, sums of columns.
#pragma once

#include "dropout.hpp"
#include "kernels.hpp"
#include "sparse.hpp"
#include "vector.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::FirstLayerTask;
using training::Operand;
using training::Product;
using training::Workspace;

inline Matrix matrix(Operand o) { return {o.p, o.row, o.column}; }
inline Scratch scratch(const Workspace& w) { return {w.packed, w.rows, w.partial}; }

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

// Rows that a product which leaves out zeros takes at once: transposed ones are copied.
inline Index skip_block(Index M, Index K, bool turned) {
    constexpr Index kMost = 1024;
    const Index fit = turned ? kTurnedFloats / (K + kLanes) / kLanes * kLanes : kMost;
    const Index rows = fit < kLanes ? kLanes : fit < kMost ? fit : kMost;
    return M < rows ? M : rows;
}

// Of `Workspace::buffer`, for a product of which `sparse` is set.
Index sparse_buffer_floats(Index M, Index K) {
    const Index rows = skip_block(M, K, false), turned = skip_block(M, K, true);
    return rows * kSkipColumns + 2 * words_of(rows, K) + turned * (K + kLanes);
}

// Rows [m, m + rows) of a product whose left operand has many zeros; false if there are too few of them.
template <class Store>
inline bool skipped(const Product& p, Index m, Index rows, const Workspace& w, Store store) {
    float* partial = w.buffer;
    Bits* bits = reinterpret_cast<Bits*>(partial + rows * kSkipColumns);
    const float* a = p.a.p + m * p.a.row;
    Index a_row = p.a.row;
    if (p.a.column != 1) {
        float* turned = partial + rows * kSkipColumns + 2 * words_of(rows, p.K);
        a_row = p.K + kLanes;  // rows 2 KiB apart would be in each other's way
        transpose(a, p.a.column, rows, p.K, turned, a_row);
        a = turned;
    }
    const Index count = find_nonzeros(a, a_row, rows, p.K, bits);
    const bool many = static_cast<double>(count) > kSkipShare * static_cast<double>(rows) * static_cast<double>(p.K);
    // Where `multiply` has another order of sums, the choice would make the result depend on the number of threads.
    if (many && p.K <= kDepth) return false;
    multiply_skipping(rows, p.N, p.K, a, a_row, bits, matrix(p.b), w.packed, partial, store);
    return true;
}

// Whether `any_product` looks for zeros.
inline bool may_skip(const Product& p) {
    if (!p.sparse || p.K == 0 || (p.column_sums && p.b.column != 1)) return false;
    // Transposed blocks would have few rows, and each packs all of b.
    if (p.a.column != 1) return p.a.row == 1 && p.K <= kSkipDeepest;
    // Deeper products are summed in blocks by `multiply`: a row would depend on how many zeros the rows beside it have.
    return p.K <= kDepth;
}

template <class Store>
inline void any_product(const Product& p, const Workspace& w, Store store) {
    if (!may_skip(p)) {
        multiply(p.M, p.N, p.K, matrix(p.a), matrix(p.b), scratch(w), store, p.column_sums != nullptr);
        return;
    }
    const Index block = skip_block(p.M, p.K, p.a.column != 1);
    for (Index m = 0; m < p.M; m += block) {
        const Index rows = p.M - m < block ? p.M - m : block;
        const auto moved = [&](Index i, Index j, const float* values, Index n) { store(m + i, j, values, n); };
        if (!skipped(p, m, rows, w, moved))
            multiply(rows, p.N, p.K, matrix(p.a).block(m, 0), matrix(p.b), scratch(w), moved);
    }
    if (p.column_sums) column_sums(p.b.p, p.K, p.N, p.b.row, p.column_sums);
}

// `then(row)` gives what a vector of that row becomes, by its column and by how many of its values count.
template <class Then>
inline void product_then(const Product& p, const Workspace& w, Then then) {
    any_product(p, w, [&](Index i, Index j, const float* values, Index n) {
        if (i == p.M) {
            std::memcpy(p.column_sums + j, values, static_cast<std::size_t>(n) * sizeof(float));
            return;
        }
        const auto of_row = then(i);
        for (Index c = 0; c < n; c += kLanes) {
            const Index few = n - c < kLanes ? n - c : kLanes;
            Vector v = load(values + c) * p.alpha;
            if (p.bias) v += load_part(p.bias + j + c, few);
            keep_part(p.out + i * p.out_row + j + c, few, of_row(v, j + c, few));
        }
    });
}

void product(const Product& p, const Workspace& w) {
    const auto relu = [](Vector v) { return v <= Vector{} ? Vector{} : v; };  // NaN stays
    if (p.relu && p.dropout.threshold) {
        product_then(p, w, [&](Index i) {
            const RowDropout kept(p.dropout, p.first_row + i);
            return [=](Vector v, Index column, Index) { return kept(relu(v), column, 1.0f); };
        });
    } else if (p.relu) {
        product_then(p, w, [&](Index) { return [=](Vector v, Index, Index) { return relu(v); }; });
    } else if (p.positive) {
        product_then(p, w, [&](Index i) {
            const float* hidden = p.positive + i * p.out_row;
            return [=](Vector v, Index column, Index few) {
                return load_part(hidden + column, few) <= Vector{} ? Vector{} : v;
            };
        });
    } else {
        product_then(p, w, [](Index) { return [](Vector v, Index, Index) { return v; }; });
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
    const auto store = [&](Index i, Index j, const float* values, Index n) {
        std::memcpy(t.of_first + i * t.H + j, values, static_cast<std::size_t>(n) * sizeof(float));
    };
    multiply(t.n, t.H, t.rows, x_turned, {of_hidden, t.H, 1}, scratch(w), store, true);
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
