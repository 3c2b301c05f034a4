// Dropout without masks: whether an entry is kept is a hash of seed, row and column.
#pragma once

#include "kernels.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::Dropout;
using training::Index;

inline std::uint64_t mixed(std::uint64_t x) {  // splitmix64 (Steele, Lea and Flood 2014)
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Zeroes what dropout drops of row[0:n], the columns from `column` on, and multiplies the rest by `scale`.
inline void drop(float* row, Index n, Dropout dropout, Index row_index, Index column, float scale) {
    const std::uint64_t key = mixed(dropout.seed ^ mixed(static_cast<std::uint64_t>(row_index)));
    const auto offset = static_cast<std::uint32_t>(key), factor = static_cast<std::uint32_t>(key >> 32) | 1u;
    const std::uint32_t threshold = dropout.threshold;
    for (Index c = 0; c < n; ++c) {
        std::uint32_t h = static_cast<std::uint32_t>(column + c) * 0x9e3779b9u + offset;
        h ^= h >> 16;
        h *= 0x7feb352du;  // the multipliers and shifts of lowbias32 (Wellons 2018), the second keyed
        h ^= h >> 15;
        h *= factor;
        h ^= h >> 16;
        row[c] = h >= threshold ? row[c] * scale : 0.0f;
    }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
