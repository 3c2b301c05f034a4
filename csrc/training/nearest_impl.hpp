// Nearest codes of rows, and counts, sums and errors by code.
#pragma once

#include "products_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::AssignTask;

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

}  // namespace spinlock_fast::SPINLOCK_SIMD
