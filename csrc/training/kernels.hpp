// Kernels of one thread for a training step, for one instruction set. `kernels_impl.hpp` is compiled once for each set.
//
// Sizes: B or N rows, G groups (categories or codebooks), F features, H hidden units, E outputs, K codes, D dimensions
// of a codebook, S sampled rows. Gradients are named grad_<variable>.
#pragma once

#include <cstdint>

namespace spinlock_fast::training {

using Index = std::int64_t;

// Scratch memory of one thread, in floats.
struct Workspace {
    float* packed;   // Kernels::packed_floats
    float* rows;     // Kernels::row_floats
    float* partial;  // Kernels::partial_floats(M, N, K)
    float* buffer;   // Kernels::*_buffer_floats(...)
};

// Strided matrix: element (i, j) is p[i * row + j * column].
struct Operand {
    const float* p;
    Index row, column;
};

// An element is kept if hash(seed, first_row + row, column) >= threshold.
struct Dropout {
    std::uint64_t seed;
    std::uint32_t threshold;  // probability * 2^32; 0 keeps everything
    Index first_row = 0;      // number of row 0 in a larger batch, for which random numbers are drawn
};

// out = epilogue(alpha a b + bias) for a [M, K], b [K, N] and out [M, N] with row stride `out_row`.
struct Product {
    Index M, N, K;
    Operand a, b;
    float* out;
    Index out_row;
    float alpha = 1.0f;
    const float* bias = nullptr;  // [N]
    bool relu = false;            // epilogue: ReLU, then dropout without scaling
    Dropout dropout = {0, 0};
    Index first_row = 0;                 // row number of out[0] for dropout
    const float* relu_output = nullptr;  // epilogue: ReLU gradient; 0 where this, strided like out, is <= 0
    float* column_sums = nullptr;        // [N]: also compute the column sums of b
    bool sparse = false;                 // a has many zeros, which may be skipped
};

// Gradients of the first layer of a two-layer network for some rows:
// dh = scale (grad w2^T) where hidden > 0, else 0; first_layer_grad = [x | 1]^T dh.
struct FirstLayerGradientTask {
    Index rows, n, H, E;
    Operand x;              // [rows, n]
    const float* grad;      // [rows, E]
    Operand w2_transposed;  // [E, H]
    const float* hidden;    // [rows, H]
    float scale;
    float* first_layer_grad;  // [n + 1, H]
};

// Position of a codebook in concatenated arrays: columns of z, codes, elements of code vectors, and K x K tables.
struct CodebookSlice {
    Index first_column, dims, first_code, num_codes, first_entry, first_table;
};

// Partial decoder of codebook g; see kernels/code_decoders. Pointers are those of the whole batch.
struct DecoderTask {
    Index B, F, H, G, g, total_dims;
    CodebookSlice slice;
    const float* x;             // [B, F] minus its mean
    const float* mean;          // [F]
    const std::int64_t* codes;  // [B, G]
    const float* codebook;      // [sum K D]
    const float *w1, *b1, *w2, *b2;
    float *hidden, *decoded, *error_sums;  // [sum K, H], [sum K, F] minus the mean, [sum K, F] sums of errors by code
    float *grad_quantized, *grad_w1, *grad_b1, *grad_w2, *grad_b2;
    float scale;  // gradient of the loss with respect to the squared error, times 2
};

// First layer of a network of the code vectors of all codebooks, by tables of its products with each code; see
// code_mlp_impl.hpp.
struct CodeLayerTask {
    Index G, H;
    const std::int64_t* codes;  // [B, G]
    const Index* first_code;    // [G]
    const float* tables;        // [sum K, H]
    const float* bias;          // [H]
    Dropout dropout;
    float* hidden;  // [B, H]
};

// Nearest codes of codebook g for rows [first, last) of a batch; see kernels/vq_assign.
struct AssignTask {
    const float* z;  // [N, z_row]
    Index z_row, first, last, G, g, total_dims;
    CodebookSlice slice;
    const float* codebook;     // [sum K D]
    const std::uint8_t* mask;  // [N] rows to assign, or null
    bool centered;
    std::int64_t* codes;  // [N, G]
    float* quantized;     // [N, total_dims]
};

// Gradient of the quantized output with respect to the input of a residual quantizer; see kernels/residual_vq.
enum class Gradient : int { none, straight_through, rotation };

// Residual quantization of a batch; see kernels/residual_vq.
struct ResidualTask {
    const float* x;  // [N, x_row]
    Index x_row, D, stages;
    const Index* num_codes;    // [stages]
    const float* codebook;     // [sum K, D]
    const std::uint8_t* mask;  // [N] rows to assign, or null
    bool cosine;
    Gradient gradient;
    // Set by `residual_pack_codebook`, with K rounded up to a multiple of `Kernels::columns`:
    float* transposed;         // per stage [D, K]: codes minus their center
    float* norms;              // per stage [K]
    float* centers;            // [stages, D]
    std::int64_t* codes;       // [N, stages]
    float* inverse_norms;      // [N, stages]: 1 / |residual| of each stage, if cosine
    std::int32_t* zero_stage;  // [N]: first stage whose residual is 0 and stays 0
    float* quantized;          // [N, D]
};

// Smoothing of moving counts: none, Laplace, or Laplace for the division alone, which leaves the counts as they are.
enum class Smoothing : int { none, laplace, division };

// Update of a codebook by moving averages; see code_averages_impl.hpp.
struct AverageTask {
    Index num_codes, dims;
    const float *counts, *sums;      // [K], [K, D] of the batch; sums of codes without rows are not read
    std::int64_t* usage;             // [K] or null
    float *cluster_size, *code_sum;  // [K], [K, D] moving counts and sums
    float* codes;                    // [K, D], or null to update the averages only
    float rate, epsilon;             // rate = 1 - decay
    Smoothing smoothing;
    bool unit;               // normalise codes to unit length
    bool keep_without_rows;  // change nothing if no row was assigned to the codebook
};

// Numbers of principal components in the two lower bounds of `JointSearchTask`.
constexpr Index kFilterComponents = 4, kHeadComponents = 32;

// Joint search of the codes of a batch; see kernels/joint_search and joint_search_impl.hpp. H, R and tail_columns are
// multiples of 16. Of the H units, the first R are hidden units with a relu; the others, if any, are linear: one per
// column of the output.
struct JointSearchTask {
    Index H, R, G, sweeps, tail_columns, total_codes, max_codes;
    const Index *first_code, *num_codes;  // [G]
    const float* tables;                  // [sum K, H] contribution of each code to the sums
    const float* filter;                  // [R, kFilterComponents] first columns of P
    const float* head;                    // [R, kHeadComponents] first columns of P
    const float* tail;                    // [R, tail_columns] the others; not used with linear units
    const float* gram;                    // [R, H] P P^T, then, for the linear units, W2
    const float* linear_head;             // [sum K, kHeadComponents] linear units in the first components, or null
    const float* linear_gradient;         // [sum K, R] products of the linear units with W2, or null
    const float* tolerance;               // [B] smallest accepted change of the error
    const float* cost;                    // [B, sum K] added to the error by each code, or null
    float *sums, *gradient;               // [B, H] updated with the codes; the sums of linear units stay zero
    std::int64_t* codes;                  // [B, G]
};

// Points in groups of columns, packed for products with their transpose.
struct Points {
    const float* p;  // [S, row]
    Index S, row, groups;
    const Index* first_column;  // [groups]
    const Index* dims;          // [groups]
    float* panels;              // [sum dims, padded_columns] in panels
    float* norms;               // [groups, padded_columns] squared norms
    Index padded_columns;       // S rounded up
};

// Number of rows per call of `correlation_gradient`.
constexpr Index kPairBlock = 32;

// Gradients of the correlations with respect to the distances: linear in the distances minus their means.
struct CorrelationGradient {
    const float* d[3];  // d_x, d_z, d_e [S, row_stride], valid above the diagonal
    Index S, row_stride;
    double mean[3], z_by_x, z_by_z, z_by_e, e_by_z, e_by_e;
    float *grad_z, *grad_e;  // [S, row_stride]
};

struct Kernels {
    // Tile sizes and sizes of `Workspace`, in floats.
    Index lanes, rows, columns, packed_floats, row_floats;
    Index (*partial_floats)(Index M, Index N, Index K);

    // product_impl.hpp
    void (*product)(const Product&, const Workspace&);
    Index (*sparse_buffer_floats)(Index M, Index K);
    void (*first_layer_gradient)(const FirstLayerGradientTask&, const Workspace&);
    Index (*first_layer_gradient_buffer_floats)(Index rows, Index H);
    void (*column_sums)(const float* a, Index rows, Index columns, Index row, float* out);

    // layer_norm_impl.hpp
    void (*normalize)(float* x, Index rows, Index n, float eps, float* inv_std);
    void (*normalize_backward)(const float* grad, const float* normalized, const float* inv_std, Index rows, Index n,
                               float* grad_x);
    void (*segment_layer_norm)(const float* x, Index first, Index last, Index total, Index groups, const Index* sizes,
                               const float* weight, const float* bias, float eps, Dropout dropout, float scale,
                               float* normalized, float* inv_std, float* out);
    void (*segment_layer_norm_backward)(const float* grad, const float* normalized, const float* inv_std, Index first,
                                        Index last, Index total, Index groups, const Index* sizes, const float* weight,
                                        Dropout dropout, float scale, float* grad_x);
    void (*weighted_column_sums)(const float* grad, const float* normalized, Index rows, Index total,
                                 float* grad_weight, float* grad_bias);

    // Weights of a linear layer whose input is x gain + shift: sets scaled = row * gain, returns the sum of row * shift.
    float (*fold_scale)(const float* row, const float* gain, const float* shift, Index n, float* scaled);
    // Gradients: adds to those of gain and shift; replaces `grad_row`, the gradient of `scaled`, by that of `row`.
    void (*fold_scale_backward)(const float* row, const float* gain, const float* shift, float grad_offset, Index n,
                                float* grad_row, float* grad_gain, float* grad_shift);

    // vq_assign_impl.hpp
    void (*assign_nearest)(const AssignTask&, const Workspace&);
    Index (*assign_buffer_floats)(Index rows, Index K, Index D);
    double (*assign_statistics)(const AssignTask&, float* counts, float* sums);

    // residual_vq_impl.hpp
    void (*residual_pack_codebook)(const ResidualTask&, Index stage);
    void (*residual_assign_rows)(const ResidualTask&, Index first, Index last, const Workspace&);
    Index (*residual_buffer_floats)(Index rows, Index D);
    void (*residual_statistics)(const ResidualTask&, Index N, Index first, Index last, double* errors, float* counts,
                                float* sums);
    void (*residual_backward)(const ResidualTask&, Index first, Index last, const float* grad, const float* grad_errors,
                              float* grad_x, const Workspace&);

    // code_averages_impl.hpp
    bool (*average_counts)(const AverageTask&, float* divisors);
    void (*average_codes)(const AverageTask&, const float* divisors, Index first, Index last);

    // code_decoders_impl.hpp
    double (*decoder_forward)(const DecoderTask&, const Workspace&);
    void (*decoder_backward)(const DecoderTask&, const Workspace&);
    Index (*decoder_buffer_floats)(Index B, Index F, Index H, Index K, Index D);

    // code_mlp_impl.hpp
    void (*code_layer_rows)(const CodeLayerTask&, Index first, Index last);
    void (*sum_rows_by_code)(const std::int64_t* codes, Index G, Index g, const float* rows, Index B, Index H, Index K,
                             float* sums);

    // code_cosines_impl.hpp
    double (*squared_cosines)(const float* codes, Index K, Index D, const Workspace&);

    // joint_search_impl.hpp
    void (*joint_search_rows)(const JointSearchTask&, Index first, Index last, const Workspace&);
    Index (*joint_search_buffer_floats)(Index H, Index K);

    // pairwise_distances_impl.hpp
    void (*pack_points)(const Points&, Index group);
    void (*mean_distances)(const Points&, Index first, float* out, Index out_row, const Workspace&);
    void (*code_distance_table)(const float* codes, Index K, Index D, float* table);
    void (*add_code_distances)(const float* table_row, Index K, const std::int32_t* codes, Index first, Index last,
                               float* out);
    void (*row_sums)(const float* const d[3], Index first, Index last, double* sums);
    void (*row_moments)(const float* const d[3], Index first, Index last, const double* means, double* sums);
    void (*correlation_gradient)(const CorrelationGradient&, Index first_row);

    // distance_gradient_impl.hpp
    void (*distance_gradient)(const Points&, Index group, const float* weight, Index weight_row, float* out,
                              Index out_row, const Workspace&);
    Index (*distance_gradient_buffer_floats)(Index S, Index padded_columns, Index dims);
    void (*code_distance_gradient)(const float* table, const float* vectors, Index K, Index D,
                                   const std::int32_t* codes, Index S, const float* weight, Index weight_row,
                                   float* out, Index out_row, const Workspace&);
    Index (*code_distance_gradient_buffer_floats)(Index S, Index K, Index D);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// The kernels of the selected instruction set; see `instruction_sets.hpp`.
const Kernels& kernels();

}  // namespace spinlock_fast::training
