// Where the codebooks of a group lie.
#pragma once

#include <stdexcept>
#include <vector>

#include "kernels.hpp"

namespace spinlock_fast::training {

inline std::vector<Book> books_of(const std::vector<Index>& num_codes, const std::vector<Index>& dims) {
    if (num_codes.size() != dims.size()) throw std::invalid_argument("as many numbers of codes as of dimensions are needed");
    std::vector<Book> books;
    Book next{0, 0, 0, 0, 0};
    for (std::size_t g = 0; g < dims.size(); ++g) {
        next.dims = dims[g];
        next.codes = num_codes[g];
        if (next.dims < 1 || next.codes < 1) throw std::invalid_argument("a codebook without codes or dimensions");
        books.push_back(next);
        next.first_column += dims[g];
        next.first_code += num_codes[g];
        next.first_entry += num_codes[g] * dims[g];
    }
    return books;
}

}  // namespace spinlock_fast::training
