// The CPU operations of a training step: bound by `bind_training.cpp` and called by the C++ tests.
//
// Tensors are addresses of contiguous memory (0: none), sizes count elements, and `threads` is at least 1. Operations
// access only that memory and no Python API, so callers may release the GIL. All may throw std::bad_alloc.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "kernels.hpp"
#include "parallel_products.hpp"

namespace spinlock_fast::training {

// grouped_mlp.cpp
void mlp_forward(const MatrixAddress& x, const MatrixAddress& w1, Address b1, const MatrixAddress& w2, Index w2_group,
                 Address b2, const std::vector<Index>& sizes, Index B, Index H, Index E, double rate, Address seed,
                 Index first_row, Index batch_rows, Address hidden, Address out, int threads);
void mlp_backward(Address grad, const MatrixAddress& x, const MatrixAddress& w1, const MatrixAddress& w2,
                  Index w2_group, Address hidden, const std::vector<Index>& sizes, Index B, Index H, Index E,
                  double rate, Address grad_hidden, Address grad_x, const MatrixAddress& grad_w1, Address grad_b1,
                  Address grad_w2, Address grad_b2, int threads);

// output_linear.cpp
void output_linear(Address x, Address gain, Address shift, Address weight, Address bias,
                   const std::vector<Index>& sizes, Index B, Index in, Address scaled, Address out, int threads);
void output_linear_backward(Address grad, Address x, Address gain, Address shift, Address weight, Address scaled,
                            const std::vector<Index>& sizes, Index B, Index in, Address grad_x, Address grad_gain,
                            Address grad_shift, Address grad_weight, Address grad_bias, int threads);

// layer_norm.cpp
void normalize(Address x, Index rows, Index n, double eps, Address inv_std, int threads);
void normalize_backward(Address grad, Address normalized, Address inv_std, Index rows, Index n, Address grad_x,
                        int threads);
void segment_layer_norm(Address x, Index B, const std::vector<Index>& sizes, Address weight, Address bias, double eps,
                        double rate, Address seed, Index first_row, Address normalized, Address inv_std, Address out,
                        int threads);
void segment_layer_norm_backward(Address grad, Address normalized, Address inv_std, Index B,
                                 const std::vector<Index>& sizes, Address weight, double rate, Address seed,
                                 Index first_row, Address grad_x, Address grad_weight, Address grad_bias, int threads);

// vq_assign.cpp
void assign(Address z, Index z_row, Index N, Address codebook, Address mask, bool centered,
            const std::vector<Index>& num_codes, const std::vector<Index>& dims, Address codes, Address quantized,
            Address error, Address counts, Address sums, int threads);
void assign_backward(Address grad, Address grad_error, Address z, Address quantized, Address codes, Index N,
                     const std::vector<Index>& dims, Address grad_z, int threads);

// code_decoders.cpp
double decoders_forward(Address x, Address mean, Address codes, Address codebook, Address w1, Address b1, Address w2,
                        Address b2, const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B,
                        Index F, Index H, Address hidden, Address decoded, Address error_sums, int threads);
void decoders_backward(double scale, Address x, Address codes, Address codebook, Address w1, Address w2,
                       const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B, Index F, Index H,
                       Address hidden, Address decoded, Address error_sums, Address grad_quantized, Address grad_w1,
                       Address grad_b1, Address grad_w2, Address grad_b2, int threads);

// code_mlp.cpp
void code_mlp_forward(Address codes, Address codebook, const MatrixAddress& w1, Address b1, const MatrixAddress& w2,
                      Address b2, const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B,
                      Index H, Index E, double rate, Address seed, Address tables, Address hidden, Address out,
                      int threads);
void code_mlp_backward(Address grad, Address codes, Address codebook, const MatrixAddress& w1, const MatrixAddress& w2,
                       Address hidden, const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B,
                       Index H, Index E, double rate, Address grad_hidden, Address sums, Address grad_quantized,
                       Address grad_w1, Address grad_b1, Address grad_w2, Address grad_b2, int threads);

// code_cosines.cpp
double code_cosines(Address codebook, const std::vector<Index>& num_codes, const std::vector<Index>& dims, int threads);

// code_averages.cpp
void average_codes(Address codes, Address cluster_size, Address code_sum, Address usage, Address counts, Address sums,
                   const std::vector<Index>& num_codes, const std::vector<Index>& dims, double rate, int smoothing,
                   double epsilon, bool unit, bool keep_without_rows, int threads);

// joint_search.cpp
void joint_search(Address codes, Address sums, Address gradient, Address tolerance, Address cost, Address tables,
                  Address filter, Address head, Address tail, Address gram, Address linear_head,
                  Address linear_gradient, const std::vector<Index>& num_codes, Index B, Index H, Index linear_units,
                  Index tail_columns, Index sweeps, int threads);

// topo_loss.cpp
std::tuple<double, double, std::vector<double>> topo_forward(Address x, Index F, Address z, Address codes,
                                                             Address codebook, Index S,
                                                             const std::vector<Index>& num_codes,
                                                             const std::vector<Index>& dims, Address distances,
                                                             Address tables, bool missing, int threads);
void topo_backward(double grad_pre, double grad_post, const std::vector<double>& factors, Address z, Address codes,
                   Address codebook, Index S, const std::vector<Index>& num_codes, const std::vector<Index>& dims,
                   Address distances, Address tables, Address grad_z, int threads);

// residual_vq.cpp
void residual_assign(Address x, Index x_row, Index N, Index D, Address codebook, const std::vector<Index>& num_codes,
                     Address mask, bool cosine, int gradient, Address codes, Address quantized, Address errors,
                     Address counts, Address sums, int threads);
void residual_backward(Address grad, Address grad_errors, Address x, Index x_row, Index N, Index D, Address codebook,
                       const std::vector<Index>& num_codes, Address mask, Address codes, bool cosine, int gradient,
                       Address grad_x, int threads);

// quantize_step.cpp
void quantize_step(Address x, Index N, Index D, Address codebook, Index K, bool cosine, int gradient, double weight,
                   Address codes, Address quantized, Address loss, Address saved_codebook, Address saved_codes,
                   Address counts, Address sums, Address cluster_size, Address code_sum, Address usage, double rate,
                   double epsilon, int threads);
void quantize_step_backward(Address grad, Address grad_loss, Address x, Index N, Index D, Address codebook, Index K,
                            Address codes, bool cosine, int gradient, double weight, Address grad_x, int threads);

}  // namespace spinlock_fast::training
