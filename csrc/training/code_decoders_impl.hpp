// Partial decoders P_k = relu(e_k W1 + b1) W2 + b2, evaluated once per code instead of once per row. With rows b of
// code k, their number n_k and mean m_k, the squared error is
//   sum_b |P_k - x_b|^2 = sum_k n_k (|P_k - m_k|^2 - |m_k|^2) + sum_b |x_b|^2,
// whose gradient with respect to P_k is 2 n_k (P_k - m_k). x and P are relative to the mean row. See
// kernels/code_decoders.
#pragma once

#include "product_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::DecoderTask;

constexpr Index kBlockRows = 256;  // rows of a code per block

Index decoder_buffer_floats(Index B, Index F, Index H, Index K, Index D) {
    return K * (F + H) + (H + kBlockRows + kRows) * F + (2 * H + F + kRows) * whole_vectors(D) + B + K + 1;
}

inline void plain_product(Index M, Index N, Index K, Operand a, Operand b, float* out, Index out_row,
                          const Workspace& w, const float* bias = nullptr, float* column_sums = nullptr) {
    Product p{M, N, K, a, b, out, out_row};
    p.bias = bias;
    p.column_sums = column_sums;
    product(p, w);
}

// Sets hidden, decoded and error_sums = n_k (P_k - m_k). Returns the squared error without the sum over |x_b|^2.
double decoder_forward(const DecoderTask& t, const Workspace& w) {
    const Index K = t.slice.num_codes, D = t.slice.dims, F = t.F, H = t.H;
    float* hidden = t.hidden + t.slice.first_code * H;
    float* decoded = t.decoded + t.slice.first_code * F;
    float* error_sums = t.error_sums + t.slice.first_code * F;
    const float *code_vectors = t.codebook + t.slice.first_entry, *w1 = t.w1 + t.slice.first_column * H;
    Product first{K, H, D, {code_vectors, D, 1}, {w1, H, 1}, hidden, H};
    first.bias = t.b1 + t.g * H;
    first.relu = true;
    product(first, w);
    float* bias = w.buffer;
    float* counts = w.buffer + F;
    for (Index f = 0; f < F; ++f) bias[f] = t.b2[t.g * F + f] - t.mean[f];
    plain_product(K, F, H, {hidden, H, 1}, {t.w2 + t.g * H * F, F, 1}, decoded, F, w, bias);
    std::memset(error_sums, 0, static_cast<std::size_t>(K * F) * sizeof(float));
    for (Index k = 0; k < K; ++k) counts[k] = 0.0f;
    for (Index b = 0; b < t.B; ++b) {
        const Index k = t.codes[b * t.G + t.g];
        if (k < 0) continue;
        counts[k] += 1.0f;
        const float* x = t.x + b * F;
        float* sum = error_sums + k * F;
        for (Index f = 0; f < F; ++f) sum[f] += x[f];
    }
    double loss = 0.0;
    for (Index k = 0; k < K; ++k) {
        const float n = counts[k], inverse = n > 0.0f ? 1.0f / n : 0.0f;
        float error = 0.0f, mean_norm = 0.0f;
        for (Index f = 0; f < F; ++f) {
            const float mean = error_sums[k * F + f] * inverse, difference = decoded[k * F + f] - mean;
            error += difference * difference;
            mean_norm += mean * mean;
            error_sums[k * F + f] = n > 0.0f ? difference * n : 0.0f;
        }
        if (n > 0.0f) loss += static_cast<double>(n) * (static_cast<double>(error) - static_cast<double>(mean_norm));
    }
    return loss;
}

// Straight-through gradients of the quantized rows of a codebook: (P_k - x_b) J_k, J_k the Jacobian of P at code k.
class CodeGradients {
public:
    CodeGradients(const DecoderTask& task, float* buffer)
        : t(task),
          width(whole_vectors(task.slice.dims)),
          w2_active(buffer),
          w1_active(w2_active + t.H * t.F),
          w1_transposed(w1_active + t.H * width),
          difference(w1_transposed + t.H * width),
          jacobian(difference + (kBlockRows + kRows) * t.F),
          order(reinterpret_cast<std::int32_t*>(jacobian + (t.F + kRows) * width)),
          starts(order + t.B) {
        const float* w1 = t.w1 + t.slice.first_column * t.H;
        for (Index c = 0; c < width; c += kColumns) {
            const Index panel_columns = panel_width(c),
                        D = t.slice.dims - c < panel_columns ? t.slice.dims - c : panel_columns;
            pack_panel({w1 + c * t.H, 1, t.H}, t.H, D, panel_columns, w1_transposed + c * t.H);
        }
    }

    // Counting sort by code: rows of code k are order[starts[k] : starts[k + 1]]. Rows without a code get gradient 0.
    void sort_rows() {
        const Index K = t.slice.num_codes;
        for (Index k = 0; k <= K; ++k) starts[k] = 0;
        for (Index row = 0; row < t.B; ++row)
            if (const Index k = t.codes[row * t.G + t.g]; k >= 0) ++starts[k + 1];
        for (Index k = 0; k < K; ++k) starts[k + 1] += starts[k];
        for (Index row = 0; row < t.B; ++row) {
            const Index k = t.codes[row * t.G + t.g];
            if (k >= 0)
                order[starts[k]++] = static_cast<std::int32_t>(row);
            else
                std::memset(row_gradient(row), 0, static_cast<std::size_t>(t.slice.dims) * sizeof(float));
        }
        for (Index k = K; k > 0; --k) starts[k] = starts[k - 1];
        starts[0] = 0;
    }

    // Writes the gradients of all rows of code k.
    void write_gradients(Index k) {
        const Index n = starts[k + 1] - starts[k], F = t.F;
        if (n == 0) return;
        compute_jacobian(t.hidden + (t.slice.first_code + k) * t.H);
        const float* decoded = t.decoded + (t.slice.first_code + k) * F;
        for (Index i0 = 0; i0 < n; i0 += kBlockRows) {
            const std::int32_t* rows = order + starts[k] + i0;
            const Index count = n - i0 < kBlockRows ? n - i0 : kBlockRows;
            for (Index i = 0; i < count; ++i) {
                const float* x = t.x + rows[i] * F;
                for (Index f = 0; f < F; ++f) difference[i * F + f] = (decoded[f] - x[f]) * t.scale;
            }
            for (Index i = 0; i < count; i += kRows) multiply_rows(difference + i * F, rows + i, count - i);
        }
    }

private:
    float* row_gradient(Index row) const { return t.grad_quantized + row * t.total_dims + t.slice.first_column; }

    Index panel_width(Index column) const { return width - column < kColumns ? kLanes : kColumns; }

    // Sets `jacobian` = W2^T diag(hidden > 0) W1^T; inactive hidden units are skipped.
    void compute_jacobian(const float* hidden) {
        const Index F = t.F, H = t.H;
        Index active = 0;
        for (Index h = 0; h < H; ++h) {
            if (!(hidden[h] > 0.0f)) continue;
            std::memcpy(w2_active + active * F, t.w2 + (t.g * H + h) * F, static_cast<std::size_t>(F) * sizeof(float));
            for (Index c = 0; c < width; c += kColumns)
                for (Index panel_columns = panel_width(c), v = 0; v < panel_columns; v += kLanes)
                    store(w1_active + c * H + active * panel_columns + v,
                          load(w1_transposed + c * H + h * panel_columns + v));
            ++active;
        }
        for (Index c = 0; c < width; c += kColumns) {
            float* out = jacobian + c * (F + kRows);
            for (Index f = 0; f < F; f += kRows) {  // the last tile reads and writes beyond F, into padding
                if (panel_width(c) == kLanes)
                    multiply_tile<true, 1>(w2_active + f, F, active, w1_active + c * H, out + f * kLanes);
                else
                    multiply_tile<true, kVectors>(w2_active + f, F, active, w1_active + c * H, out + f * kColumns);
            }
        }
    }

    // Writes differences [kRows, F] times the Jacobian to the gradients of the first `count` of `rows`.
    void multiply_rows(const float* differences, const std::int32_t* rows, Index count) {
        alignas(64) float tile[kRows * kColumns];
        for (Index c = 0; c < width; c += kColumns) {
            const Index panel_columns = panel_width(c),
                        D = t.slice.dims - c < panel_columns ? t.slice.dims - c : panel_columns;
            const float* panel = jacobian + c * (t.F + kRows);
            if (panel_columns == kLanes)
                multiply_tile<false, 1>(differences, t.F, t.F, panel, tile);
            else
                multiply_tile<false, kVectors>(differences, t.F, t.F, panel, tile);
            for (Index r = 0; r < kRows && r < count; ++r)
                std::memcpy(row_gradient(rows[r]) + c, tile + r * panel_columns,
                            static_cast<std::size_t>(D) * sizeof(float));
        }
    }

    const DecoderTask& t;
    Index width;                       // D rounded up to whole vectors
    float* w2_active;                  // [H, F] rows of W2 of active hidden units
    float *w1_active, *w1_transposed;  // [H, D] of active and of all hidden units, in panels of kColumns
    float* difference;                 // [kBlockRows + kRows, F]
    float* jacobian;                   // [F + kRows, D] in panels of kColumns
    std::int32_t *order, *starts;      // [B], [K + 1]
};

// Gradients of the weights and, unless null, of the quantized rows, for the loss gradient `scale` per unit of error.
void decoder_backward(const DecoderTask& t, const Workspace& w) {
    const Index K = t.slice.num_codes, D = t.slice.dims, F = t.F, H = t.H, column = t.slice.first_column;
    const float* hidden = t.hidden + t.slice.first_code * H;
    const float* code_vectors = t.codebook + t.slice.first_entry;
    const Operand w2_transposed{t.w2 + t.g * H * F, 1, F};
    float* grad_decoded = w.buffer;             // [K, F]
    float* grad_hidden = grad_decoded + K * F;  // [K, H]
    const float* error_sums = t.error_sums + t.slice.first_code * F;
    const float scale = t.scale;
    for (Index i = 0; i < K * F; ++i) grad_decoded[i] = error_sums[i] * scale;
    plain_product(H, F, K, {hidden, 1, H}, {grad_decoded, F, 1}, t.grad_w2 + t.g * H * F, F, w, nullptr,
                  t.grad_b2 + t.g * F);
    Product p{K, H, F, {grad_decoded, F, 1}, w2_transposed, grad_hidden, H};
    p.relu_output = hidden;
    product(p, w);
    plain_product(D, H, K, {code_vectors, 1, D}, {grad_hidden, H, 1}, t.grad_w1 + column * H, H, w, nullptr,
                  t.grad_b1 + t.g * H);
    if (!t.grad_quantized) return;
    CodeGradients gradients(t, grad_hidden + K * H);
    gradients.sort_rows();
    for (Index k = 0; k < K; ++k) gradients.write_gradients(k);
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
