// Arguments from Python: addresses, sums of sizes, and checks of sizes and codes before they index memory.
#pragma once

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace spinlock_fast::training {

using Address = std::uintptr_t;  // of a tensor; 0 for none

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

inline Index total_size(const std::vector<Index>& sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), Index{0});
}

inline Index divide_up(Index n, Index by) { return (n + by - 1) / by; }

// Throws std::invalid_argument for negative sizes.
inline void check_sizes(Index rows, const std::vector<Index>& sizes) {
    if (rows < 0 || std::any_of(sizes.begin(), sizes.end(), [](Index n) { return n < 0; }))
        throw std::invalid_argument("sizes must not be negative");
}

// Returns whether any of codes [rows, G] is -1 (no code). Throws std::out_of_range if one is outside its codebook.
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
