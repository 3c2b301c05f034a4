// Residual quantization of a batch: what kernels/residual_vq/native.py calls.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "checks.hpp"
#include "entries.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

namespace {

constexpr Index kRowsOfATask = 512;

Index pieces(Index n, Index of) { return (n + of - 1) / of; }

// Memory that nothing has written to: most of it is written once, by several threads.
template <class T>
std::unique_ptr<T[]> uncleared(Index n) {
    return std::make_unique_for_overwrite<T[]>(static_cast<std::size_t>(n));
}

}  // namespace

void residual_assign(std::uintptr_t x, Index x_row, Index N, Index D, std::uintptr_t codebook,
                     const std::vector<Index>& num_codes, std::uintptr_t mask, bool cosine, int gradient,
                     std::uintptr_t codes, std::uintptr_t quantized, std::uintptr_t errors, std::uintptr_t counts,
                     std::uintptr_t sums, int threads) {
    check_sizes(N, num_codes);
    check_sizes(D, {x_row});
    const Kernels& k = kernels();
    const Index stages = static_cast<Index>(num_codes.size());
    Index panels = 0, partial = 0;
    for (const Index K : num_codes) {
        const Index wide = pieces(K, k.columns) * k.columns;
        panels += wide;
        partial = std::max(partial, k.partial_floats(std::min(kRowsOfATask, N), wide, D));
    }
    const auto turned = uncleared<float>(panels * D), norms = uncleared<float>(panels);
    const auto centres = uncleared<float>(stages * D), lengths = uncleared<float>(cosine ? N * stages : 1);
    const auto zero = uncleared<std::int32_t>(N);
    const ResidualTask task{at<const float>(x), x_row, D, stages, num_codes.data(), at<const float>(codebook),
                            at<const std::uint8_t>(mask), cosine, static_cast<Gradient>(gradient), turned.get(),
                            norms.get(), centres.get(), at<std::int64_t>(codes), lengths.get(), zero.get(),
                            at<float>(quantized)};
    parallel_for(stages, threads, [&](Index q) { k.residual_prepare(task, q); });
    const Workspaces spaces(partial, k.residual_buffer_floats(std::min(kRowsOfATask, N), D));
    parallel_for(pieces(N, kRowsOfATask), threads, [&](Index i) {
        k.residual_rows(task, i * kRowsOfATask, std::min(N, (i + 1) * kRowsOfATask), spaces.here());
    });
    // Columns are added up apart from each other, so that no sum depends on the number of threads.
    const Index chunks = pieces(D, k.lanes), all_codes = std::accumulate(num_codes.begin(), num_codes.end(), Index{0});
    std::vector<double> parts(static_cast<std::size_t>(chunks * stages));
    if (counts) std::fill_n(at<float>(counts), all_codes, 0.0f);
    if (counts) std::fill_n(at<float>(sums), all_codes * D, 0.0f);
    parallel_for(chunks, threads, [&](Index c) {
        k.residual_tally(task, N, c * k.lanes, std::min(D, (c + 1) * k.lanes), parts.data() + c * stages,
                         c == 0 ? at<float>(counts) : nullptr, counts ? at<float>(sums) : nullptr);
    });
    for (Index q = 0; q < stages; ++q) {
        double error = 0.0;
        for (Index c = 0; c < chunks; ++c) error += parts[static_cast<std::size_t>(c * stages + q)];
        at<float>(errors)[q] = static_cast<float>(error);
    }
}

void residual_backward(std::uintptr_t grad, std::uintptr_t of_errors, std::uintptr_t x, Index x_row, Index N, Index D,
                       std::uintptr_t codebook, const std::vector<Index>& num_codes, std::uintptr_t mask,
                       std::uintptr_t codes, bool cosine, int gradient, std::uintptr_t of_x, int threads) {
    check_sizes(N, {D, x_row});
    check_codes(at<const std::int64_t>(codes), N, num_codes, "residual_vq");
    const Kernels& k = kernels();
    ResidualTask task{};
    task.x = at<const float>(x), task.x_row = x_row, task.D = D, task.codebook = at<const float>(codebook);
    task.stages = static_cast<Index>(num_codes.size()), task.num_codes = num_codes.data();
    task.mask = at<const std::uint8_t>(mask), task.codes = at<std::int64_t>(codes);
    task.cosine = cosine, task.gradient = static_cast<Gradient>(gradient);
    const Workspaces spaces(0, k.residual_buffer_floats(1, D));
    parallel_for(pieces(N, kRowsOfATask), threads, [&](Index i) {
        k.residual_backward(task, i * kRowsOfATask, std::min(N, (i + 1) * kRowsOfATask), at<const float>(grad),
                            at<const float>(of_errors), at<float>(of_x), spaces.here());
    });
}

}  // namespace spinlock_fast::training
