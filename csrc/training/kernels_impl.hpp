// The kernels of `kernels.hpp` for the instruction set that this file is compiled for.
#pragma once

#include "decoders_impl.hpp"
#include "distances_impl.hpp"
#include "nearest_impl.hpp"
#include "normalisation_impl.hpp"
#include "products_impl.hpp"
#include "residual_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

constexpr training::Kernels kKernels = {
    nearest, nearest_buffer_floats, tally, kLanes, kRows, kColumns, kPackedFloats, kRows * kDepth, partial_floats,
    product, sparse_buffer_floats, first_layer, first_layer_buffer_floats, column_sums, normalize, normalize_backward,
    segments, segments_backward, weighted_column_sums, decoder_forward, decoder_backward, decoder_buffer_floats,
    pack_points, distances, pull, pull_buffer_floats, code_distances, add_lookup, pull_codes,
    pull_codes_buffer_floats, row_sums, row_moments, pair_weights, residual_prepare, residual_rows,
    residual_buffer_floats, residual_tally, residual_backward,
};

}  // namespace spinlock_fast::SPINLOCK_SIMD
