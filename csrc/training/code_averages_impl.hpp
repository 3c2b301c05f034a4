// Update of a codebook by moving averages: n <- n + r (counts - n), s <- s + r (sums - s), e_k = s_k / d_k, where the
// divisor d_k is n_k or its Laplace-smoothed value (n_k + epsilon) / (N + K epsilon) N with N = sum_k n_k.
#pragma once

#include "kernels.hpp"
#include "vector.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::AverageTask;
using training::Smoothing;

constexpr float kIdleShare = 1e-5f;  // IDLE_SHARE of kernels/ema_update/reference.py

// As torch.lerp: exact at both ends.
template <class T>
inline T interpolate(T start, T end, float rate) {
    return rate < 0.5f ? start + rate * (end - start) : end - (1.0f - rate) * (end - start);
}

// Updates the moving counts, adds the counts to `usage`, and sets `divisors` [K], 0 for a code to keep. Returns whether
// the sums are to be updated.
bool average_counts(const AverageTask& t, float* divisors) {
    const Index K = t.num_codes;
    double rows = 0.0, total = 0.0;
    for (Index k = 0; k < K; ++k) {
        rows += static_cast<double>(t.counts[k]);
        if (t.usage) t.usage[k] += static_cast<std::int64_t>(t.counts[k]);
    }
    if (t.keep_without_rows && !(rows > 0.0)) return false;
    for (Index k = 0; k < K; ++k) {
        t.cluster_size[k] = interpolate(t.cluster_size[k], t.counts[k], t.rate);
        total += static_cast<double>(t.cluster_size[k]);
    }
    const float sum = static_cast<float>(total), smoothed_sum = sum + static_cast<float>(K) * t.epsilon;
    const float idle = kIdleShare * sum / static_cast<float>(K);
    for (Index k = 0; k < K; ++k) {
        const float n = t.cluster_size[k];
        if (t.smoothing == Smoothing::none) {
            divisors[k] = n > idle ? n : 0.0f;
            continue;
        }
        divisors[k] = (n + t.epsilon) / smoothed_sum * sum;
        if (t.smoothing == Smoothing::laplace) t.cluster_size[k] = divisors[k];
    }
    return true;
}

// Updates the moving sums and the codes [first, last).
void average_codes(const AverageTask& t, const float* divisors, Index first, Index last) {
    const Index D = t.dims, whole = D / kLanes * kLanes;
    for (Index k = first; k < last; ++k) {
        float* sum = t.code_sum + k * D;
        const float* rows = t.counts[k] == 0.0f ? nullptr : t.sums + k * D;  // the sum of no rows is 0
        for (Index d = 0; d < whole; d += kLanes)
            store(sum + d, interpolate(load(sum + d), rows ? load(rows + d) : Vector{}, t.rate));
        for (Index d = whole; d < D; ++d) sum[d] = interpolate(sum[d], rows ? rows[d] : 0.0f, t.rate);
        const float divisor = divisors[k];
        if (!t.codes || divisor == 0.0f) continue;
        float* code = t.codes + k * D;
        for (Index d = 0; d < whole; d += kLanes) store(code + d, load(sum + d) / divisor);
        for (Index d = whole; d < D; ++d) code[d] = sum[d] / divisor;
        if (!t.unit) continue;
        constexpr float kMinLength = 1e-6f;  // MIN_LENGTH of kernels/residual_vq/reference.py
        const float norm = __builtin_sqrtf(dot(code, code, D)), length = norm > kMinLength ? norm : kMinLength;
        for (Index d = 0; d < D; ++d) code[d] /= length;
    }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
