#define SPINLOCK_SIMD avx512
#include "kernels_impl.hpp"

namespace spinlock_fast::training {

const Kernels& avx512_kernels() { return avx512::kKernels; }

}  // namespace spinlock_fast::training
