// Element-wise operations and sums of `field_operations.hpp`; compiled without contraction of products and sums.
#include "field_operations.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "vector_targets.hpp"

namespace spinlock_fast::simulate {
namespace {

constexpr int kSums = 4;    // at a time
constexpr int kLevels = 4;  // of the cascade

struct SumsAndSquares {
    float sum[kSums] = {}, square[kSums] = {};

    SPINLOCK_INLINE void add(int k, float x) {
        sum[k] += x;
        square[k] += x * x;
    }

    SPINLOCK_INLINE void add(const SumsAndSquares& other) {
        for (int k = 0; k < kSums; ++k) {
            sum[k] += other.sum[k];
            square[k] += other.square[k];
        }
    }
};

// Sums of value(i, k) over i < size. Sums of 2^power values are added to those of the next level.
template <class Value>
SPINLOCK_INLINE SumsAndSquares cascade_sums(Index size, Value value) {
    const int log2 = size > 1 ? static_cast<int>(std::bit_width(static_cast<std::uint64_t>(size - 1))) : 0;
    const int power = std::max(4, log2 / kLevels);
    const Index step = Index{1} << power, mask = step - 1;
    SumsAndSquares level[kLevels];
    Index i = 0;
    while (i + step <= size) {
        SumsAndSquares part = {};
        for (const Index end = i + step; i < end; ++i)
            for (int k = 0; k < kSums; ++k) part.add(k, value(i, k));
        level[0] = part;
        for (int l = 1; l < kLevels; ++l) {
            level[l].add(level[l - 1]);
            level[l - 1] = {};
            if ((i & (mask << (l * power))) != 0) break;
        }
    }
    for (; i < size; ++i)
        for (int k = 0; k < kSums; ++k) level[0].add(k, value(i, k));
    for (int l = 1; l < kLevels; ++l) level[0].add(level[l]);
    return level[0];
}

struct Sums {
    // torch adds up four channels at a time in order, and every other channel as four interleaved parts.
    template <int lanes>
    static SPINLOCK_INLINE void run(Lanes<lanes>, const float* x, Index channels, Index n, float* sums,
                                    float* squares) {
        const Index ordered = channels < 8 ? channels / kSums * kSums : 0;
        for (Index c = 0; c < channels;) {
            const float* plane = x + c * n;
            if (c < ordered) {
                const SumsAndSquares found = cascade_sums(n, [=](Index i, int k) { return plane[k * n + i]; });
                for (int k = 0; k < kSums; ++k, ++c) {
                    sums[c] = found.sum[k];
                    squares[c] = found.square[k];
                }
            } else {
                const auto found = cascade_sums(n / kSums, [=](Index i, int k) { return plane[i * kSums + k]; });
                sums[c] = ((found.sum[0] + found.sum[1]) + found.sum[2]) + found.sum[3];
                squares[c] = ((found.square[0] + found.square[1]) + found.square[2]) + found.square[3];
                ++c;
            }
        }
    }
};

struct Step {
    template <int lanes>
    static SPINLOCK_INLINE void run(Lanes<lanes>, const float* u, const float* f, const float* noise, Index n,
                                    float keep, float step, float cubic, float clip, float* out) {
        for (Index i = 0; i < n; ++i) {
            const float w = __builtin_fmaf(step, f[i], keep * u[i]);
            const float scale = 1.0f / std::sqrt(w * w * cubic + 1.0f);
            const float next = scale * w + noise[i];
            const float raised = next < -clip ? -clip : next;  // keeps NaN
            out[i] = raised > clip ? clip : raised;
        }
    }
};

struct Gradients {
    template <int lanes>
    static SPINLOCK_INLINE void run(Lanes<lanes>, const float* fields, Index planes, Index G, float* out) {
        for (Index row = 0; row < planes * G; ++row) {
            const float* here = fields + row * G;
            const float* below = (row + 1) % G ? here + G : here + G - G * G;
            float* square = out + row * G;
            for (Index x = 0; x + 1 < G; ++x) {
                const float dx = here[x + 1] - here[x], dy = below[x] - here[x];
                square[x] = __builtin_fmaf(dy, dy, dx * dx);
            }
            const float dx = here[0] - here[G - 1], dy = below[G - 1] - here[G - 1];
            square[G - 1] = __builtin_fmaf(dy, dy, dx * dx);
        }
    }
};

struct Interfaces {
    template <int lanes>
    static SPINLOCK_INLINE void run(Lanes<lanes>, const float* fields, const float* mean, Index planes, Index G,
                                    float* interfaces, float* least, float* greatest) {
        for (Index p = 0; p < planes; ++p, fields += G * G) {
            const float middle = mean[p];
            int pairs = 0, unordered = 0;
            float low = fields[0], high = fields[0];
            for (Index y = 0; y < G; ++y) {
                const float* here = fields + y * G;
                const float* below = y + 1 < G ? here + G : fields;
                for (Index x = 0; x < G; ++x) {
                    pairs += (here[x] - middle > 0.0f) != (below[x] - middle > 0.0f);
                    low = here[x] < low ? here[x] : low;
                    high = here[x] > high ? here[x] : high;
                    unordered |= !(here[x] == here[x]);
                }
                for (Index x = 0; x + 1 < G; ++x) pairs += (here[x] - middle > 0.0f) != (here[x + 1] - middle > 0.0f);
                pairs += (here[G - 1] - middle > 0.0f) != (here[0] - middle > 0.0f);
            }
            interfaces[p] = static_cast<float>(pairs);
            least[p] = unordered ? NAN : low;
            greatest[p] = unordered ? NAN : high;
        }
    }
};

struct BlockMeans {
    template <int lanes>
    static SPINLOCK_INLINE void run(Lanes<lanes>, const float* fields, Index planes, Index G, Index scale, float* out) {
        const Index side = G / scale;
        const float size = static_cast<float>(scale * scale);
        for (Index row = 0; row < planes * side; ++row) {  // a plane has G = side * scale rows
            const float* block = fields + row * scale * G;
            for (Index x = 0; x < side; ++x) {
                float sum = 0.0f;
                for (Index i = 0; i < scale; ++i)
                    for (Index j = 0; j < scale; ++j) sum += block[i * G + x * scale + j];
                out[row * side + x] = sum / size;
            }
        }
    }
};

struct Split {
    template <int lanes>
    static SPINLOCK_INLINE void run(Lanes<lanes>, const float* values, Index n, float* real, float* imag,
                                    float* power) {
        for (Index i = 0; i < n; ++i) {
            const float a = values[2 * i], b = values[2 * i + 1];
            real[i] = a;
            imag[i] = b;
            power[i] = __builtin_fmaf(b, b, a * a);
        }
    }
};

}  // namespace

void channel_sums(Address x, Index M, Index channels, Index n, Address sums, Address square_sums) {
    check(channels >= 0 && n >= 0 && n % kSums == 0);
    for (Index m = 0; m < M; ++m)
        run<Sums>(pointer<const float>(x) + m * channels * n, channels, n, pointer<float>(sums) + m * channels,
                  pointer<float>(square_sums) + m * channels);
}

void confined_step(Address u, Address f, Address noise, Index n, float keep, float step, float cubic, float clip,
                   Address out) {
    run<Step>(pointer<const float>(u), pointer<const float>(f), pointer<const float>(noise), n, keep, step, cubic, clip,
              pointer<float>(out));
}

void squared_gradients(Address fields, Index planes, Index G, Address out) {
    check(planes >= 0 && G > 0);
    run<Gradients>(pointer<const float>(fields), planes, G, pointer<float>(out));
}

void interfaces_and_extremes(Address fields, Address mean, Index planes, Index G, Address interfaces, Address least,
                             Address greatest) {
    check(planes >= 0 && G > 0);
    run<Interfaces>(pointer<const float>(fields), pointer<const float>(mean), planes, G, pointer<float>(interfaces),
                    pointer<float>(least), pointer<float>(greatest));
}

void block_means(Address fields, Index planes, Index G, Index scale, Address out) {
    check(planes >= 0 && scale > 0 && G % scale == 0);
    run<BlockMeans>(pointer<const float>(fields), planes, G, scale, pointer<float>(out));
}

void split_complex(Address values, Index n, Address real, Address imag, Address power) {
    run<Split>(pointer<const float>(values), n, pointer<float>(real), pointer<float>(imag), pointer<float>(power));
}

}  // namespace spinlock_fast::simulate
