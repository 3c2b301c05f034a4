// Nearest code of each row, k = argmin_k |e_k|^2 - 2 z . e_k, and the statistics of the assignment: squared error, and
// counts and sums of rows per code.
#pragma once

#include "product_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::AssignTask;

Index assign_buffer_floats(Index rows, Index K, Index D) { return K * D + K + D + rows * D + rows; }

// Mean of the code vectors over their finite values; 0 where the sum overflows.
inline void codebook_center(const float* codes, Index K, Index D, float* center) {
    for (Index d = 0; d < D; ++d) center[d] = 0.0f;
    for (Index k = 0; k < K; ++k)
        for (Index d = 0; d < D; ++d) center[d] += is_finite(codes[k * D + d]) ? codes[k * D + d] : 0.0f;
    for (Index d = 0; d < D; ++d) center[d] = is_finite(center[d]) ? center[d] / static_cast<float>(K) : 0.0f;
}

// Codes and quantized rows of rows [first, last). Rows that are masked or not finite get code -1 and NaN. With
// `centered`, the mean of the codes is subtracted from both sides, which reduces cancellation.
void assign_nearest(const AssignTask& t, const Workspace& w) {
    const Index K = t.slice.num_codes, D = t.slice.dims, N = t.last - t.first;
    const float* codebook = t.codebook + t.slice.first_entry;
    float* codes = w.buffer;       // [K, D]
    float* norms = codes + K * D;  // [K]
    float* center = norms + K;     // [D]
    float* rows = center + D;      // [N, D] z - center, if centered
    float* best = rows + N * D;    // [N] smallest distances so far
    std::memcpy(codes, codebook, static_cast<std::size_t>(K * D) * sizeof(float));
    Matrix z{t.z + t.first * t.z_row + t.slice.first_column, t.z_row, 1};
    if (t.centered) {
        codebook_center(codes, K, D, center);
        for (Index k = 0; k < K; ++k)
            for (Index d = 0; d < D; ++d) codes[k * D + d] -= center[d];
        for (Index i = 0; i < N; ++i)
            for (Index d = 0; d < D; ++d) rows[i * D + d] = z.p[i * z.row + d] - center[d];
        z = {rows, D, 1};
    }
    for (Index k = 0; k < K; ++k) norms[k] = dot(codes + k * D, codes + k * D, D);
    std::int64_t* nearest = t.codes + t.first * t.G + t.g;
    for (Index i = 0; i < N; ++i) {
        best[i] = __builtin_inff();
        nearest[i * t.G] = -1;
    }
    // Equal codes have bit-equal distances: the lowest index wins.
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
            nearest[i * t.G] = code;
        }
    });
    for (Index i = 0; i < N; ++i) {
        float* out = t.quantized + (t.first + i) * t.total_dims + t.slice.first_column;
        const float* row = t.z + (t.first + i) * t.z_row + t.slice.first_column;
        bool valid = !t.mask || t.mask[t.first + i];
        for (Index d = 0; d < D; ++d) valid = valid && is_finite(z.p[i * z.row + d]) && is_finite(row[d]);
        if (!valid) nearest[i * t.G] = -1;
        const Index code = nearest[i * t.G];
        for (Index d = 0; d < D; ++d) out[d] = code < 0 ? __builtin_nanf("") : codebook[code * D + d];
    }
}

// Returns the squared error of the rows [0, last) of one codebook; sets counts [K] and sums [K, D] unless null.
double assign_statistics(const AssignTask& t, float* counts, float* sums) {
    const Index K = t.slice.num_codes, D = t.slice.dims;
    if (counts) {
        for (Index k = 0; k < K; ++k) counts[k] = 0.0f;
        std::memset(sums, 0, static_cast<std::size_t>(K * D) * sizeof(float));
    }
    double error = 0.0;
    for (Index i = 0; i < t.last; ++i) {
        const Index code = t.codes[i * t.G + t.g];
        if (code < 0) continue;
        const float* z = t.z + i * t.z_row + t.slice.first_column;
        const float* e = t.quantized + i * t.total_dims + t.slice.first_column;
        error += static_cast<double>(squared_distance(z, e, D));
        if (!counts) continue;
        counts[code] += 1.0f;
        for (Index d = 0; d < D; ++d) sums[code * D + d] += z[d];
    }
    return error;
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
