// Squared cosines between the codes of a codebook. See kernels/code_cosines.
#pragma once

#include "kernels.hpp"
#include "product_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

// Sum over the pairs of distinct codes [K, D], in both orders, of their squared cosine; buffer: K D floats.
double squared_cosines(const float* codes, Index K, Index D, const Workspace& w) {
    constexpr float kSmallestNormal = 1.17549435e-38f;
    for (Index k = 0; k < K; ++k) {
        const float norm = __builtin_sqrtf(dot(codes + k * D, codes + k * D, D));
        const float scale = 1.0f / (norm < kSmallestNormal ? kSmallestNormal : norm);
        for (Index d = 0; d < D; ++d) w.buffer[k * D + d] = codes[k * D + d] * scale;
    }
    double sum = 0.0;
    multiply(K, K, D, {w.buffer, D, 1}, {w.buffer, 1, D}, scratch(w), [&](Index i, Index j, float* cosines, Index n) {
        if (i >= j && i < j + n) cosines[i - j] = 0.0f;
        sum += static_cast<double>(dot(cosines, cosines, n));
    });
    return sum;
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
