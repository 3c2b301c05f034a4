// Update of codebooks by moving averages; called by kernels/ema_update.
#include <algorithm>
#include <vector>

#include "checks.hpp"
#include "kernels.hpp"
#include "operations.hpp"
#include "parallel.hpp"

namespace spinlock_fast::training {

namespace {

constexpr Index kEntriesPerTask = 1 << 15;

struct Block {
    std::size_t codebook;
    Index first, last;
};

}  // namespace

// Codebook g has num_codes[g] codes of dims[g] dimensions; codebooks lie one after the other in all arrays.
void average_codes(Address codes, Address cluster_size, Address code_sum, Address usage, Address counts, Address sums,
                   const std::vector<Index>& num_codes, const std::vector<Index>& dims, double rate, int smoothing,
                   double epsilon, bool unit, bool keep_without_rows, int threads) {
    check_sizes(0, num_codes);
    check_sizes(0, dims);
    if (num_codes.size() != dims.size()) throw std::invalid_argument("num_codes and dims must be equally long");
    std::vector<float> divisors(static_cast<std::size_t>(total_size(num_codes)));
    std::vector<AverageTask> tasks;
    std::vector<Block> blocks;
    std::vector<const float*> first_divisors;
    Index code = 0, entry = 0;
    for (std::size_t g = 0; g < num_codes.size(); ++g) {
        const Index K = num_codes[g], D = dims[g];
        AverageTask task{};
        task.num_codes = K, task.dims = D;
        task.counts = pointer<const float>(counts) + code, task.sums = pointer<const float>(sums) + entry;
        task.usage = usage ? pointer<std::int64_t>(usage) + code : nullptr;
        task.cluster_size = pointer<float>(cluster_size) + code, task.code_sum = pointer<float>(code_sum) + entry;
        task.codes = codes ? pointer<float>(codes) + entry : nullptr;
        task.rate = static_cast<float>(rate), task.epsilon = static_cast<float>(epsilon);
        task.smoothing = static_cast<Smoothing>(smoothing);
        task.unit = unit, task.keep_without_rows = keep_without_rows;
        float* own_divisors = divisors.data() + code;
        if (kernels().average_counts(task, own_divisors)) {
            const Index step = std::max<Index>(1, kEntriesPerTask / std::max<Index>(1, D));
            for (Index k = 0; k < K; k += step) blocks.push_back({tasks.size(), k, std::min(K, k + step)});
        }
        tasks.push_back(task), first_divisors.push_back(own_divisors);
        code += K, entry += K * D;
    }
    parallel_for(static_cast<Index>(blocks.size()), threads, [&](Index i) {
        const Block& block = blocks[static_cast<std::size_t>(i)];
        kernels().average_codes(tasks[block.codebook], first_divisors[block.codebook], block.first, block.last);
    });
}

}  // namespace spinlock_fast::training
