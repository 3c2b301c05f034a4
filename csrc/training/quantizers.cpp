// Nearest codes of a batch: what kernels/vq_assign/native.py calls.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "books.hpp"
#include "checks.hpp"
#include "entries.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

void assign(std::uintptr_t z, Index z_row, Index N, std::uintptr_t codebook, std::uintptr_t mask, bool centred,
            const std::vector<Index>& num_codes, const std::vector<Index>& dims, std::uintptr_t codes,
            std::uintptr_t quantized, std::uintptr_t error, std::uintptr_t counts, std::uintptr_t sums, int threads) {
    const Kernels& k = kernels();
    const std::vector<Book> books = books_of(num_codes, dims);
    check_sizes(N, {z_row});
    AssignTask task{};
    task.z = at<const float>(z), task.z_row = z_row, task.codebook = at<const float>(codebook);
    task.mask = at<const std::uint8_t>(mask), task.centred = centred;
    task.codes = at<std::int64_t>(codes), task.quantized = at<float>(quantized);
    task.G = static_cast<Index>(books.size());
    constexpr Index kRows = 512;
    const Index most = std::min(kRows, N), blocks = (N + kRows - 1) / kRows;
    Index partial = 0, buffer = 0;
    for (const Book& b : books) {
        task.total_dims += b.dims;
        partial = std::max(partial, k.partial_floats(most, b.codes, b.dims));
        buffer = std::max(buffer, k.nearest_buffer_floats(most, b.codes, b.dims));
    }
    const Workspaces spaces(partial, buffer);
    parallel_for(task.G * blocks, threads, [&](Index i) {
        AssignTask mine = task;
        mine.g = i / blocks;
        mine.book = books[static_cast<std::size_t>(mine.g)];
        mine.first = i % blocks * kRows;
        mine.last = std::min(N, mine.first + kRows);
        k.nearest(mine, spaces.here());
    });
    parallel_for(task.G, threads, [&](Index g) {
        AssignTask mine = task;
        mine.g = g;
        mine.book = books[static_cast<std::size_t>(g)];
        mine.last = N;
        float* count = counts ? at<float>(counts) + mine.book.first_code : nullptr;
        float* sum = counts ? at<float>(sums) + mine.book.first_entry : nullptr;
        at<float>(error)[g] = static_cast<float>(k.tally(mine, count, sum));
    });
}

constexpr Index kRowsOfATask = 64;

// grad + 2 of_error_g (z - quantized), without the second term where there is no code.
void assign_backward(std::uintptr_t grad, std::uintptr_t of_error, std::uintptr_t z, std::uintptr_t quantized,
                     std::uintptr_t codes, Index N, const std::vector<Index>& dims, std::uintptr_t of_z, int threads) {
    check_sizes(N, dims);
    const Index G = static_cast<Index>(dims.size());
    Index total = 0;
    for (const Index d : dims) total += d;
    parallel_for((N + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index task) {
        for (Index i = task * kRowsOfATask; i < std::min(N, (task + 1) * kRowsOfATask); ++i) {
            const float *upstream = at<const float>(grad) + i * total, *row = at<const float>(z) + i * total;
            const float* code = at<const float>(quantized) + i * total;
            float* out = at<float>(of_z) + i * total;
            Index c = 0;
            for (Index g = 0; g < G; ++g) {
                const bool none = at<const std::int64_t>(codes)[i * G + g] < 0;
                const float factor = 2.0f * at<const float>(of_error)[g];
                for (const Index end = c + dims[static_cast<std::size_t>(g)]; c < end; ++c)
                    out[c] = none ? upstream[c] : upstream[c] + factor * (row[c] - code[c]);
            }
        }
    });
}

}  // namespace spinlock_fast::training
