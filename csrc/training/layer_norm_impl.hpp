// Layer normalisation of rows, and of segments of rows, and its gradients:
// y = (x - mean(x)) / sqrt(var(x) + eps), grad_x = (g - mean(g) - y mean(g y)) / sqrt(var(x) + eps).
#pragma once

#include "dropout.hpp"
#include "kernels.hpp"
#include "vector.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

// Normalises x[0:n] in place; returns 1 / sqrt(var(x) + eps).
inline float normalize_row(float* x, Index n, float eps) {
    const float count = static_cast<float>(n);
    const float mean = reduce_sum(x, n) / count;
    for (Index i = 0; i < n; ++i) x[i] -= mean;
    const float inv_std = 1.0f / __builtin_sqrtf(dot(x, x, n) / count + eps);
    for (Index i = 0; i < n; ++i) x[i] *= inv_std;
    return inv_std;
}

// Replaces g by (g - mean(g) - normalized mean(g normalized)) inv_std.
inline void normalize_row_backward(float* g, const float* normalized, Index n, float inv_std) {
    const float count = static_cast<float>(n);
    const float mean = reduce_sum(g, n) / count, along = dot(g, normalized, n) / count;
    for (Index i = 0; i < n; ++i) g[i] = (g[i] - mean - normalized[i] * along) * inv_std;
}

void normalize(float* x, Index rows, Index n, float eps, float* inv_std) {
    for (Index r = 0; r < rows; ++r) inv_std[r] = normalize_row(x + r * n, n, eps);
}

void normalize_backward(const float* grad, const float* normalized, const float* inv_std, Index rows, Index n,
                        float* grad_x) {
    for (Index r = 0; r < rows; ++r) {
        if (grad_x != grad) std::memcpy(grad_x + r * n, grad + r * n, static_cast<std::size_t>(n) * sizeof(float));
        normalize_row_backward(grad_x + r * n, normalized + r * n, n, inv_std[r]);
    }
}

// out = LayerNorm_segment(dropout(x)) * weight + bias for rows [first, last).
void segment_layer_norm(const float* x, Index first, Index last, Index width, Index groups, const Index* sizes,
                        const float* weight, const float* bias, float eps, Dropout dropout, float scale,
                        float* normalized, float* inv_std, float* out) {
    for (Index b = first; b < last; ++b) {
        float* row = normalized + b * width;
        std::memcpy(row, x + b * width, static_cast<std::size_t>(width) * sizeof(float));
        if (dropout.threshold) apply_dropout(row, width, dropout, b, scale);
        Index column = 0;
        for (Index g = 0; g < groups; column += sizes[g], ++g)
            inv_std[b * groups + g] = normalize_row(row + column, sizes[g], eps);
        for (Index c = 0; c < width; ++c) out[b * width + c] = row[c] * weight[c] + bias[c];
    }
}

void segment_layer_norm_backward(const float* grad, const float* normalized, const float* inv_std, Index first,
                                 Index last, Index width, Index groups, const Index* sizes, const float* weight,
                                 Dropout dropout, float scale, float* grad_x) {
    for (Index b = first; b < last; ++b) {
        float* row = grad_x + b * width;
        for (Index c = 0; c < width; ++c) row[c] = grad[b * width + c] * weight[c];
        Index column = 0;
        for (Index g = 0; g < groups; column += sizes[g], ++g)
            normalize_row_backward(row + column, normalized + b * width + column, sizes[g], inv_std[b * groups + g]);
        if (dropout.threshold) apply_dropout(row, width, dropout, b, scale);
    }
}

float fold_scale(const float* row, const float* gain, const float* shift, Index n, float* scaled) {
    for (Index i = 0; i < n; ++i) scaled[i] = row[i] * gain[i];
    return dot(row, shift, n);
}

void fold_scale_backward(const float* row, const float* gain, const float* shift, float grad_offset, Index n,
                         float* grad_row, float* grad_gain, float* grad_shift) {
    const Index whole = n / kLanes * kLanes;
    for (Index i = 0; i < whole; i += kLanes) {
        const Vector grad = load(grad_row + i), weight = load(row + i);
        store(grad_gain + i, load(grad_gain + i) + grad * weight);
        store(grad_shift + i, load(grad_shift + i) + grad_offset * weight);
        store(grad_row + i, grad * load(gain + i) + grad_offset * load(shift + i));
    }
    for (Index i = whole; i < n; ++i) {
        grad_gain[i] += grad_row[i] * row[i];
        grad_shift[i] += grad_offset * row[i];
        grad_row[i] = grad_row[i] * gain[i] + grad_offset * shift[i];
    }
}

// grad_weight[c] = sum_b grad[b, c] normalized[b, c], grad_bias[c] = sum_b grad[b, c].
void weighted_column_sums(const float* grad, const float* normalized, Index rows, Index width, float* grad_weight,
                          float* grad_bias) {
    for (Index c = 0; c < width; ++c) grad_weight[c] = grad_bias[c] = 0.0f;
    for (Index b = 0; b < rows; ++b)
        for (Index c = 0; c < width; ++c) {
            grad_weight[c] += grad[b * width + c] * normalized[b * width + c];
            grad_bias[c] += grad[b * width + c];
        }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
