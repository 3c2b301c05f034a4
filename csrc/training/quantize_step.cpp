// A training step of one codebook in one call: nearest codes, loss, copies for the backward pass, moving averages; called
// by kernels/residual_vq/eager.py.
#include <algorithm>
#include <vector>

#include "checks.hpp"
#include "operations.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

namespace {

// Counts [K] and sums [K, D] of a batch. Small ones keep their memory between calls.
class Statistics {
public:
    Statistics(Index K, Index D) {
        thread_local AlignedFloats kept;
        constexpr Index kMaxKept = 1 << 20;
        counts_ = (K * (D + 1) <= kMaxKept ? kept : own_).reserve(K * (D + 1));
        sums_ = counts_ + K;
    }
    Address counts() const { return reinterpret_cast<Address>(counts_); }
    Address sums() const { return reinterpret_cast<Address>(sums_); }

private:
    AlignedFloats own_;
    float *counts_, *sums_;
};

}  // namespace

// x [N, D], codebook [K, D]; loss = weight * mean squared error. `saved_codebook` and `saved_codes` are copies for the
// backward pass, or null. Counts and sums are written unless null. With `cluster_size`, the codebook is then updated.
void quantize_step(Address x, Index N, Index D, Address codebook, Index K, bool cosine, int gradient, double weight,
                   Address codes, Address quantized, Address loss, Address saved_codebook, Address saved_codes,
                   Address counts, Address sums, Address cluster_size, Address code_sum, Address usage, double rate,
                   double epsilon, int threads) {
    check_sizes(N, {D, K});
    if (saved_codebook) std::copy_n(pointer<const float>(codebook), K * D, pointer<float>(saved_codebook));
    const bool own = cluster_size && !counts;
    const Statistics statistics(own ? K : 0, D);
    if (own) counts = statistics.counts(), sums = statistics.sums();
    residual_assign(x, D, N, D, codebook, {K}, 0, cosine, gradient, codes, quantized, loss, counts, sums, threads);
    float& mean = *pointer<float>(loss);
    mean = mean / static_cast<float>(N * D) * static_cast<float>(weight);
    if (saved_codes) std::copy_n(pointer<const std::int64_t>(codes), N, pointer<std::int64_t>(saved_codes));
    if (cluster_size)
        average_codes(codebook, cluster_size, code_sum, usage, counts, sums, {K}, {D}, rate,
                      static_cast<int>(Smoothing::division), epsilon, cosine, false, threads);
}

// grad_x [N, D] for the gradients of `quantized` and of the loss.
void quantize_step_backward(Address grad, Address grad_loss, Address x, Index N, Index D, Address codebook, Index K,
                            Address codes, bool cosine, int gradient, double weight, Address grad_x, int threads) {
    check_sizes(N, {D, K});
    const float scaled = *pointer<const float>(grad_loss) * static_cast<float>(weight);
    const float grad_error = scaled / static_cast<float>(N * D);
    residual_backward(grad, reinterpret_cast<Address>(&grad_error), x, D, N, D, codebook, {K}, 0, codes, cosine,
                      gradient, grad_x, threads);
}

}  // namespace spinlock_fast::training
