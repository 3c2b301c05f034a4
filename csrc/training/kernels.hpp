// What one thread does of a training step, for one instruction set. `kernels_impl.hpp` is compiled once for each.
#pragma once

#include <cstdint>

namespace spinlock_fast::training {

using Index = std::int64_t;

// Memory of one thread; sizes in `Kernels`.
struct Workspace {
    float* packed;
    float* rows;
    float* partial;
    float* buffer;
};

// Entry (i, j) of an operand is p[i * row + j * column].
struct Operand {
    const float* p;
    Index row, column;
};

// Which entries dropout keeps: a hash of (seed, row, column) at or above the threshold.
struct Dropout {
    std::uint64_t seed;
    std::uint32_t threshold;  // probability * 2^32; 0 keeps everything
};

// out = then(alpha a b + bias), out [M, N] with rows `out_row` apart.
struct Product {
    Index M, N, K;
    Operand a, b;
    float* out;
    Index out_row;
    float alpha = 1.0f;
    const float* bias = nullptr;      // [N]
    bool relu = false;                // then max(., 0) and dropout
    Dropout dropout = {0, 0};
    Index first_row = 0;              // of `out`, for dropout
    const float* positive = nullptr;  // laid out like out: 0 where it is not positive
    float* column_sums = nullptr;     // [N], of b
    bool sparse = false;              // many entries of a are 0: those are left out
};

// Gradients of the first layer of a two-layer network for some rows:
// dh = (grad w2^T) scale where the hidden value is positive, of_first = [x | 1]^T dh.
struct FirstLayerTask {
    Index rows, n, H, E;
    Operand x;               // [rows, n]
    const float* grad;       // [rows, E]
    Operand w2_turned;       // [E, H]
    const float* hidden;     // [rows, H]
    float scale;
    float* of_first;         // [n + 1, H]
};

// Columns of a codebook and of its codes.
struct Book {
    Index first_column, dims, first_code, codes, first_entry;
};

// Partial decoder of one codebook; see kernels/code_decoders. Row pointers are those of the whole batch.
struct DecoderTask {
    Index B, F, H, G, g, total_dims;
    Book book;
    const float* x;               // [B, F] about its mean
    const float* mean;            // [F]
    const std::int64_t* codes;    // [B, G]
    const float* codebook;        // [sum K D]
    const float *w1, *b1, *w2, *b2;
    float *hidden, *decoded, *off;  // [sum K, H], [sum K, F] about the mean, [sum K, F] times counts
    float *of_quantized, *of_w1, *of_b1, *of_w2, *of_b2;
    float scale;
};

// Nearest codes of one codebook for rows [first, last) of a batch.
struct AssignTask {
    const float* z;  // [N, z_row]
    Index z_row, first, last, G, g, total_dims;
    Book book;
    const float* codebook;     // [sum K D]
    const std::uint8_t* mask;  // [N], or null
    bool centred;
    std::int64_t* codes;  // [N, G]
    float* quantized;     // [N, total_dims]
};

// What the output of a residual quantizer passes on to its input; see kernels/residual_vq.
enum class Gradient : int { none, straight_through, rotation };

// Rows that are quantized stage after stage, each stage what the ones before left over.
struct ResidualTask {
    const float* x;  // [N, x_row]
    Index x_row, D, stages;
    const Index* num_codes;     // [stages]
    const float* codebook;      // [sum K, D]
    const std::uint8_t* mask;   // [N], or null
    bool cosine;
    Gradient gradient;
    // Of `residual_prepare`, in runs of whole panels of `Kernels::columns` codes:
    float* turned;   // per stage [D, K rounded up]: codes about their mean
    float* norms;    // per stage [K rounded up]
    float* centres;  // [stages, D]
    std::int64_t* codes;  // [N, stages]
    float* lengths;       // [N, stages]: of what each stage quantized, where cosine
    std::int32_t* zero;   // [N]: stage from which on the residual is 0 and stays 0
    float* quantized;     // [N, D]
};

// A set of points in groups of columns, and the panels that a product with their transpose reads.
struct Points {
    const float* p;       // [S, row]
    Index S, row, groups;
    const Index* first;   // [groups] first column
    const Index* dims;    // [groups]
    float* panels;        // padded_columns * sum dims
    float* norms;         // [groups, padded_columns]
    Index padded_columns;
};

// Rows whose pairs one task weighs.
constexpr Index kPairBlock = 32;

// The gradients of the correlations by the distances: linear in the distances' deviations from their means.
struct PairWeights {
    const float* d[3];  // d_x, d_z, d_e [S, wide], above the diagonal
    Index S, wide;
    double mean[3], z_by_x, z_by_z, z_by_e, e_by_z, e_by_e;
    float *of_z, *of_e;  // [S, wide]
};

struct Kernels {
    void (*nearest)(const AssignTask&, const Workspace&);
    Index (*nearest_buffer_floats)(Index rows, Index K, Index D);
    // Squared error of all rows of one codebook; counts [K] and sums [K, D] unless null.
    double (*tally)(const AssignTask&, float* counts, float* sums);
    Index lanes, rows, columns, packed_floats, row_floats;
    Index (*partial_floats)(Index M, Index N, Index K);  // of `Workspace::partial`
    void (*product)(const Product&, const Workspace&);
    Index (*sparse_buffer_floats)(Index M, Index K);  // of `Workspace::buffer`, for a sparse product
    void (*first_layer)(const FirstLayerTask&, const Workspace&);
    Index (*first_layer_buffer_floats)(Index rows, Index H);
    // out[c] = sum over rows of a[r, c]
    void (*column_sums)(const float* a, Index rows, Index columns, Index row, float* out);
    // Normalises rows of width n in place; deviations are 1 / sqrt(variance + eps).
    void (*normalize)(float* x, Index rows, Index n, float eps, float* deviation);
    void (*normalize_backward)(const float* grad, const float* normed, const float* deviation, Index rows, Index n, float* of_x);
    // Dropout, then normalisation of each segment, scale and shift, of rows [first, last).
    void (*segments)(const float* x, Index first, Index last, Index total, Index groups, const Index* sizes,
                     const float* weight, const float* bias, float eps, Dropout dropout, float scale, float* normed,
                     float* deviation, float* out);
    void (*segments_backward)(const float* grad, const float* normed, const float* deviation, Index first, Index last,
                              Index total, Index groups, const Index* sizes, const float* weight, Dropout dropout,
                              float scale, float* of_x);
    // columns sums of grad * normed and of grad
    void (*weighted_column_sums)(const float* grad, const float* normed, Index rows, Index total, float* of_weight, float* of_bias);
    // returns this codebook's share of the loss, times B F G
    double (*decoder_forward)(const DecoderTask&, const Workspace&);
    void (*decoder_backward)(const DecoderTask&, const Workspace&);
    Index (*decoder_buffer_floats)(Index B, Index F, Index H, Index K, Index D);
    void (*pack_points)(const Points&, Index group);
    // Mean over groups of the distances, rows [first, first + rows), columns from `first` on.
    void (*distances)(const Points&, Index first, float* out, Index out_row, const Workspace&);
    // out_i = sum over j of w_ij (z_i - z_j) / d_ij of one group, into columns of `out`; weight is upper triangular
    void (*pull)(const Points&, Index group, const float* weight, Index weight_row, float* out, Index out_row, const Workspace&);
    Index (*pull_buffer_floats)(Index S, Index padded_columns, Index dims);
    void (*code_distances)(const float* codes, Index K, Index D, float* table);
    // adds table rows: out[j] += table[code_i][codes[j]] for j in (i, S)
    void (*add_lookup)(const float* table_row, Index K, const std::int32_t* codes, Index first, Index last, float* out);
    // adds the pull of codes to columns of out; weight [S, S] symmetric
    void (*pull_codes)(const float* table, const float* vectors, Index K, Index D, const std::int32_t* codes, Index S,
                       const float* weight, Index weight_row, float* out, Index out_row, const Workspace&);
    Index (*pull_codes_buffer_floats)(Index S, Index K, Index D);
    void (*row_sums)(const float* const d[3], Index first, Index last, double* sums);
    void (*row_moments)(const float* const d[3], Index first, Index last, const double* means, double* sums);
    void (*pair_weights)(const PairWeights&, Index first_row);
    void (*residual_prepare)(const ResidualTask&, Index stage);
    void (*residual_rows)(const ResidualTask&, Index first, Index last, const Workspace&);
    Index (*residual_buffer_floats)(Index rows, Index D);
    // Squared errors [stages] of columns [first, last); counts [sum K] unless null; sums [sum K, D] unless null.
    void (*residual_tally)(const ResidualTask&, Index N, Index first, Index last, double* errors, float* counts, float* sums);
    void (*residual_backward)(const ResidualTask&, Index first, Index last, const float* grad, const float* of_errors,
                              float* of_x, const Workspace&);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// The kernels for this processor.
const Kernels& kernels();

}  // namespace spinlock_fast::training
