// Compiles a function body for AVX-512, AVX2 and the baseline, and calls that of the selected instruction set.
#pragma once

#include "instruction_sets.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPINLOCK_INLINE inline __attribute__((always_inline))
#define SPINLOCK_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define SPINLOCK_AVX2 __attribute__((target("avx2,fma")))
#else
#define SPINLOCK_INLINE inline
#define SPINLOCK_AVX512
#define SPINLOCK_AVX2
#endif

namespace spinlock_fast::simulate {

template <int lanes>
struct Lanes {
    static constexpr int value = lanes;
};

// `body(Lanes<n>, arguments...)` must be SPINLOCK_INLINE; n is the number of floats of a vector register.
template <class Body, class... Arguments>
SPINLOCK_AVX512 void run_avx512(Arguments... arguments) {
    Body::run(Lanes<16>{}, arguments...);
}

template <class Body, class... Arguments>
SPINLOCK_AVX2 void run_avx2(Arguments... arguments) {
    Body::run(Lanes<8>{}, arguments...);
}

template <class Body, class... Arguments>
void run(Arguments... arguments) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    const InstructionSet set = instruction_set();
    if (set == InstructionSet::avx512) return run_avx512<Body>(arguments...);
    if (set == InstructionSet::avx2) return run_avx2<Body>(arguments...);
#endif
    Body::run(Lanes<4>{}, arguments...);
}

}  // namespace spinlock_fast::simulate
