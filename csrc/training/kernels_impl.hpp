// Definition of the kernels of `kernels.hpp` for the instruction set that this file is compiled for.
#pragma once

#include "code_averages_impl.hpp"
#include "code_cosines_impl.hpp"
#include "code_decoders_impl.hpp"
#include "code_mlp_impl.hpp"
#include "distance_gradient_impl.hpp"
#include "joint_search_impl.hpp"
#include "layer_norm_impl.hpp"
#include "pairwise_distances_impl.hpp"
#include "product_impl.hpp"
#include "residual_vq_impl.hpp"
#include "vq_assign_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

constexpr training::Kernels kKernels = {
    .lanes = kLanes,
    .rows = kRows,
    .columns = kColumns,
    .packed_floats = kPackedFloats,
    .row_floats = kRows * kDepth,
    .partial_floats = partial_floats,
    .product = product,
    .sparse_buffer_floats = sparse_buffer_floats,
    .first_layer_gradient = first_layer_gradient,
    .first_layer_gradient_buffer_floats = first_layer_gradient_buffer_floats,
    .column_sums = column_sums,
    .normalize = normalize,
    .normalize_backward = normalize_backward,
    .segment_layer_norm = segment_layer_norm,
    .segment_layer_norm_backward = segment_layer_norm_backward,
    .weighted_column_sums = weighted_column_sums,
    .fold_scale = fold_scale,
    .fold_scale_backward = fold_scale_backward,
    .assign_nearest = assign_nearest,
    .assign_buffer_floats = assign_buffer_floats,
    .assign_statistics = assign_statistics,
    .residual_pack_codebook = residual_pack_codebook,
    .residual_assign_rows = residual_assign_rows,
    .residual_buffer_floats = residual_buffer_floats,
    .residual_statistics = residual_statistics,
    .residual_backward = residual_backward,
    .average_counts = average_counts,
    .average_codes = average_codes,
    .decoder_forward = decoder_forward,
    .decoder_backward = decoder_backward,
    .decoder_buffer_floats = decoder_buffer_floats,
    .code_layer_rows = code_layer_rows,
    .sum_rows_by_code = sum_rows_by_code,
    .squared_cosines = squared_cosines,
    .joint_search_rows = joint_search_rows,
    .joint_search_buffer_floats = joint_search_buffer_floats,
    .pack_points = pack_points,
    .mean_distances = mean_distances,
    .code_distance_table = code_distance_table,
    .add_code_distances = add_code_distances,
    .row_sums = row_sums,
    .row_moments = row_moments,
    .correlation_gradient = correlation_gradient,
    .distance_gradient = distance_gradient,
    .distance_gradient_buffer_floats = distance_gradient_buffer_floats,
    .code_distance_gradient = code_distance_gradient,
    .code_distance_gradient_buffer_floats = code_distance_gradient_buffer_floats,
};

}  // namespace spinlock_fast::SPINLOCK_SIMD
