// Matrix products over several threads, and arguments of Python as operands.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "checks.hpp"
#include "kernels.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

// Address, row stride and column stride of a matrix.
using MatrixAddress = std::tuple<Address, Index, Index>;

inline Operand operand(const MatrixAddress& o) {
    return {pointer<const float>(std::get<0>(o)), std::get<1>(o), std::get<2>(o)};
}

// A matrix of contiguous rows, `row` elements apart, and its transpose.
inline Operand row_major(const float* p, Index row) { return {p, row, 1}; }
inline Operand transposed(const float* p, Index row) { return {p, 1, row}; }

inline Operand block(Operand o, Index i, Index j) { return {o.p + i * o.row + j * o.column, o.row, o.column}; }

// Splits products by rows of the result into pieces that balance the threads.
std::vector<Product> split_rows(const std::vector<Product>& products, int threads);

// Workspaces large enough for each of the products, and at least `partial` and `buffer`.
Workspaces workspaces_for(const std::vector<Product>& products, Index partial = 0, Index buffer = 0);

// Computes independent products.
void run_products(const std::vector<Product>& products, int threads);

// `seed` is the address of a 64-bit seed, read only if rate > 0; `first_row` is the number of row 0.
Dropout make_dropout(double rate, Address seed, Index first_row);

// Factor of kept elements: 1 / (1 - rate).
inline float dropout_scale(double rate) { return static_cast<float>(rate < 1.0 ? 1.0 / (1.0 - rate) : 0.0); }

}  // namespace spinlock_fast::training
