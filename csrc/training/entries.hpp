// The operations of the CPU path of a training step, without Python: what `bind_training.cpp` binds for
// kernels/*/native.py, and what the native tests call.
//
// Tensors are addresses of contiguous memory (0: none), `Index` sizes count entries, and `threads` is at least 1. Only
// that memory is read and written, so that callers may release Python's lock. Any of them may throw std::bad_alloc.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "kernels.hpp"
#include "products.hpp"

namespace spinlock_fast::training {

// two_layers.cpp
void mlp_forward(const PyOperand& x, const PyOperand& w1, std::uintptr_t b1, const PyOperand& w2, Index w2_group,
                 std::uintptr_t b2, const std::vector<Index>& sizes, Index B, Index H, Index E, double rate,
                 std::uintptr_t seed, std::uintptr_t hidden, std::uintptr_t out, int threads);
void mlp_backward(std::uintptr_t grad, const PyOperand& x, const PyOperand& w1, const PyOperand& w2, Index w2_group,
                  std::uintptr_t hidden, const std::vector<Index>& sizes, Index B, Index H, Index E, double rate,
                  std::uintptr_t of_hidden, std::uintptr_t of_x, const PyOperand& of_w1, std::uintptr_t of_b1,
                  std::uintptr_t of_w2, std::uintptr_t of_b2, int threads);

// projections.cpp
void output_linear(std::uintptr_t x, std::uintptr_t gain, std::uintptr_t shift, std::uintptr_t weight,
                   std::uintptr_t bias, const std::vector<Index>& sizes, Index B, Index in, std::uintptr_t scaled,
                   std::uintptr_t out, int threads);
void output_linear_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t gain, std::uintptr_t shift,
                            std::uintptr_t weight, std::uintptr_t scaled, const std::vector<Index>& sizes, Index B,
                            Index in, std::uintptr_t of_x, std::uintptr_t of_gain, std::uintptr_t of_shift,
                            std::uintptr_t of_weight, std::uintptr_t of_bias, int threads);
void normalize(std::uintptr_t x, Index rows, Index n, double eps, std::uintptr_t deviation, int threads);
void normalize_backward(std::uintptr_t grad, std::uintptr_t normed, std::uintptr_t deviation, Index rows, Index n,
                        std::uintptr_t of_x, int threads);
void segments(std::uintptr_t x, Index B, const std::vector<Index>& sizes, std::uintptr_t weight, std::uintptr_t bias,
              double eps, double rate, std::uintptr_t seed, std::uintptr_t normed, std::uintptr_t deviation,
              std::uintptr_t out, int threads);
void segments_backward(std::uintptr_t grad, std::uintptr_t normed, std::uintptr_t deviation, Index B,
                       const std::vector<Index>& sizes, std::uintptr_t weight, double rate, std::uintptr_t seed,
                       std::uintptr_t of_x, std::uintptr_t of_weight, std::uintptr_t of_bias, int threads);

// quantizers.cpp
void assign(std::uintptr_t z, Index z_row, Index N, std::uintptr_t codebook, std::uintptr_t mask, bool centred,
            const std::vector<Index>& num_codes, const std::vector<Index>& dims, std::uintptr_t codes,
            std::uintptr_t quantized, std::uintptr_t error, std::uintptr_t counts, std::uintptr_t sums, int threads);
void assign_backward(std::uintptr_t grad, std::uintptr_t of_error, std::uintptr_t z, std::uintptr_t quantized,
                     std::uintptr_t codes, Index N, const std::vector<Index>& dims, std::uintptr_t of_z, int threads);

// decoders.cpp
double decoders_forward(std::uintptr_t x, std::uintptr_t mean, std::uintptr_t codes, std::uintptr_t codebook,
                        std::uintptr_t w1, std::uintptr_t b1, std::uintptr_t w2, std::uintptr_t b2,
                        const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B, Index F, Index H,
                        std::uintptr_t hidden, std::uintptr_t decoded, std::uintptr_t off, int threads);
void decoders_backward(double scale, std::uintptr_t x, std::uintptr_t codes, std::uintptr_t codebook, std::uintptr_t w1,
                       std::uintptr_t w2, const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B,
                       Index F, Index H, std::uintptr_t hidden, std::uintptr_t decoded, std::uintptr_t off,
                       std::uintptr_t of_quantized, std::uintptr_t of_w1, std::uintptr_t of_b1, std::uintptr_t of_w2,
                       std::uintptr_t of_b2, int threads);

// topo.cpp
std::tuple<double, double, std::vector<double>> topo_forward(std::uintptr_t x, Index F, std::uintptr_t z,
                                                             std::uintptr_t codes, std::uintptr_t codebook, Index S,
                                                             const std::vector<Index>& num_codes,
                                                             const std::vector<Index>& dims, std::uintptr_t distances,
                                                             std::uintptr_t tables, bool missing, int threads);
void topo_backward(double of_pre, double of_post, const std::vector<double>& factors, std::uintptr_t z,
                   std::uintptr_t codes, std::uintptr_t codebook, Index S, const std::vector<Index>& num_codes,
                   const std::vector<Index>& dims, std::uintptr_t distances, std::uintptr_t tables, std::uintptr_t of_z,
                   int threads);

// residual.cpp
void residual_assign(std::uintptr_t x, Index x_row, Index N, Index D, std::uintptr_t codebook,
                     const std::vector<Index>& num_codes, std::uintptr_t mask, bool cosine, int gradient,
                     std::uintptr_t codes, std::uintptr_t quantized, std::uintptr_t errors, std::uintptr_t counts,
                     std::uintptr_t sums, int threads);
void residual_backward(std::uintptr_t grad, std::uintptr_t of_errors, std::uintptr_t x, Index x_row, Index N, Index D,
                       std::uintptr_t codebook, const std::vector<Index>& num_codes, std::uintptr_t mask,
                       std::uintptr_t codes, bool cosine, int gradient, std::uintptr_t of_x, int threads);

}  // namespace spinlock_fast::training
