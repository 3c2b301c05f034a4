// Helpers for SIMD vectors: partial loads and stores, square roots, reductions.
#pragma once

#include "dense_gemm.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

// Loads n <= kLanes values, padded with zeros.
inline Vector load_partial(const float* p, Index n) {
    if (n == kLanes) return load(p);
    alignas(64) float values[kLanes] = {};
    std::memcpy(values, p, static_cast<std::size_t>(n) * sizeof(float));
    return load(values);
}

// Stores the first n <= kLanes values of v.
inline void store_partial(float* p, Index n, Vector v) {
    if (n == kLanes)
        store(p, v);
    else
        std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(float));
}

inline Vector vector_sqrt(Vector x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<Vector>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// 1 / sqrt(x) for x > 0, accurate to 1 or 2 units in the last place.
inline Vector rsqrt(Vector x) {
#if defined(__AVX512F__)
    const Vector guess = reinterpret_cast<Vector>(_mm512_rsqrt14_ps(reinterpret_cast<__m512>(x)));
    return guess * (1.5f - 0.5f * x * guess * guess);
#else
    return 1.0f / vector_sqrt(x);
#endif
}

// sqrt(x) for x >= 0.
inline Vector fast_sqrt(Vector x) {
#if defined(__AVX512F__)
    return x > Vector{} ? x * rsqrt(x) : Vector{};  // twice as fast as the sqrt instruction
#else
    return vector_sqrt(x);
#endif
}

inline float horizontal_sum(Vector x) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
}

inline bool is_finite(float x) { return x - x == 0.0f; }

// n rounded up to a multiple of kLanes.
inline Index whole_vectors(Index n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Sum of f(i) over i = 0, kLanes, 2 kLanes, ... for n a multiple of kLanes.
template <class F>
inline float vector_sum(Index n, F f) {
    Vector sum = {};
    Index i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += f(i);
    return horizontal_sum(sum);
}

inline float reduce_sum(const float* x, Index n) {
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

inline float squared_distance(const float* x, const float* y, Index n) {
    const Index whole = n / kLanes * kLanes;
    float sum = vector_sum(whole, [&](Index i) {
        const Vector difference = load(x + i) - load(y + i);
        return difference * difference;
    });
    for (Index i = whole; i < n; ++i) sum += (x[i] - y[i]) * (x[i] - y[i]);
    return sum;
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
