// Layer normalisation of rows and of segments of rows, and its gradients.
#pragma once

#include "dropout.hpp"
#include "kernels.hpp"
#include "vector.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

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
        if (dropout.threshold) drop(row, width, dropout, b, scale);
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
        if (dropout.threshold) drop(row, width, dropout, b, scale);
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

}  // namespace spinlock_fast::SPINLOCK_SIMD
