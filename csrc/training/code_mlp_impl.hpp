// First layer of a network whose input is the code vectors of all codebooks side by side. Its product with a code vector
// is one row of a table, so a row of the batch is a sum of table rows. See kernels/code_mlp.
#pragma once

#include "dropout.hpp"
#include "kernels.hpp"
#include "vector.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::CodeLayerTask;

// hidden[b] = dropout(relu(bias + sum_g table_g[code of b])) for rows [first, last), without scaling; NaN without a code.
void code_layer_rows(const CodeLayerTask& t, Index first, Index last) {
    constexpr int kBlock = 8;  // vectors that are summed in registers
    const auto relu = [](Vector v) { return v <= Vector{} ? Vector{} : v; };  // propagates NaN
    for (Index b = first; b < last; ++b) {
        const std::int64_t* codes = t.codes + b * t.G;
        float* out = t.hidden + b * t.H;
        bool missing = false;
        for (Index g = 0; g < t.G; ++g) missing |= codes[g] < 0;
        if (missing) {
            for (Index c = 0; c < t.H; ++c) out[c] = __builtin_nanf("");
            continue;
        }
        const RowDropout dropout(t.dropout, b);
        const auto finish = [&](Vector v, Index c) { return t.dropout.threshold ? dropout(relu(v), c, 1.0f) : relu(v); };
        Index c = 0;
        for (; c + kBlock * kLanes <= t.H; c += kBlock * kLanes) {
            Vector sum[kBlock];
            for (int v = 0; v < kBlock; ++v) sum[v] = load(t.bias + c + v * kLanes);
            for (Index g = 0; g < t.G; ++g) {
                const float* row = t.tables + (t.first_code[g] + codes[g]) * t.H + c;
                for (int v = 0; v < kBlock; ++v) sum[v] += load(row + v * kLanes);
            }
            for (int v = 0; v < kBlock; ++v) store(out + c + v * kLanes, finish(sum[v], c + v * kLanes));
        }
        for (; c < t.H; c += kLanes) {
            const Index count = t.H - c < kLanes ? t.H - c : kLanes;
            Vector sum = load_partial(t.bias + c, count);
            for (Index g = 0; g < t.G; ++g)
                sum += load_partial(t.tables + (t.first_code[g] + codes[g]) * t.H + c, count);
            store_partial(out + c, count, finish(sum, c));
        }
    }
}

// sums[k] = sum of the rows [B, H] whose code in codebook g is k, for its K codes.
void sum_rows_by_code(const std::int64_t* codes, Index G, Index g, const float* rows, Index B, Index H, Index K,
                      float* sums) {
    std::memset(sums, 0, static_cast<std::size_t>(K * H) * sizeof(float));
    for (Index b = 0; b < B; ++b) {
        const Index k = codes[b * G + g];
        if (k < 0) continue;
        float* sum = sums + k * H;
        const float* row = rows + b * H;
        const Index whole = H / kLanes * kLanes;
        for (Index c = 0; c < whole; c += kLanes) store(sum + c, load(sum + c) + load(row + c));
        for (Index c = whole; c < H; ++c) sum[c] += row[c];
    }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
