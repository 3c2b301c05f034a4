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

// Rows sorted by code, and the codes that have rows: the used codes. Nothing else of a codebook is decoded.
struct SortedRows {
    std::int32_t* order;   // [B] rows of used code u are order[starts[u] : starts[u + 1]]
    std::int32_t* starts;  // [K + 1]
    std::int32_t* codes;   // [K] the used codes
    Index used = 0;
    Index without_code = 0;  // rows without a code, at the end of `order`

    static Index floats(Index B, Index K) { return B + 3 * K + 2; }

    SortedRows(const DecoderTask& t, float* buffer)
        : order(reinterpret_cast<std::int32_t*>(buffer)),
          starts(order + t.B),
          codes(starts + t.slice.num_codes + 1) {
        const Index K = t.slice.num_codes;
        std::int32_t* next = codes + K;  // [K + 1] counts, then positions in `order`; last: rows without a code
        for (Index k = 0; k <= K; ++k) next[k] = 0;
        for (Index row = 0; row < t.B; ++row) ++next[code_of(t, row)];
        without_code = next[K];
        std::int32_t sum = 0;
        for (Index k = 0; k <= K; ++k) {
            const std::int32_t count = next[k];
            if (k < K && count > 0) {
                codes[used] = static_cast<std::int32_t>(k);
                starts[used++] = sum;
            }
            next[k] = sum;
            sum += count;
        }
        starts[used] = next[K];
        for (Index row = 0; row < t.B; ++row) order[next[code_of(t, row)]++] = static_cast<std::int32_t>(row);
    }

private:
    static Index code_of(const DecoderTask& t, Index row) {
        const Index k = t.codes[row * t.G + t.g];
        return k < 0 ? t.slice.num_codes : k;
    }
};

// Copies the vectors of the used codes to out [used, D].
inline void gather_used_codes(const DecoderTask& t, const SortedRows& rows, float* out) {
    const Index D = t.slice.dims;
    for (Index u = 0; u < rows.used; ++u)
        std::memcpy(out + u * D, t.codebook + t.slice.first_entry + rows.codes[u] * D,
                    static_cast<std::size_t>(D) * sizeof(float));
}

Index decoder_buffer_floats(Index B, Index F, Index H, Index K, Index D) {
    return SortedRows::floats(B, K) + K * (F + H + D) + (H + kBlockRows + 2 * kRows) * F +
           (2 * H + F + kRows) * whole_vectors(D) + (F + H + 2 * kRows) * kColumns;
}

inline void plain_product(Index M, Index N, Index K, Operand a, Operand b, float* out, Index out_row,
                          const Workspace& w, const float* bias = nullptr, float* column_sums = nullptr) {
    Product p{M, N, K, a, b, out, out_row};
    p.bias = bias;
    p.column_sums = column_sums;
    product(p, w);
}

// Sets hidden, decoded and error_sums = n_k (P_k - m_k) of the used codes, without gaps. Returns the squared error
// without the sum over |x_b|^2.
double decoder_forward(const DecoderTask& t, const Workspace& w) {
    const Index K = t.slice.num_codes, D = t.slice.dims, F = t.F, H = t.H;
    float* hidden = t.hidden + t.slice.first_code * H;
    float* decoded = t.decoded + t.slice.first_code * F;
    float* error_sums = t.error_sums + t.slice.first_code * F;
    const SortedRows rows(t, w.buffer);
    float* code_vectors = w.buffer + SortedRows::floats(t.B, K);  // [used, D]
    float* bias = code_vectors + K * D;
    gather_used_codes(t, rows, code_vectors);
    Product first{rows.used, H, D, {code_vectors, D, 1}, {t.w1 + t.slice.first_column * H, H, 1}, hidden, H};
    first.bias = t.b1 + t.g * H;
    first.relu = true;
    product(first, w);
    for (Index f = 0; f < F; ++f) bias[f] = t.b2[t.g * F + f] - t.mean[f];
    plain_product(rows.used, F, H, {hidden, H, 1}, {t.w2 + t.g * H * F, F, 1}, decoded, F, w, bias);
    double loss = 0.0;
    for (Index u = 0; u < rows.used; ++u) {
        const Index count = rows.starts[u + 1] - rows.starts[u];
        const float n = static_cast<float>(count), inverse = 1.0f / n;
        float *sum = error_sums + u * F, *code_decoded = decoded + u * F;
        std::memset(sum, 0, static_cast<std::size_t>(F) * sizeof(float));
        for (Index i = 0; i < count; ++i) {
            const float* x = t.x + rows.order[rows.starts[u] + i] * F;
            for (Index f = 0; f < F; ++f) sum[f] += x[f];
        }
        Vector errors = {}, mean_norms = {};
        float error = 0.0f, mean_norm = 0.0f;
        const Index whole = F / kLanes * kLanes;
        for (Index f = 0; f < whole; f += kLanes) {
            const Vector mean = load(sum + f) * inverse, difference = load(code_decoded + f) - mean;
            errors += difference * difference;
            mean_norms += mean * mean;
            store(sum + f, difference * n);
        }
        for (Index f = whole; f < F; ++f) {
            const float mean = sum[f] * inverse, difference = code_decoded[f] - mean;
            error += difference * difference;
            mean_norm += mean * mean;
            sum[f] = difference * n;
        }
        error += horizontal_sum(errors), mean_norm += horizontal_sum(mean_norms);
        loss += static_cast<double>(n) * (static_cast<double>(error) - static_cast<double>(mean_norm));
    }
    return loss;
}

// Straight-through gradients of the quantized rows of a codebook: (P_k - x_b) J_k with the Jacobian J_k of P at code k,
// J_k = W2^T diag(hidden_k > 0) W1^T. For many rows of few dimensions, J_k is computed first; else the products with
// W2^T and W1^T follow each other. Inactive hidden units are skipped.
class CodeGradients {
public:
    CodeGradients(const DecoderTask& task, const SortedRows& sorted, float* buffer)
        : t(task),
          rows(sorted),
          width(whole_vectors(task.slice.dims)),
          w2_active(buffer),
          w1_active(w2_active + (t.H + kRows) * t.F),
          w1_transposed(w1_active + t.H * width),
          difference(w1_transposed + t.H * width),
          jacobian(difference + (kBlockRows + kRows) * t.F),
          difference_panel(jacobian + (t.F + kRows) * width),
          grad_hidden(difference_panel + t.F * kColumns) {
        const float* w1 = t.w1 + t.slice.first_column * t.H;
        for (Index c = 0; c < width; c += kColumns) {
            const Index panel_columns = panel_width(c),
                        D = t.slice.dims - c < panel_columns ? t.slice.dims - c : panel_columns;
            pack_panel({w1 + c * t.H, 1, t.H}, t.H, D, panel_columns, w1_transposed + c * t.H);
        }
    }

    // Writes the gradients of all rows. Those of rows without a code are 0.
    void write_gradients() {
        for (Index u = 0; u < rows.used; ++u) write_gradients_of(u);
        for (Index i = rows.starts[rows.used]; i < rows.starts[rows.used] + rows.without_code; ++i)
            std::memset(row_gradient(rows.order[i]), 0, static_cast<std::size_t>(t.slice.dims) * sizeof(float));
    }

private:
    void write_gradients_of(Index u) {
        const Index n = rows.starts[u + 1] - rows.starts[u], F = t.F, D = t.slice.dims;
        const Index active = gather_active(t.hidden + (t.slice.first_code + u) * t.H);
        const float* decoded = t.decoded + (t.slice.first_code + u) * F;
        const bool with_jacobian = (active + n) * F * D < n * active * (F + D);  // multiplications
        if (with_jacobian) compute_jacobian(active);
        for (Index i0 = 0; i0 < n; i0 += kBlockRows) {
            const std::int32_t* block = rows.order + rows.starts[u] + i0;
            const Index count = n - i0 < kBlockRows ? n - i0 : kBlockRows;
            for (Index i = 0; i < count; ++i) {
                const float* x = t.x + block[i] * F;
                for (Index f = 0; f < F; ++f) difference[i * F + f] = (decoded[f] - x[f]) * t.scale;
            }
            if (with_jacobian) {
                for (Index i = 0; i < count; i += kRows)
                    multiply_rows<false>(difference + i * F, F, F, jacobian, F + kRows, block + i, count - i);
            } else {
                for (Index i = 0; i < count; i += kColumns) multiply_twice(i, count - i, active, block + i);
            }
        }
    }

    float* row_gradient(Index row) const { return t.grad_quantized + row * t.total_dims + t.slice.first_column; }

    Index panel_width(Index column) const { return width - column < kColumns ? kLanes : kColumns; }

    // Copies the weights of the active hidden units without gaps; returns their number.
    Index gather_active(const float* hidden) {
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
        return active;
    }

    void compute_jacobian(Index active) {
        const Index F = t.F, H = t.H;
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

    // Gradients of up to kColumns rows, of which differences [first, first + count) are read: `grad_hidden` = W2 times
    // the differences, [active, kColumns], then its transpose times W1^T.
    void multiply_twice(Index first, Index count, Index active, const std::int32_t* block) {
        const Index F = t.F, n = count < kColumns ? count : kColumns, columns = n <= kLanes ? kLanes : kColumns;
        pack_panel({difference + first * F, 1, F}, F, n, columns, difference_panel);
        for (Index a = 0; a < active; a += kRows) {  // the last tile reads and writes beyond `active`, into padding
            if (columns == kLanes)
                multiply_tile<false, 1>(w2_active + a * F, F, F, difference_panel, grad_hidden + a * kLanes);
            else
                multiply_tile<false, kVectors>(w2_active + a * F, F, F, difference_panel, grad_hidden + a * kColumns);
        }
        for (Index i = 0; i < n; i += kRows)
            multiply_rows<true>(grad_hidden + i, columns, active, w1_active, t.H, block + i, n - i);
    }

    // Writes a [kRows, depth] (see `multiply_tile`) times b, in panels of kColumns that are `panel_depth` deep, to the
    // gradients of the first `count` of the rows of `block`.
    template <bool kPackedRows>
    void multiply_rows(const float* a, Index row, Index depth, const float* b, Index panel_depth,
                       const std::int32_t* block, Index count) {
        alignas(64) float tile[kRows * kColumns];
        for (Index c = 0; c < width; c += kColumns) {
            const Index panel_columns = panel_width(c),
                        D = t.slice.dims - c < panel_columns ? t.slice.dims - c : panel_columns;
            const float* panel = b + c * panel_depth;
            if (panel_columns == kLanes)
                multiply_tile<kPackedRows, 1>(a, row, depth, panel, tile);
            else
                multiply_tile<kPackedRows, kVectors>(a, row, depth, panel, tile);
            for (Index r = 0; r < kRows && r < count; ++r)
                std::memcpy(row_gradient(block[r]) + c, tile + r * panel_columns,
                            static_cast<std::size_t>(D) * sizeof(float));
        }
    }

    const DecoderTask& t;
    const SortedRows& rows;
    Index width;                       // D rounded up to whole vectors
    float* w2_active;                  // [H + kRows, F] rows of W2 of active hidden units
    float *w1_active, *w1_transposed;  // [H, D] of active and of all hidden units, in panels of kColumns
    float* difference;                 // [kBlockRows + kRows, F]
    float* jacobian;                   // [F + kRows, D] in panels of kColumns
    float* difference_panel;           // [F, kColumns] differences, transposed
    float* grad_hidden;                // [H + 2 kRows, kColumns] of active hidden units
};

// Gradients of the weights and, unless null, of the quantized rows, for the loss gradient `scale` per unit of error.
void decoder_backward(const DecoderTask& t, const Workspace& w) {
    const Index K = t.slice.num_codes, D = t.slice.dims, F = t.F, H = t.H, column = t.slice.first_column;
    const float* hidden = t.hidden + t.slice.first_code * H;
    const float* error_sums = t.error_sums + t.slice.first_code * F;
    const Operand w2_transposed{t.w2 + t.g * H * F, 1, F};
    const SortedRows rows(t, w.buffer);
    const Index U = rows.used;
    float* grad_decoded = w.buffer + SortedRows::floats(t.B, K);  // [used, F]
    float* grad_hidden = grad_decoded + K * F;                    // [used, H]
    float* code_vectors = grad_hidden + K * H;                    // [used, D]
    const float scale = t.scale;
    for (Index i = 0; i < U * F; ++i) grad_decoded[i] = error_sums[i] * scale;
    gather_used_codes(t, rows, code_vectors);
    plain_product(H, F, U, {hidden, 1, H}, {grad_decoded, F, 1}, t.grad_w2 + t.g * H * F, F, w, nullptr,
                  t.grad_b2 + t.g * F);
    Product p{U, H, F, {grad_decoded, F, 1}, w2_transposed, grad_hidden, H};
    p.relu_output = hidden;
    product(p, w);
    plain_product(D, H, U, {code_vectors, 1, D}, {grad_hidden, H, 1}, t.grad_w1 + column * H, H, w, nullptr,
                  t.grad_b1 + t.g * H);
    if (t.grad_quantized) CodeGradients(t, rows, code_vectors + K * D).write_gradients();
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
