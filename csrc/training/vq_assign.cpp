// Nearest codes of a batch; called by kernels/vq_assign.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "codebook_layout.hpp"
#include "checks.hpp"
#include "operations.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

void assign(Address z, Index z_row, Index N, Address codebook, Address mask, bool centered,
            const std::vector<Index>& num_codes, const std::vector<Index>& dims, Address codes, Address quantized,
            Address error, Address counts, Address sums, int threads) {
    const Kernels& k = kernels();
    const std::vector<CodebookSlice> slices = codebook_slices(num_codes, dims);
    check_sizes(N, {z_row});
    AssignTask task{};
    task.z = pointer<const float>(z), task.z_row = z_row, task.codebook = pointer<const float>(codebook);
    task.mask = pointer<const std::uint8_t>(mask), task.centered = centered;
    task.codes = pointer<std::int64_t>(codes), task.quantized = pointer<float>(quantized);
    task.G = static_cast<Index>(slices.size());
    constexpr Index kRows = 512;  // per task
    const Index max_rows = std::min(kRows, N), blocks = divide_up(N, kRows);
    Index partial = 0, buffer = 0;
    for (const CodebookSlice& b : slices) {
        task.total_dims += b.dims;
        partial = std::max(partial, k.partial_floats(max_rows, b.num_codes, b.dims));
        buffer = std::max(buffer, k.assign_buffer_floats(max_rows, b.num_codes, b.dims));
    }
    const Workspaces workspaces(partial, buffer);
    parallel_for(task.G * blocks, threads, [&](Index i) {
        AssignTask t = task;
        t.g = i / blocks;
        t.slice = slices[static_cast<std::size_t>(t.g)];
        t.first = i % blocks * kRows;
        t.last = std::min(N, t.first + kRows);
        k.assign_nearest(t, workspaces.for_this_thread());
    });
    parallel_for(task.G, threads, [&](Index g) {
        AssignTask t = task;
        t.g = g;
        t.slice = slices[static_cast<std::size_t>(g)];
        t.last = N;
        float* count = counts ? pointer<float>(counts) + t.slice.first_code : nullptr;
        float* sum = counts ? pointer<float>(sums) + t.slice.first_entry : nullptr;
        pointer<float>(error)[g] = static_cast<float>(k.assign_statistics(t, count, sum));
    });
}

constexpr Index kRowsPerTask = 64;

// grad_z = grad + 2 grad_error_g (z - quantized); without the second term where the code is -1.
void assign_backward(Address grad, Address grad_error, Address z, Address quantized, Address codes, Index N,
                     const std::vector<Index>& dims, Address grad_z, int threads) {
    check_sizes(N, dims);
    const Index G = static_cast<Index>(dims.size());
    const Index total = total_size(dims);
    parallel_for(divide_up(N, kRowsPerTask), threads, [&](Index task) {
        for (Index i = task * kRowsPerTask; i < std::min(N, (task + 1) * kRowsPerTask); ++i) {
            const float *upstream = pointer<const float>(grad) + i * total, *row = pointer<const float>(z) + i * total;
            const float* code = pointer<const float>(quantized) + i * total;
            float* out = pointer<float>(grad_z) + i * total;
            Index c = 0;
            for (Index g = 0; g < G; ++g) {
                const bool no_code = pointer<const std::int64_t>(codes)[i * G + g] < 0;
                const float factor = 2.0f * pointer<const float>(grad_error)[g];
                for (const Index end = c + dims[static_cast<std::size_t>(g)]; c < end; ++c)
                    out[c] = no_code ? upstream[c] : upstream[c] + factor * (row[c] - code[c]);
            }
        }
    });
}

}  // namespace spinlock_fast::training
