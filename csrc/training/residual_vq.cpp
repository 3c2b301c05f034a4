// Residual quantization of a batch; called by kernels/residual_vq.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "checks.hpp"
#include "operations.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

namespace {

constexpr Index kRowsPerTask = 512;

// Uninitialised memory: the threads write it in parallel.
template <class T>
std::unique_ptr<T[]> uninitialised(Index n) {
    return std::make_unique_for_overwrite<T[]>(static_cast<std::size_t>(n));
}

ResidualTask make_task(Address x, Index x_row, Index D, Address codebook, const std::vector<Index>& num_codes,
                       Address mask, bool cosine, int gradient, Address codes) {
    ResidualTask task{};
    task.x = pointer<const float>(x), task.x_row = x_row, task.D = D, task.codebook = pointer<const float>(codebook);
    task.stages = static_cast<Index>(num_codes.size()), task.num_codes = num_codes.data();
    task.mask = pointer<const std::uint8_t>(mask), task.codes = pointer<std::int64_t>(codes);
    task.cosine = cosine, task.gradient = static_cast<Gradient>(gradient);
    return task;
}

}  // namespace

void residual_assign(Address x, Index x_row, Index N, Index D, Address codebook, const std::vector<Index>& num_codes,
                     Address mask, bool cosine, int gradient, Address codes, Address quantized, Address errors,
                     Address counts, Address sums, int threads) {
    check_sizes(N, num_codes);
    check_sizes(D, {x_row});
    const Kernels& k = kernels();
    const Index stages = static_cast<Index>(num_codes.size());
    Index panels = 0, partial = 0;
    for (const Index K : num_codes) {
        const Index padded_codes = divide_up(K, k.columns) * k.columns;
        panels += padded_codes;
        partial = std::max(partial, k.partial_floats(std::min(kRowsPerTask, N), padded_codes, D));
    }
    const auto transposed = uninitialised<float>(panels * D), norms = uninitialised<float>(panels);
    const auto centers = uninitialised<float>(stages * D),
               inverse_norms = uninitialised<float>(cosine ? N * stages : 1);
    const auto zero_stage = uninitialised<std::int32_t>(N);
    ResidualTask task = make_task(x, x_row, D, codebook, num_codes, mask, cosine, gradient, codes);
    task.transposed = transposed.get(), task.norms = norms.get(), task.centers = centers.get();
    task.inverse_norms = inverse_norms.get(), task.zero_stage = zero_stage.get();
    task.quantized = pointer<float>(quantized);
    parallel_for(stages, threads, [&](Index q) { k.residual_pack_codebook(task, q); });
    const Workspaces workspaces(partial, k.residual_buffer_floats(std::min(kRowsPerTask, N), D));
    parallel_for(divide_up(N, kRowsPerTask), threads, [&](Index i) {
        k.residual_assign_rows(task, i * kRowsPerTask, std::min(N, (i + 1) * kRowsPerTask),
                               workspaces.for_this_thread());
    });
    // One task per block of columns: the order of each sum does not depend on the number of threads.
    const Index column_blocks = divide_up(D, k.lanes), all_codes = total_size(num_codes);
    std::vector<double> partial_errors(static_cast<std::size_t>(column_blocks * stages));
    if (counts) std::fill_n(pointer<float>(counts), all_codes, 0.0f);
    if (counts) std::fill_n(pointer<float>(sums), all_codes * D, 0.0f);
    parallel_for(column_blocks, threads, [&](Index c) {
        k.residual_statistics(task, N, c * k.lanes, std::min(D, (c + 1) * k.lanes), partial_errors.data() + c * stages,
                              c == 0 ? pointer<float>(counts) : nullptr, counts ? pointer<float>(sums) : nullptr);
    });
    for (Index q = 0; q < stages; ++q) {
        double error = 0.0;
        for (Index c = 0; c < column_blocks; ++c) error += partial_errors[static_cast<std::size_t>(c * stages + q)];
        pointer<float>(errors)[q] = static_cast<float>(error);
    }
}

void residual_backward(Address grad, Address grad_errors, Address x, Index x_row, Index N, Index D, Address codebook,
                       const std::vector<Index>& num_codes, Address mask, Address codes, bool cosine, int gradient,
                       Address grad_x, int threads) {
    check_sizes(N, {D, x_row});
    check_codes(pointer<const std::int64_t>(codes), N, num_codes, "residual_vq");
    const Kernels& k = kernels();
    const ResidualTask task = make_task(x, x_row, D, codebook, num_codes, mask, cosine, gradient, codes);
    const Workspaces workspaces(0, k.residual_buffer_floats(1, D));
    parallel_for(divide_up(N, kRowsPerTask), threads, [&](Index i) {
        k.residual_backward(task, i * kRowsPerTask, std::min(N, (i + 1) * kRowsPerTask), pointer<const float>(grad),
                            pointer<const float>(grad_errors), pointer<float>(grad_x), workspaces.for_this_thread());
    });
}

}  // namespace spinlock_fast::training
