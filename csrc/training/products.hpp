// Products that threads share, and operands as Python hands them over.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "kernels.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

// Address, distance of rows, distance of columns.
using PyOperand = std::tuple<std::uintptr_t, Index, Index>;

inline Operand operand(const PyOperand& o) { return {at<const float>(std::get<0>(o)), std::get<1>(o), std::get<2>(o)}; }

inline Operand block(Operand o, Index i, Index j) { return {o.p + i * o.row + j * o.column, o.row, o.column}; }

// Splits products by rows of their results, so that threads share them evenly.
std::vector<Product> split(const std::vector<Product>& products, int threads);

// Memory for each of the products, and at least `partial` and `buffer`.
Workspaces spaces_of(const std::vector<Product>& products, Index partial = 0, Index buffer = 0);

void run(const std::vector<Product>& products, int threads);

// With the seed at an address, which is read where the rate is not 0.
Dropout dropout_of(double rate, std::uintptr_t seed);

// What is left is multiplied by it.
inline float dropout_scale(double rate) { return static_cast<float>(rate < 1.0 ? 1.0 / (1.0 - rate) : 0.0); }

}  // namespace spinlock_fast::training
