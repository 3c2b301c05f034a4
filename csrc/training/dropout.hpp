// Dropout without stored masks: an element is kept if hash(seed, first_row + row, column) >= threshold, where
// threshold = p * 2^32.
#pragma once

#include "kernels.hpp"
#include "vector.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::Dropout;
using training::Index;

inline std::uint64_t splitmix64(std::uint64_t x) {  // splitmix64 (Steele, Lea and Flood 2014)
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

typedef std::uint32_t HashVector __attribute__((vector_size(4 * kLanes)));

// Dropout of one row; its hash parameters are derived from (seed, row).
struct RowDropout {
    std::uint32_t offset, factor, threshold;

    RowDropout(Dropout dropout, Index row) : threshold(dropout.threshold) {
        const auto number = static_cast<std::uint64_t>(dropout.first_row + row);
        const std::uint64_t key = splitmix64(dropout.seed ^ splitmix64(number));
        offset = static_cast<std::uint32_t>(key), factor = static_cast<std::uint32_t>(key >> 32) | 1u;
    }

    // v * scale where kept, else 0, for the columns from `column` on.
    Vector operator()(Vector v, Index column, float scale) const {
        HashVector h;
        for (int i = 0; i < kLanes; ++i) h[i] = static_cast<std::uint32_t>(i);
        h = (h + static_cast<std::uint32_t>(column)) * 0x9e3779b9u + offset;
        h ^= h >> 16;
        h *= 0x7feb352du;  // constants of lowbias32 (Wellons 2018); the second multiplier is the row's key
        h ^= h >> 15;
        h *= factor;
        h ^= h >> 16;
        return h >= threshold ? v * scale : Vector{};
    }
};

// Applies dropout to row[0:n] in place.
inline void apply_dropout(float* row, Index n, Dropout dropout, Index row_index, float scale) {
    const RowDropout row_dropout(dropout, row_index);
    for (Index c = 0; c < n; c += kLanes) {
        const Index count = n - c < kLanes ? n - c : kLanes;
        store_partial(row + c, count, row_dropout(load_partial(row + c, count), c, scale));
    }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
