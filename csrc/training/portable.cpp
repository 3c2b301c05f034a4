#define SPINLOCK_SIMD portable
#include "kernels_impl.hpp"

namespace spinlock_fast::training {

const Kernels& portable_kernels() { return portable::kKernels; }

}  // namespace spinlock_fast::training
