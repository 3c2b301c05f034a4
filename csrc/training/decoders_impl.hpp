// Partial decoders, evaluated per code: see kernels/code_decoders.
#pragma once

#include "products_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::DecoderTask;

constexpr Index kGathered = 256;  // rows of one code that are multiplied at once

Index decoder_buffer_floats(Index B, Index F, Index H, Index K, Index D) {
    return K * (F + H) + (H + kGathered + kRows) * F + (2 * H + F + kRows) * whole_vectors(D) + B + K + 1;
}

inline void simple_product(Index M, Index N, Index K, Operand a, Operand b, float* out, Index out_row, const Workspace& w,
                           const float* bias = nullptr, float* column_sums = nullptr) {
    Product p{M, N, K, a, b, out, out_row};
    p.bias = bias;
    p.column_sums = column_sums;
    product(p, w);
}

double decoder_forward(const DecoderTask& t, const Workspace& w) {
    const Index K = t.book.codes, D = t.book.dims, F = t.F, H = t.H;
    float* hidden = t.hidden + t.book.first_code * H;
    float* decoded = t.decoded + t.book.first_code * F;
    float* off = t.off + t.book.first_code * F;
    Product first{K, H, D, {t.codebook + t.book.first_entry, D, 1}, {t.w1 + t.book.first_column * H, H, 1}, hidden, H};
    first.bias = t.b1 + t.g * H;
    first.relu = true;
    product(first, w);
    float* bias = w.buffer;
    float* counts = w.buffer + F;
    for (Index f = 0; f < F; ++f) bias[f] = t.b2[t.g * F + f] - t.mean[f];
    simple_product(K, F, H, {hidden, H, 1}, {t.w2 + t.g * H * F, F, 1}, decoded, F, w, bias);
    std::memset(off, 0, static_cast<std::size_t>(K * F) * sizeof(float));
    for (Index k = 0; k < K; ++k) counts[k] = 0.0f;
    for (Index b = 0; b < t.B; ++b) {
        const Index k = t.codes[b * t.G + t.g];
        if (k < 0) continue;
        counts[k] += 1.0f;
        const float* x = t.x + b * F;
        float* sum = off + k * F;
        for (Index f = 0; f < F; ++f) sum[f] += x[f];
    }
    double loss = 0.0;
    for (Index k = 0; k < K; ++k) {
        const float n = counts[k], inverse = n > 0.0f ? 1.0f / n : 0.0f;
        float part = 0.0f, around = 0.0f;
        for (Index f = 0; f < F; ++f) {
            const float mean = off[k * F + f] * inverse, difference = decoded[k * F + f] - mean;
            part += difference * difference;
            around += mean * mean;
            off[k * F + f] = n > 0.0f ? difference * n : 0.0f;
        }
        if (n > 0.0f) loss += static_cast<double>(n) * (static_cast<double>(part) - static_cast<double>(around));
    }
    return loss;
}

// Straight-through gradients of the rows of a codebook: (P_k - x_b) J_k, J_k the Jacobian of the decoder at code k.
class CodeGradients {
public:
    CodeGradients(const DecoderTask& task, float* buffer)
        : t(task), width(whole_vectors(task.book.dims)), of_active(buffer), to_active(of_active + t.H * t.F),
          turned(to_active + t.H * width), difference(turned + t.H * width), jacobian(difference + (kGathered + kRows) * t.F),
          order(reinterpret_cast<std::int32_t*>(jacobian + (t.F + kRows) * width)), starts(order + t.B) {
        const float* w1 = t.w1 + t.book.first_column * t.H;
        for (Index c = 0; c < width; c += kColumns) {
            const Index wide = panel_width(c), D = t.book.dims - c < wide ? t.book.dims - c : wide;
            pack_panel({w1 + c * t.H, 1, t.H}, t.H, D, wide, turned + c * t.H);
        }
    }

    // Rows by code: those of code k become order[starts[k] : starts[k + 1]]. Rows without a code get no gradient.
    void sort_rows() {
        const Index K = t.book.codes;
        for (Index k = 0; k <= K; ++k) starts[k] = 0;
        for (Index row = 0; row < t.B; ++row)
            if (const Index k = t.codes[row * t.G + t.g]; k >= 0) ++starts[k + 1];
        for (Index k = 0; k < K; ++k) starts[k + 1] += starts[k];
        for (Index row = 0; row < t.B; ++row) {
            const Index k = t.codes[row * t.G + t.g];
            if (k >= 0)
                order[starts[k]++] = static_cast<std::int32_t>(row);
            else
                std::memset(gradient_of(row), 0, static_cast<std::size_t>(t.book.dims) * sizeof(float));
        }
        for (Index k = K; k > 0; --k) starts[k] = starts[k - 1];
        starts[0] = 0;
    }

    // The gradients of all rows of code k.
    void pass_through(Index k) {
        const Index n = starts[k + 1] - starts[k], F = t.F;
        if (n == 0) return;
        find_jacobian(t.hidden + (t.book.first_code + k) * t.H);
        const float* goal = t.decoded + (t.book.first_code + k) * F;
        for (Index i0 = 0; i0 < n; i0 += kGathered) {
            const std::int32_t* rows = order + starts[k] + i0;
            const Index few = n - i0 < kGathered ? n - i0 : kGathered;
            for (Index i = 0; i < few; ++i) {
                const float* x = t.x + rows[i] * F;
                for (Index f = 0; f < F; ++f) difference[i * F + f] = (goal[f] - x[f]) * t.scale;
            }
            for (Index i = 0; i < few; i += kRows) multiply_rows(difference + i * F, rows + i, few - i);
        }
    }

private:
    float* gradient_of(Index row) const { return t.of_quantized + row * t.total_dims + t.book.first_column; }

    Index panel_width(Index column) const { return width - column < kColumns ? kLanes : kColumns; }

    // Writes `jacobian`; only hidden units above 0 take part.
    void find_jacobian(const float* hidden) {
        const Index F = t.F, H = t.H;
        Index active = 0;
        for (Index h = 0; h < H; ++h) {
            if (!(hidden[h] > 0.0f)) continue;
            std::memcpy(of_active + active * F, t.w2 + (t.g * H + h) * F, static_cast<std::size_t>(F) * sizeof(float));
            for (Index c = 0; c < width; c += kColumns)
                for (Index wide = panel_width(c), v = 0; v < wide; v += kLanes)
                    keep(to_active + c * H + active * wide + v, load(turned + c * H + h * wide + v));
            ++active;
        }
        for (Index c = 0; c < width; c += kColumns) {
            float* out = jacobian + c * (F + kRows);
            for (Index f = 0; f < F; f += kRows) {  // the last tile reads and writes beyond F
                if (panel_width(c) == kLanes)
                    multiply_tile<true, 1>(of_active + f, F, active, to_active + c * H, out + f * kLanes);
                else
                    multiply_tile<true, kVectors>(of_active + f, F, active, to_active + c * H, out + f * kColumns);
            }
        }
    }

    // left [kRows, F] times the Jacobian, into the gradients of the first `few` of `rows`.
    void multiply_rows(const float* left, const std::int32_t* rows, Index few) {
        alignas(64) float tile[kRows * kColumns];
        for (Index c = 0; c < width; c += kColumns) {
            const Index wide = panel_width(c), D = t.book.dims - c < wide ? t.book.dims - c : wide;
            const float* panel = jacobian + c * (t.F + kRows);
            if (wide == kLanes)
                multiply_tile<false, 1>(left, t.F, t.F, panel, tile);
            else
                multiply_tile<false, kVectors>(left, t.F, t.F, panel, tile);
            for (Index r = 0; r < kRows && r < few; ++r)
                std::memcpy(gradient_of(rows[r]) + c, tile + r * wide, static_cast<std::size_t>(D) * sizeof(float));
        }
    }

    const DecoderTask& t;
    Index width;                   // D in whole vectors
    float* of_active;              // [H, F] rows of the second weights
    float *to_active, *turned;     // [H, D] of the first weights, active ones and all, in panels of kColumns
    float* difference;             // [kGathered and a tile, F]
    float* jacobian;               // [F and a tile, D] in panels of kColumns
    std::int32_t *order, *starts;  // [B], [K + 1]
};

void decoder_backward(const DecoderTask& t, const Workspace& w) {
    const Index K = t.book.codes, D = t.book.dims, F = t.F, H = t.H, column = t.book.first_column;
    const float* hidden = t.hidden + t.book.first_code * H;
    const float* vectors = t.codebook + t.book.first_entry;
    const Operand w2_turned{t.w2 + t.g * H * F, 1, F};
    float* of_decoded = w.buffer;           // [K, F]
    float* of_hidden = of_decoded + K * F;  // [K, H]
    const float* off = t.off + t.book.first_code * F;
    const float scale = t.scale;
    for (Index i = 0; i < K * F; ++i) of_decoded[i] = off[i] * scale;
    simple_product(H, F, K, {hidden, 1, H}, {of_decoded, F, 1}, t.of_w2 + t.g * H * F, F, w, nullptr, t.of_b2 + t.g * F);
    Product p{K, H, F, {of_decoded, F, 1}, w2_turned, of_hidden, H};
    p.positive = hidden;
    product(p, w);
    simple_product(D, H, K, {vectors, 1, D}, {of_hidden, H, 1}, t.of_w1 + column * H, H, w, nullptr, t.of_b1 + t.g * H);
    if (!t.of_quantized) return;
    CodeGradients gradients(t, of_hidden + K * H);
    gradients.sort_rows();
    for (Index k = 0; k < K; ++k) gradients.pass_through(k);
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
