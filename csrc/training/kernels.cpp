#include "kernels.hpp"

#include "instruction_sets.hpp"

namespace spinlock_fast::training {

const Kernels& kernels() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    const InstructionSet set = instruction_set();
    if (set == InstructionSet::avx512) return avx512_kernels();
    if (set == InstructionSet::avx2) return avx2_kernels();
#endif
    return portable_kernels();
}

}  // namespace spinlock_fast::training
