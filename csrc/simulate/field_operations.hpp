// Operations on periodic fields [planes, G, G] of the simulation and its descriptors, in one thread.
//
// Tensors are addresses of contiguous float32 memory (0: none). Operations access only that memory and no Python API.
// Sums and products are rounded in the order of the PyTorch operators that they replace, so that the values of data
// sets do not change.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace spinlock_fast::simulate {

using Address = std::uintptr_t;
using Index = std::int64_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Throws std::invalid_argument unless sizes are possible.
inline void check(bool possible) {
    if (!possible) throw std::invalid_argument("impossible sizes of fields");
}

// out[m, o] = sum over kernel rows, kernel columns, channels of weight * (scale * x), then + bias; x [M, in, G, G],
// scale [M, in] or none, weight [k, k, in, out], bias [out], out [M, out, G, G]. G is a multiple of 32, k is odd.
void torus_convolution(Address x, Address scale, Address weight, Address bias, Index M, Index in, Index out_channels,
                       Index G, Index k, Address out);

// Sums over x [M, channels, n] and over its squares, in the order in which torch.sum adds up a channels-last tensor of 2
// to 31 channels; n is a multiple of 4.
void channel_sums(Address x, Index M, Index channels, Index n, Address sums, Address square_sums);

// out = clip(w / sqrt(1 + cubic w^2) + noise) with w = keep u + step f, for n values.
void confined_step(Address u, Address f, Address noise, Index n, float keep, float step, float cubic, float clip,
                   Address out);

// Sums of squares of the forward differences along both axes [planes, G, G].
void squared_gradients(Address fields, Index planes, Index G, Address out);

// For every plane: number of neighbouring pairs of which one value minus `mean` is positive and one is not; extremes.
void interfaces_and_extremes(Address fields, Address mean, Index planes, Index G, Address interfaces, Address least,
                             Address greatest);

// Means of blocks of side `scale`: [planes, G / scale, G / scale].
void block_means(Address fields, Index planes, Index G, Index scale, Address out);

// Real parts, imaginary parts and squared moduli of n complex numbers.
void split_complex(Address values, Index n, Address real, Address imag, Address power);

}  // namespace spinlock_fast::simulate
