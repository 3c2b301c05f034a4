// Partial decoders of a batch: what kernels/code_decoders/native.py calls.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "books.hpp"
#include "checks.hpp"
#include "entries.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

namespace {

template <class Call>
void for_each_decoder(DecoderTask task, const std::vector<Index>& num_codes, const std::vector<Index>& dims, int threads,
                      Call call) {
    const Kernels& k = kernels();
    const std::vector<Book> books = books_of(num_codes, dims);
    check_sizes(task.B, {task.F, task.H});
    check_codes(task.codes, task.B, num_codes, "partial_loss");
    task.G = static_cast<Index>(books.size());
    Index partial = 0, buffer = 0;
    task.total_dims = 0;
    for (const Book& b : books) {
        task.total_dims += b.dims;
        buffer = std::max(buffer, k.decoder_buffer_floats(task.B, task.F, task.H, b.codes, b.dims));
        for (const auto& [m, n, depth] : {std::tuple{b.codes, task.H, b.dims}, {b.codes, task.F, task.H},
                                          {b.codes, task.H, task.F}, {task.H, task.F, b.codes},
                                          {b.dims, task.H, b.codes}, {task.F, b.dims, task.H}, {task.B, b.dims, task.F}})
            partial = std::max(partial, k.partial_floats(m + 1, n, depth));
    }
    const Workspaces spaces(partial, buffer);
    parallel_for(task.G, threads, [&](Index g) {
        DecoderTask mine = task;
        mine.g = g;
        mine.book = books[static_cast<std::size_t>(g)];
        call(mine, spaces.here());
    });
}

}  // namespace

double decoders_forward(std::uintptr_t x, std::uintptr_t mean, std::uintptr_t codes, std::uintptr_t codebook,
                        std::uintptr_t w1, std::uintptr_t b1, std::uintptr_t w2, std::uintptr_t b2,
                        const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B, Index F, Index H,
                        std::uintptr_t hidden, std::uintptr_t decoded, std::uintptr_t off, int threads) {
    DecoderTask task{};
    task.B = B, task.F = F, task.H = H;
    task.x = at<const float>(x), task.mean = at<const float>(mean), task.codes = at<const std::int64_t>(codes);
    task.codebook = at<const float>(codebook);
    task.w1 = at<const float>(w1), task.b1 = at<const float>(b1);
    task.w2 = at<const float>(w2), task.b2 = at<const float>(b2);
    task.hidden = at<float>(hidden), task.decoded = at<float>(decoded), task.off = at<float>(off);
    std::vector<double> shares(dims.size());
    for_each_decoder(task, num_codes, dims, threads, [&](const DecoderTask& t, const Workspace& w) {
        shares[static_cast<std::size_t>(t.g)] = kernels().decoder_forward(t, w);
    });
    double loss = 0.0;
    for (const double share : shares) loss += share;
    double scatter = 0.0;
    for (Index b = 0; b < B; ++b) {
        double parts[4] = {};  // one sum would wait for itself
        for (Index f = 0; f < F; ++f) {
            const auto value = static_cast<double>(task.x[b * F + f]);
            parts[f % 4] += value * value;
        }
        scatter += (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
    const auto groups = static_cast<double>(dims.size());
    for (Index i = 0; i < B * static_cast<Index>(dims.size()); ++i)
        if (task.codes[i] < 0) return std::numeric_limits<double>::quiet_NaN();
    return (loss + groups * scatter) / (groups * static_cast<double>(B * F));
}

void decoders_backward(double scale, std::uintptr_t x, std::uintptr_t codes, std::uintptr_t codebook, std::uintptr_t w1,
                       std::uintptr_t w2, const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B,
                       Index F, Index H, std::uintptr_t hidden, std::uintptr_t decoded, std::uintptr_t off,
                       std::uintptr_t of_quantized, std::uintptr_t of_w1, std::uintptr_t of_b1, std::uintptr_t of_w2,
                       std::uintptr_t of_b2, int threads) {
    DecoderTask task{};
    task.B = B, task.F = F, task.H = H;
    task.x = at<const float>(x), task.codes = at<const std::int64_t>(codes), task.codebook = at<const float>(codebook);
    task.w1 = at<const float>(w1), task.w2 = at<const float>(w2);
    task.hidden = at<float>(hidden), task.decoded = at<float>(decoded), task.off = at<float>(off);
    task.of_quantized = at<float>(of_quantized);
    task.of_w1 = at<float>(of_w1), task.of_b1 = at<float>(of_b1);
    task.of_w2 = at<float>(of_w2), task.of_b2 = at<float>(of_b2);
    task.scale = static_cast<float>(scale);
    for_each_decoder(task, num_codes, dims, threads,
                     [&](const DecoderTask& t, const Workspace& w) { kernels().decoder_backward(t, w); });
}

}  // namespace spinlock_fast::training
