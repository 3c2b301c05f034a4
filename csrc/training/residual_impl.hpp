// Residual quantization: all stages for a run of rows, the residual in the memory of one thread.
#pragma once

#include "kernels.hpp"
#include "products_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::Gradient;
using training::ResidualTask;

constexpr float kShort = 1e-6f;  // a length is taken to be at least this

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

inline float length(const float* x, Index n) {
    const float square = dot(x, x, n);
    const float root = __builtin_sqrtf(square);
    return root > kShort ? root : kShort;
}

inline bool all_zero(const float* x, Index n) {
    for (Index i = 0; i < n; ++i)
        if (x[i] != 0.0f) return false;
    return true;
}

void residual_prepare(const ResidualTask& t, Index stage) {
    const Index K = t.num_codes[stage], D = t.D, wide = whole_panels(K);
    const float* codes = t.codebook + codes_before(t, stage) * D;
    float* turned = t.turned + panels_before(t, stage) * D;
    float* norms = t.norms + panels_before(t, stage);
    float* centre = t.centres + stage * D;
    for (Index d = 0; d < D; ++d) centre[d] = 0.0f;
    if (!t.cosine) {  // a dot product is not that of points moved together
        for (Index k = 0; k < K; ++k)
            for (Index d = 0; d < D; ++d) centre[d] += finite(codes[k * D + d]) ? codes[k * D + d] : 0.0f;
        for (Index d = 0; d < D; ++d) centre[d] = finite(centre[d]) ? centre[d] / static_cast<float>(K) : 0.0f;
    }
    for (Index k = 0; k < wide; ++k) norms[k] = k < K ? 0.0f : __builtin_inff();
    for (Index k0 = 0; k0 < K; k0 += kColumns)  // a panel of columns at a time stays in the cache
        for (Index d = 0; d < D; ++d)
            for (Index k = k0; k < k0 + kColumns; ++k) {
                const float value = k < K ? codes[k * D + d] - centre[d] : 0.0f;
                turned[d * wide + k] = value;
                if (!t.cosine && k < K) norms[k] += value * value;
            }
}

Index residual_buffer_floats(Index rows, Index D) { return rows * (2 * D + 2 * kLanes) + 5 * D; }

typedef std::int32_t Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// The nearest code of each row, the lowest of equally near ones; -1 where no distance is finite.
inline void nearest_of_stage(const ResidualTask& t, Index stage, Index N, const float* rows, std::int64_t* found,
                             float* memory, const Workspace& w) {
    const Index wide = whole_panels(t.num_codes[stage]);
    const float* norms = t.norms + panels_before(t, stage);
    float* least = memory;  // [N, kLanes]
    auto* where = reinterpret_cast<std::int32_t*>(memory + N * kLanes);
    for (Index i = 0; i < N * kLanes; ++i) {
        least[i] = __builtin_inff();
        where[i] = -1;
    }
    const Matrix codes{t.turned + panels_before(t, stage) * t.D, wide, 1};
    multiply(N, wide, t.D, {rows, t.D, 1}, codes, scratch(w), [&](Index i, Index j, const float* products, Index n) {
        Vector best = load(least + i * kLanes);
        Lanes code = *reinterpret_cast<const Lanes*>(where + i * kLanes);
        for (Index c = 0; c < n; c += kLanes) {
            const Vector distance = load(norms + j + c) - 2.0f * load(products + c);
            const Lanes closer = distance < best;
            best = closer ? distance : best;
            code = closer ? static_cast<std::int32_t>(j + c) - Lanes{} : code;
        }
        keep(least + i * kLanes, best);
        *reinterpret_cast<Lanes*>(where + i * kLanes) = code;
    });
    for (Index i = 0; i < N; ++i) {
        float best = __builtin_inff();
        Index code = -1;
        for (Index lane = 0; lane < kLanes; ++lane) {
            const std::int32_t start = where[i * kLanes + lane];
            const float distance = least[i * kLanes + lane];
            if (start < 0) continue;
            if (distance < best || (distance == best && start + lane < code)) {
                best = distance;
                code = start + lane;
            }
        }
        found[i * t.stages + stage] = code;
    }
}

// Rows [first, last): codes, code vectors summed over stages, and what `residual_tally` needs to form them again.
void residual_rows(const ResidualTask& t, Index first, Index last, const Workspace& w) {
    const Index N = last - first, D = t.D;
    float* residual = w.buffer;              // [N, D]
    float* moved = residual + N * D;         // [N, D]
    float* nearest_memory = moved + N * D;   // [N, 2 kLanes]
    std::int64_t* found = t.codes + first * t.stages;
    for (Index i = 0; i < N; ++i) {
        std::memcpy(residual + i * D, t.x + (first + i) * t.x_row, static_cast<std::size_t>(D) * sizeof(float));
        t.zero[first + i] = static_cast<std::int32_t>(t.stages);
        for (Index d = 0; d < D; ++d) t.quantized[(first + i) * D + d] = 0.0f;
    }
    for (Index q = 0; q < t.stages; ++q) {
        const float* centre = t.centres + q * D;
        for (Index i = 0; i < N; ++i) {
            const float* r = residual + i * D;
            const float scale = t.cosine ? 1.0f / length(r, D) : 1.0f;
            if (t.cosine) t.lengths[(first + i) * t.stages + q] = scale;
            for (Index d = 0; d < D; ++d) moved[i * D + d] = r[d] * scale - centre[d];
        }
        nearest_of_stage(t, q, N, moved, found, nearest_memory, w);
        const float* codebook = t.codebook + codes_before(t, q) * D;
        for (Index i = 0; i < N; ++i) {
            float* r = residual + i * D;
            float* out = t.quantized + (first + i) * D;
            std::int64_t& code = found[i * t.stages + q];
            if (t.mask && !t.mask[first + i]) {
                code = -1;
                continue;
            }
            for (Index d = 0; d < D; ++d)
                if (!finite(moved[i * D + d])) code = -1;
            if (t.gradient == Gradient::rotation && t.zero[first + i] == t.stages && all_zero(r, D))
                t.zero[first + i] = static_cast<std::int32_t>(q);  // rotating and scaling 0 gives 0
            if (t.zero[first + i] <= q) continue;
            for (Index d = 0; d < D; ++d) {
                const float e = code < 0 ? __builtin_nanf("") : codebook[code * D + d];
                r[d] -= e;
                out[d] += e;
            }
        }
    }
}

void residual_tally(const ResidualTask& t, Index N, Index first, Index last, double* errors, float* counts, float* sums) {
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
                // Nor have the stages after it a code.
                for (Index s = q; s < t.stages; ++s) errors[s] = static_cast<double>(__builtin_nanf(""));
                break;
            }
            const float scale = t.cosine ? t.lengths[i * t.stages + q] : 1.0f;
            const float* e = t.codebook + (offset + code) * D + first;
            if (counts) counts[offset + code] += 1.0f;
            if (n == kLanes) {
                const Vector here = load(r), y = here * scale, off = y - load(e);
                errors[q] += static_cast<double>(total(off * off));
                if (sums) {
                    float* sum = sums + (offset + code) * D + first;
                    keep(sum, load(sum) + y);
                }
                if (t.zero[i] > q) keep(r, here - load(e));
                continue;
            }
            float part = 0.0f;
            for (Index d = 0; d < n; ++d) {
                const float off = r[d] * scale - e[d];
                part += off * off;
            }
            errors[q] += static_cast<double>(part);
            if (sums) {
                float* sum = sums + (offset + code) * D + first;
                for (Index d = 0; d < n; ++d) sum[d] += r[d] * scale;
            }
            if (t.zero[i] > q)
                for (Index d = 0; d < n; ++d) r[d] -= e[d];
        }
    }
}

// out = factor R^T grad, where the rotation R carries y to e and factor = |e| / |y| (arXiv 2410.06424).
inline void rotate_back(const float* grad, const float* y, const float* e, Index D, float* between, float* out) {
    const float of_y = 1.0f / length(y, D), of_e = 1.0f / length(e, D), factor = length(e, D) * of_y;
    for (Index d = 0; d < D; ++d) between[d] = y[d] * of_y + e[d] * of_e;
    const float scale = 1.0f / length(between, D);
    const float along = 2.0f * scale * scale * dot(grad, between, D), back = 2.0f * dot(grad, e, D) * of_e;
    for (Index d = 0; d < D; ++d) out[d] = factor * (grad[d] - along * between[d] + back * y[d] * of_y);
}

void residual_backward(const ResidualTask& t, Index first, Index last, const float* grad, const float* of_errors,
                       float* of_x, const Workspace& w) {
    const Index D = t.D;
    float* r = w.buffer;
    float* y = r + D;
    float* of_y = y + D;
    float* between = of_y + D;
    for (Index i = first; i < last; ++i) {
        float* out = of_x + i * D;
        const float* up = grad + i * D;
        for (Index d = 0; d < D; ++d) out[d] = 0.0f;
        if (t.mask && !t.mask[i]) continue;
        std::memcpy(r, t.x + i * t.x_row, static_cast<std::size_t>(D) * sizeof(float));
        bool zero = false;
        Index offset = 0;
        for (Index q = 0; q < t.stages; offset += t.num_codes[q], ++q) {
            const Index code = t.codes[i * t.stages + q];
            if (code < 0) {
                for (Index d = 0; d < D; ++d) out[d] = __builtin_nanf("");
                break;
            }
            const float* e = t.codebook + (offset + code) * D;
            const float norm = t.cosine ? length(r, D) : 1.0f;
            for (Index d = 0; d < D; ++d) y[d] = r[d] / norm;
            if (t.gradient == Gradient::rotation)
                rotate_back(up, y, e, D, between, of_y);
            else
                for (Index d = 0; d < D; ++d) of_y[d] = t.gradient == Gradient::none ? 0.0f : up[d];
            const float pull = 2.0f * of_errors[q];
            for (Index d = 0; d < D; ++d) of_y[d] += pull * (y[d] - e[d]);
            const float along = t.cosine && norm > kShort ? dot(of_y, y, D) : 0.0f;
            for (Index d = 0; d < D; ++d) out[d] += (of_y[d] - along * y[d]) / norm;
            zero = zero || (t.gradient == Gradient::rotation && all_zero(r, D));
            if (!zero)
                for (Index d = 0; d < D; ++d) r[d] -= e[d];
        }
    }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
