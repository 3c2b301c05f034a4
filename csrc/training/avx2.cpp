#define SPINLOCK_SIMD avx2
#include "kernels_impl.hpp"

namespace spinlock_fast::training {

const Kernels& avx2_kernels() { return avx2::kKernels; }

}  // namespace spinlock_fast::training
