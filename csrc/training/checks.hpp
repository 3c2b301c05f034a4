// Checks of what Python hands over: sizes against each other, and values that index memory against its size.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace spinlock_fast::training {

// Rows, and sizes of groups, that no memory can have.
inline void check_sizes(Index rows, const std::vector<Index>& sizes) {
    if (rows < 0 || std::any_of(sizes.begin(), sizes.end(), [](Index n) { return n < 0; }))
        throw std::invalid_argument("a negative number of rows, or a group of negative size");
}

// Whether one of codes [rows, G] is -1, for none. Throws std::out_of_range where one is outside its codebook.
inline bool check_codes(const std::int64_t* codes, Index rows, const std::vector<Index>& num_codes,
                        const std::string& name) {
    const Index G = static_cast<Index>(num_codes.size());
    bool missing = false;
    for (Index i = 0; i < rows; ++i) {
        for (Index g = 0; g < G; ++g) {
            const Index code = codes[i * G + g], size = num_codes[static_cast<std::size_t>(g)];
            missing |= code < 0;
            if (code < -1 || code >= size)
                throw std::out_of_range(name + ": code " + std::to_string(code) + " of row " + std::to_string(i) +
                                        " is outside codebook " + std::to_string(g) + ", which has " +
                                        std::to_string(size) + " codes");
        }
    }
    return missing;
}

}  // namespace spinlock_fast::training
