// Dropout without masks: whether an entry is kept is a hash of seed, row and column.
#pragma once

#include "kernels.hpp"
#include "vector.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::Dropout;
using training::Index;

inline std::uint64_t mixed(std::uint64_t x) {  // splitmix64 (Steele, Lea and Flood 2014)
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

typedef std::uint32_t Hashes __attribute__((vector_size(4 * kLanes)));

// What decides over the entries of one row.
struct RowDropout {
    std::uint32_t offset, factor, threshold;

    RowDropout(Dropout dropout, Index row) : threshold(dropout.threshold) {
        const std::uint64_t key = mixed(dropout.seed ^ mixed(static_cast<std::uint64_t>(row)));
        offset = static_cast<std::uint32_t>(key), factor = static_cast<std::uint32_t>(key >> 32) | 1u;
    }

    // v, the columns from `column` on, times `scale`, or 0 where dropped.
    Vector operator()(Vector v, Index column, float scale) const {
        Hashes h;
        for (int i = 0; i < kLanes; ++i) h[i] = static_cast<std::uint32_t>(i);
        h = (h + static_cast<std::uint32_t>(column)) * 0x9e3779b9u + offset;
        h ^= h >> 16;
        h *= 0x7feb352du;  // the multipliers and shifts of lowbias32 (Wellons 2018), the second keyed
        h ^= h >> 15;
        h *= factor;
        h ^= h >> 16;
        return h >= threshold ? v * scale : Vector{};
    }
};

// The same for row[0:n].
inline void drop(float* row, Index n, Dropout dropout, Index row_index, float scale) {
    const RowDropout of_row(dropout, row_index);
    for (Index c = 0; c < n; c += kLanes) {
        const Index few = n - c < kLanes ? n - c : kLanes;
        keep_part(row + c, few, of_row(load_part(row + c, few), c, scale));
    }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
