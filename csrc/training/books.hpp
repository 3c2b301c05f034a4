// Where the codebooks of a group lie.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace spinlock_fast::training {

inline std::vector<Book> books_of(const std::vector<Index>& num_codes, const std::vector<Index>& dims) {
    std::vector<Book> books;
    Book next{0, 0, 0, 0, 0};
    for (std::size_t g = 0; g < dims.size(); ++g) {
        next.dims = dims[g];
        next.codes = num_codes[g];
        books.push_back(next);
        next.first_column += dims[g];
        next.first_code += num_codes[g];
        next.first_entry += num_codes[g] * dims[g];
    }
    return books;
}

}  // namespace spinlock_fast::training
