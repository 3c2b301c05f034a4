// Positions of ragged codebooks in concatenated arrays.
#pragma once

#include <stdexcept>
#include <vector>

#include "kernels.hpp"

namespace spinlock_fast::training {

inline std::vector<CodebookSlice> codebook_slices(const std::vector<Index>& num_codes, const std::vector<Index>& dims) {
    if (num_codes.size() != dims.size()) throw std::invalid_argument("num_codes and dims must have the same length");
    std::vector<CodebookSlice> slices;
    CodebookSlice next{};
    for (std::size_t g = 0; g < dims.size(); ++g) {
        next.dims = dims[g];
        next.num_codes = num_codes[g];
        if (next.dims < 1 || next.num_codes < 1) throw std::invalid_argument("num_codes and dims must be at least 1");
        slices.push_back(next);
        next.first_column += dims[g];
        next.first_code += num_codes[g];
        next.first_entry += num_codes[g] * dims[g];
        next.first_table += num_codes[g] * num_codes[g];
    }
    return slices;
}

}  // namespace spinlock_fast::training
