// Partial decoders of a batch; called by kernels/code_decoders.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "codebook_layout.hpp"
#include "checks.hpp"
#include "operations.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

namespace {

// Runs kernel(task, workspace) for each codebook.
template <class Kernel>
void for_each_decoder(DecoderTask task, const std::vector<Index>& num_codes, const std::vector<Index>& dims,
                      int threads, Kernel kernel) {
    const Kernels& k = kernels();
    const std::vector<CodebookSlice> slices = codebook_slices(num_codes, dims);
    check_sizes(task.B, {task.F, task.H});
    check_codes(task.codes, task.B, num_codes, "partial_loss");
    task.G = static_cast<Index>(slices.size());
    Index partial = 0, buffer = 0;
    task.total_dims = 0;
    for (const CodebookSlice& b : slices) {
        task.total_dims += b.dims;
        buffer = std::max(buffer, k.decoder_buffer_floats(task.B, task.F, task.H, b.num_codes, b.dims));
        for (const auto& [m, n, depth] : {std::tuple{b.num_codes, task.H, b.dims},
                                          {b.num_codes, task.F, task.H},
                                          {b.num_codes, task.H, task.F},
                                          {task.H, task.F, b.num_codes},
                                          {b.dims, task.H, b.num_codes},
                                          {task.F, b.dims, task.H},
                                          {task.B, b.dims, task.F}})
            partial = std::max(partial, k.partial_floats(m + 1, n, depth));
    }
    const Workspaces workspaces(partial, buffer);
    parallel_for(task.G, threads, [&](Index g) {
        DecoderTask codebook_task = task;
        codebook_task.g = g;
        codebook_task.slice = slices[static_cast<std::size_t>(g)];
        kernel(codebook_task, workspaces.for_this_thread());
    });
}

}  // namespace

// Mean squared error of all partial decoders over groups, rows and features; NaN if a row has no code.
double decoders_forward(Address x, Address mean, Address codes, Address codebook, Address w1, Address b1, Address w2,
                        Address b2, const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B,
                        Index F, Index H, Address hidden, Address decoded, Address error_sums, int threads) {
    DecoderTask task{};
    task.B = B, task.F = F, task.H = H;
    task.x = pointer<const float>(x), task.mean = pointer<const float>(mean),
    task.codes = pointer<const std::int64_t>(codes);
    task.codebook = pointer<const float>(codebook);
    task.w1 = pointer<const float>(w1), task.b1 = pointer<const float>(b1);
    task.w2 = pointer<const float>(w2), task.b2 = pointer<const float>(b2);
    task.hidden = pointer<float>(hidden), task.decoded = pointer<float>(decoded),
    task.error_sums = pointer<float>(error_sums);
    std::vector<double> losses(dims.size());
    for_each_decoder(task, num_codes, dims, threads, [&](const DecoderTask& t, const Workspace& w) {
        losses[static_cast<std::size_t>(t.g)] = kernels().decoder_forward(t, w);
    });
    double loss = 0.0;
    for (const double part : losses) loss += part;
    double square_norm = 0.0;
    for (Index b = 0; b < B; ++b) {
        double parts[4] = {};  // independent sums hide the latency of the additions
        for (Index f = 0; f < F; ++f) {
            const auto value = static_cast<double>(task.x[b * F + f]);
            parts[f % 4] += value * value;
        }
        square_norm += (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
    const auto groups = static_cast<double>(dims.size());
    for (Index i = 0; i < B * static_cast<Index>(dims.size()); ++i)
        if (task.codes[i] < 0) return std::numeric_limits<double>::quiet_NaN();
    return (loss + groups * square_norm) / (groups * static_cast<double>(B * F));
}

void decoders_backward(double scale, Address x, Address codes, Address codebook, Address w1, Address w2,
                       const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B, Index F, Index H,
                       Address hidden, Address decoded, Address error_sums, Address grad_quantized, Address grad_w1,
                       Address grad_b1, Address grad_w2, Address grad_b2, int threads) {
    DecoderTask task{};
    task.B = B, task.F = F, task.H = H;
    task.x = pointer<const float>(x), task.codes = pointer<const std::int64_t>(codes),
    task.codebook = pointer<const float>(codebook);
    task.w1 = pointer<const float>(w1), task.w2 = pointer<const float>(w2);
    task.hidden = pointer<float>(hidden), task.decoded = pointer<float>(decoded),
    task.error_sums = pointer<float>(error_sums);
    task.grad_quantized = pointer<float>(grad_quantized);
    task.grad_w1 = pointer<float>(grad_w1), task.grad_b1 = pointer<float>(grad_b1);
    task.grad_w2 = pointer<float>(grad_w2), task.grad_b2 = pointer<float>(grad_b2);
    task.scale = static_cast<float>(scale);
    for_each_decoder(task, num_codes, dims, threads,
                     [&](const DecoderTask& t, const Workspace& w) { kernels().decoder_backward(t, w); });
}

}  // namespace spinlock_fast::training
