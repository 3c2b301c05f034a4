// Vectors of one instruction set: roots, sums, whole vectors.
#pragma once

#include "gemm.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void keep(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

// The first n <= kLanes values of p, then zeros.
inline Vector load_part(const float* p, Index n) {
    if (n == kLanes) return load(p);
    alignas(64) float values[kLanes] = {};
    std::memcpy(values, p, static_cast<std::size_t>(n) * sizeof(float));
    return load(values);
}

// The first n <= kLanes values of v.
inline void keep_part(float* p, Index n, Vector v) {
    if (n == kLanes)
        keep(p, v);
    else
        std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(float));
}

inline Vector all(float x) { return x - Vector{}; }

inline Vector root(Vector x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<Vector>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// 1 / sqrt(x) for x > 0, to the last bit or two.
inline Vector inverse_root(Vector x) {
#if defined(__AVX512F__)
    const Vector guess = reinterpret_cast<Vector>(_mm512_rsqrt14_ps(reinterpret_cast<__m512>(x)));
    return guess * (1.5f - 0.5f * x * guess * guess);
#else
    return 1.0f / root(x);
#endif
}

inline Vector root_of_square(Vector x) {
#if defined(__AVX512F__)
    return x > Vector{} ? x * inverse_root(x) : Vector{};  // in half the time of the division unit's root
#else
    return root(x);
#endif
}

inline float total(Vector x) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
}

inline bool finite(float x) { return x - x == 0.0f; }

// n rounded up to whole vectors.
inline Index whole_vectors(Index n) { return (n + kLanes - 1) / kLanes * kLanes; }

// f(i) summed over [0, n), lane by lane.
template <class F>
inline float vector_sum(Index n, F f) {
    Vector sum = {};
    Index i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += f(i);
    return total(sum);
}

inline float sum_of(const float* x, Index n) {
    Index whole = n / kLanes * kLanes;
    float sum = vector_sum(whole, [&](Index i) { return load(x + i); });
    for (Index i = whole; i < n; ++i) sum += x[i];
    return sum;
}

inline float dot(const float* x, const float* y, Index n) {
    Index whole = n / kLanes * kLanes;
    float sum = vector_sum(whole, [&](Index i) { return load(x + i) * load(y + i); });
    for (Index i = whole; i < n; ++i) sum += x[i] * y[i];
    return sum;
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
