// Convolution of a few channels on the torus: every channel is padded by its opposite sides once, then each vector of
// neighbouring points of all output channels is accumulated in registers.
#include <algorithm>
#include <cstring>
#include <vector>

#include "field_operations.hpp"
#include "vector_targets.hpp"

namespace spinlock_fast::simulate {
namespace {

constexpr int kChannels = 6;  // output channels at a time: with 4 vectors each they fill the registers of AVX-512

struct Shape {
    Index in, out, G, k, side;  // side: G + k - 1
};

template <int lanes>
struct Vector {
    typedef float type __attribute__((vector_size(lanes * sizeof(float)), aligned(4), may_alias));
};

// Points [0, vectors * lanes) of one row of `channels` output channels.
template <int lanes, int vectors, int channels>
SPINLOCK_INLINE void row_part(const float* padded, const float* weight, const float* bias, const Shape& s, float* out) {
    using V = typename Vector<lanes>::type;
    V sum[channels][vectors] = {};
    for (Index row = 0; row < s.k; ++row)
        for (Index column = 0; column < s.k; ++column) {
            const float* w = weight + (row * s.k + column) * s.in * s.out;
            const float* x = padded + row * s.side + column;
            for (Index c = 0; c < s.in; ++c, w += s.out, x += s.side * s.side)
                for (int v = 0; v < vectors; ++v) {
                    const V value = *reinterpret_cast<const V*>(x + v * lanes);
                    for (int o = 0; o < channels; ++o) sum[o][v] += w[o] * value;
                }
        }
    for (int o = 0; o < channels; ++o)
        for (int v = 0; v < vectors; ++v)
            *reinterpret_cast<V*>(out + o * s.G * s.G + v * lanes) = sum[o][v] + bias[o];
}

template <int lanes, int channels>
SPINLOCK_INLINE void planes(const float* padded, const float* weight, const float* bias, const Shape& s, float* out) {
    constexpr int wide = lanes == 16 ? 4 : 2;
    for (Index y = 0; y < s.G; ++y) {
        Index x = 0;
        for (; x + wide * lanes <= s.G; x += wide * lanes)
            row_part<lanes, wide, channels>(padded + y * s.side + x, weight, bias, s, out + y * s.G + x);
        for (; x < s.G; x += 2 * lanes)
            row_part<lanes, 2, channels>(padded + y * s.side + x, weight, bias, s, out + y * s.G + x);
    }
}

struct Convolution {
    template <int lanes>
    static SPINLOCK_INLINE void run(Lanes<lanes>, const float* padded, const float* weight, const float* bias,
                                    const Shape* shape, float* out) {
        const Shape& s = *shape;
        for (Index o = 0; o < s.out;) {
            const Index parts = (s.out - o + kChannels - 1) / kChannels, channels = (s.out - o + parts - 1) / parts;
            const float *w = weight + o, *b = bias + o;
            float* y = out + o * s.G * s.G;
            switch (channels) {
                case 1: planes<lanes, 1>(padded, w, b, s, y); break;
                case 2: planes<lanes, 2>(padded, w, b, s, y); break;
                case 3: planes<lanes, 3>(padded, w, b, s, y); break;
                case 4: planes<lanes, 4>(padded, w, b, s, y); break;
                case 5: planes<lanes, 5>(padded, w, b, s, y); break;
                default: planes<lanes, 6>(padded, w, b, s, y);
            }
            o += channels;
        }
    }
};

// scale * plane with r = (side - G) / 2 points of the opposite side on each side.
void pad(const float* plane, float scale, Index G, Index side, float* out) {
    const Index r = (side - G) / 2;
    for (Index y = 0; y < G; ++y) {
        float* row = out + (y + r) * side;
        for (Index x = 0; x < G; ++x) row[r + x] = scale * plane[y * G + x];
        std::memcpy(row, row + G, static_cast<std::size_t>(r) * sizeof(float));
        std::memcpy(row + r + G, row + r, static_cast<std::size_t>(r) * sizeof(float));
    }
    const std::size_t edge = static_cast<std::size_t>(r * side) * sizeof(float);
    std::memcpy(out, out + G * side, edge);
    std::memcpy(out + (r + G) * side, out + r * side, edge);
}

}  // namespace

void torus_convolution(Address x, Address scale, Address weight, Address bias, Index M, Index in, Index out_channels,
                       Index G, Index k, Address out) {
    check(M >= 0 && in > 0 && out_channels > 0 && G > 0 && G % 32 == 0 && k % 2 == 1 && k > 0 && k <= G);
    const Shape shape{in, out_channels, G, k, G + k - 1};
    const Index area = shape.side * shape.side;
    thread_local std::vector<float> padded;
    padded.resize(static_cast<std::size_t>(in * area));
    for (Index m = 0; m < M; ++m) {
        for (Index c = 0; c < in; ++c)
            pad(pointer<const float>(x) + (m * in + c) * G * G,
                scale ? pointer<const float>(scale)[m * in + c] : 1.0f, G, shape.side, padded.data() + c * area);
        run<Convolution>(padded.data(), pointer<const float>(weight), pointer<const float>(bias), &shape,
                         pointer<float>(out) + m * out_channels * G * G);
    }
}

}  // namespace spinlock_fast::simulate
