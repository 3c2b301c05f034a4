// Residual vector quantization. With r_0 = x, stage q quantizes y_q = r_q (or r_q / |r_q| with cosine similarity):
//   k_q = argmin_k |y_q - e_k|^2 (or argmax_k y_q . e_k),   r_(q+1) = r_q - e_(k_q),   quantized = sum_q e_(k_q).
// A thread processes all stages for a range of rows, so that their residuals stay in its cache.
#pragma once

#include "kernels.hpp"
#include "product_impl.hpp"
#include "vq_assign_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::Gradient;
using training::ResidualTask;

constexpr float kMinNorm = 1e-6f;  // lower bound of norms, against division by 0

inline Index whole_panels(Index K) { return (K + kColumns - 1) / kColumns * kColumns; }

inline Index panels_before(const ResidualTask& t, Index stage) {
    Index sum = 0;
    for (Index q = 0; q < stage; ++q) sum += whole_panels(t.num_codes[q]);
    return sum;
}

inline Index codes_before(const ResidualTask& t, Index stage) {
    Index sum = 0;
    for (Index q = 0; q < stage; ++q) sum += t.num_codes[q];
    return sum;
}

inline float clamped_norm(const float* x, Index n) {
    const float norm = __builtin_sqrtf(dot(x, x, n));
    return norm > kMinNorm ? norm : kMinNorm;
}

inline bool all_zero(const float* x, Index n) {
    for (Index i = 0; i < n; ++i)
        if (x[i] != 0.0f) return false;
    return true;
}

// Transposes the centered codes of a stage into panels and computes their squared norms (infinite in the padding).
void residual_pack_codebook(const ResidualTask& t, Index stage) {
    const Index K = t.num_codes[stage], D = t.D, padded_codes = whole_panels(K);
    const float* codes = t.codebook + codes_before(t, stage) * D;
    float* transposed = t.transposed + panels_before(t, stage) * D;
    float* norms = t.norms + panels_before(t, stage);
    float* center = t.centers + stage * D;
    if (t.cosine)
        std::memset(center, 0,
                    static_cast<std::size_t>(D) * sizeof(float));  // dot products are not translation-invariant
    else
        codebook_center(codes, K, D, center);
    for (Index k = 0; k < padded_codes; k += kColumns) {  // one panel at a time stays in the cache
        const Index n = K - k < kColumns ? K - k : kColumns;
        transpose(codes + k * D, D, D, n, transposed + k, padded_codes);
        Vector norm[kVectors] = {};
        for (Index d = 0; d < D; ++d) {
            float* row = transposed + d * padded_codes + k;
            for (Index c = n; c < kColumns; ++c) row[c] = center[d];  // 0 after the subtraction
            for (int v = 0; v < kVectors; ++v) {
                const Vector value = load(row + v * kLanes) - center[d];
                store(row + v * kLanes, value);
                norm[v] += value * value;
            }
        }
        for (int v = 0; v < kVectors; ++v) store(norms + k + v * kLanes, t.cosine ? Vector{} : norm[v]);
        for (Index c = n; c < kColumns; ++c) norms[k + c] = __builtin_inff();
    }
}

Index residual_buffer_floats(Index rows, Index D) { return rows * (2 * D + 2 * kLanes) + 5 * D; }

typedef std::int32_t Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Nearest code of each row, the lowest index among ties; -1 if no distance is finite.
inline void assign_nearest_of_stage(const ResidualTask& t, Index stage, Index N, const float* rows,
                                    std::int64_t* nearest, float* memory, const Workspace& w) {
    const Index padded_codes = whole_panels(t.num_codes[stage]);
    const float* norms = t.norms + panels_before(t, stage);
    float* least = memory;  // [N, kLanes] smallest distance per lane
    auto* block_start = reinterpret_cast<std::int32_t*>(memory + N * kLanes);
    for (Index i = 0; i < N * kLanes; ++i) {
        least[i] = __builtin_inff();
        block_start[i] = -1;
    }
    const Matrix codes{t.transposed + panels_before(t, stage) * t.D, padded_codes, 1};
    multiply(N, padded_codes, t.D, {rows, t.D, 1}, codes, scratch(w),
             [&](Index i, Index j, const float* products, Index n) {
                 Vector best = load(least + i * kLanes);
                 Lanes code = *reinterpret_cast<const Lanes*>(block_start + i * kLanes);
                 for (Index c = 0; c < n; c += kLanes) {
                     const Vector distance = load(norms + j + c) - 2.0f * load(products + c);
                     const Lanes closer = distance < best;
                     best = closer ? distance : best;
                     code = closer ? static_cast<std::int32_t>(j + c) - Lanes{} : code;
                 }
                 store(least + i * kLanes, best);
                 *reinterpret_cast<Lanes*>(block_start + i * kLanes) = code;
             });
    for (Index i = 0; i < N; ++i) {
        float best = __builtin_inff();
        Index code = -1;
        for (Index lane = 0; lane < kLanes; ++lane) {
            const std::int32_t start = block_start[i * kLanes + lane];
            const float distance = least[i * kLanes + lane];
            if (start < 0) continue;
            if (distance < best || (distance == best && start + lane < code)) {
                best = distance;
                code = start + lane;
            }
        }
        nearest[i * t.stages + stage] = code;
    }
}

// Codes and quantized rows of rows [first, last); also inverse_norms and zero_stage for `residual_statistics`.
void residual_assign_rows(const ResidualTask& t, Index first, Index last, const Workspace& w) {
    const Index N = last - first, D = t.D;
    float* residual = w.buffer;         // [N, D]
    float* y = residual + N * D;        // [N, D] centered input of the stage
    float* nearest_memory = y + N * D;  // [N, 2 kLanes]
    std::int64_t* nearest = t.codes + first * t.stages;
    for (Index i = 0; i < N; ++i) {
        std::memcpy(residual + i * D, t.x + (first + i) * t.x_row, static_cast<std::size_t>(D) * sizeof(float));
        t.zero_stage[first + i] = static_cast<std::int32_t>(t.stages);
        for (Index d = 0; d < D; ++d) t.quantized[(first + i) * D + d] = 0.0f;
    }
    for (Index q = 0; q < t.stages; ++q) {
        const float* center = t.centers + q * D;
        for (Index i = 0; i < N; ++i) {
            const float* r = residual + i * D;
            const float scale = t.cosine ? 1.0f / clamped_norm(r, D) : 1.0f;
            if (t.cosine) t.inverse_norms[(first + i) * t.stages + q] = scale;
            for (Index d = 0; d < D; ++d) y[i * D + d] = r[d] * scale - center[d];
        }
        assign_nearest_of_stage(t, q, N, y, nearest, nearest_memory, w);
        const float* codebook = t.codebook + codes_before(t, q) * D;
        for (Index i = 0; i < N; ++i) {
            float* r = residual + i * D;
            float* out = t.quantized + (first + i) * D;
            std::int64_t& code = nearest[i * t.stages + q];
            if (t.mask && !t.mask[first + i]) {
                code = -1;
                continue;
            }
            for (Index d = 0; d < D; ++d)
                if (!is_finite(y[i * D + d])) code = -1;
            if (t.gradient == Gradient::rotation && t.zero_stage[first + i] == t.stages && all_zero(r, D))
                t.zero_stage[first + i] =
                    static_cast<std::int32_t>(q);  // the rotation maps 0 to 0, so the residual stays 0
            if (t.zero_stage[first + i] <= q) continue;
            for (Index d = 0; d < D; ++d) {
                const float e = code < 0 ? __builtin_nanf("") : codebook[code * D + d];
                r[d] -= e;
                out[d] += e;
            }
        }
    }
}

// Squared errors [stages] of columns [first, last); counts [sum K] and sums [sum K, D] unless null.
void residual_statistics(const ResidualTask& t, Index N, Index first, Index last, double* errors, float* counts,
                         float* sums) {
    const Index D = t.D, n = last - first;
    for (Index q = 0; q < t.stages; ++q) errors[q] = 0.0;
    float r[kColumns];
    for (Index i = 0; i < N; ++i) {
        if (t.mask && !t.mask[i]) continue;
        std::memcpy(r, t.x + i * t.x_row + first, static_cast<std::size_t>(n) * sizeof(float));
        Index offset = 0;
        for (Index q = 0; q < t.stages; offset += t.num_codes[q], ++q) {
            const Index code = t.codes[i * t.stages + q];
            if (code < 0) {
                // Later stages have no code either.
                for (Index s = q; s < t.stages; ++s) errors[s] = static_cast<double>(__builtin_nanf(""));
                break;
            }
            const float scale = t.cosine ? t.inverse_norms[i * t.stages + q] : 1.0f;
            const float* e = t.codebook + (offset + code) * D + first;
            if (counts) counts[offset + code] += 1.0f;
            if (n == kLanes) {
                const Vector residual = load(r), y = residual * scale, difference = y - load(e);
                errors[q] += static_cast<double>(horizontal_sum(difference * difference));
                if (sums) {
                    float* sum = sums + (offset + code) * D + first;
                    store(sum, load(sum) + y);
                }
                if (t.zero_stage[i] > q) store(r, residual - load(e));
                continue;
            }
            float part = 0.0f;
            for (Index d = 0; d < n; ++d) {
                const float difference = r[d] * scale - e[d];
                part += difference * difference;
            }
            errors[q] += static_cast<double>(part);
            if (sums) {
                float* sum = sums + (offset + code) * D + first;
                for (Index d = 0; d < n; ++d) sum[d] += r[d] * scale;
            }
            if (t.zero_stage[i] > q)
                for (Index d = 0; d < n; ++d) r[d] -= e[d];
        }
    }
}

// Gradient of the rotation trick (arXiv 2410.06424): out = (|e| / |y|) R^T grad, where R rotates y / |y| to e / |e|.
inline void rotate_back(const float* grad, const float* y, const float* e, Index D, float* bisector, float* out) {
    const float inverse_y = 1.0f / clamped_norm(y, D), inverse_e = 1.0f / clamped_norm(e, D);
    const float factor = clamped_norm(e, D) * inverse_y;
    for (Index d = 0; d < D; ++d) bisector[d] = y[d] * inverse_y + e[d] * inverse_e;
    const float scale = 1.0f / clamped_norm(bisector, D);
    const float along = 2.0f * scale * scale * dot(grad, bisector, D), back = 2.0f * dot(grad, e, D) * inverse_e;
    for (Index d = 0; d < D; ++d) out[d] = factor * (grad[d] - along * bisector[d] + back * y[d] * inverse_y);
}

// grad_x of rows [first, last): the gradient through each stage plus that of the squared errors,
// grad_y = J^T grad + 2 grad_errors[q] (y - e), J given by `Gradient`; NaN where a stage has no code.
void residual_backward(const ResidualTask& t, Index first, Index last, const float* grad, const float* grad_errors,
                       float* grad_x, const Workspace& w) {
    const Index D = t.D;
    float* r = w.buffer;
    float* y = r + D;
    float* grad_y = y + D;
    float* bisector = grad_y + D;
    for (Index i = first; i < last; ++i) {
        float* out = grad_x + i * D;
        const float* upstream = grad + i * D;
        for (Index d = 0; d < D; ++d) out[d] = 0.0f;
        if (t.mask && !t.mask[i]) continue;
        std::memcpy(r, t.x + i * t.x_row, static_cast<std::size_t>(D) * sizeof(float));
        bool is_zero = false;
        Index offset = 0;
        for (Index q = 0; q < t.stages; offset += t.num_codes[q], ++q) {
            const Index code = t.codes[i * t.stages + q];
            if (code < 0) {
                for (Index d = 0; d < D; ++d) out[d] = __builtin_nanf("");
                break;
            }
            const float* e = t.codebook + (offset + code) * D;
            const float norm = t.cosine ? clamped_norm(r, D) : 1.0f;
            for (Index d = 0; d < D; ++d) y[d] = r[d] / norm;
            if (t.gradient == Gradient::rotation)
                rotate_back(upstream, y, e, D, bisector, grad_y);
            else
                for (Index d = 0; d < D; ++d) grad_y[d] = t.gradient == Gradient::none ? 0.0f : upstream[d];
            const float error_factor = 2.0f * grad_errors[q];
            for (Index d = 0; d < D; ++d) grad_y[d] += error_factor * (y[d] - e[d]);
            const float along = t.cosine && norm > kMinNorm ? dot(grad_y, y, D) : 0.0f;
            for (Index d = 0; d < D; ++d) out[d] += (grad_y[d] - along * y[d]) / norm;
            is_zero = is_zero || (t.gradient == Gradient::rotation && all_zero(r, D));
            if (!is_zero)
                for (Index d = 0; d < D; ++d) r[d] -= e[d];
        }
    }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
