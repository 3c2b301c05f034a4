// Assertions that report their line, and test data.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <vector>

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                  \
        }                                                                                  \
    } while (false)

// Checks that the expression throws `kind` with a message that contains `text`.
#define CHECK_THROWS(kind, text, expression)                                    \
    do {                                                                        \
        bool thrown = false;                                                    \
        try {                                                                   \
            static_cast<void>(expression);                                      \
        } catch (const kind& error) {                                           \
            thrown = std::string(error.what()).find(text) != std::string::npos; \
            if (!thrown) std::fprintf(stderr, "%s\n", error.what());            \
        }                                                                       \
        CHECK(thrown && "throws " #kind && text);                               \
    } while (false)

namespace spinlock_fast::testing {

using Bytes = std::vector<std::byte>;
using Floats = std::vector<float>;

inline Bytes random_bytes(std::size_t size, unsigned seed) {
    std::mt19937 random(seed);
    Bytes bytes(size);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    return bytes;
}

inline void append(Bytes& bytes, std::uint32_t value, int count, bool big_endian) {
    for (int i = 0; i < count; ++i)
        bytes.push_back(static_cast<std::byte>(value >> (8 * (big_endian ? count - 1 - i : i))));
}

// A valid zlib stream of uncompressed blocks.
inline Bytes zlib_stored(std::span<const std::byte> data) {
    Bytes out{std::byte{0x78}, std::byte{0x01}};
    std::size_t start = 0;
    do {
        const std::size_t size = std::min<std::size_t>(data.size() - start, 0xffff);
        out.push_back(static_cast<std::byte>(start + size == data.size()));
        append(out, static_cast<std::uint32_t>(size), 2, false);
        append(out, static_cast<std::uint32_t>(~size), 2, false);
        for (std::size_t i = 0; i < size; ++i) out.push_back(data[start + i]);
        start += size;
    } while (start < data.size());
    std::uint32_t a = 1, b = 0;
    for (const std::byte byte : data) {
        a = (a + std::to_integer<std::uint32_t>(byte)) % 65521;
        b = (b + a) % 65521;
    }
    append(out, b << 16 | a, 4, true);
    return out;
}

template <class T>
std::uintptr_t address(const std::vector<T>& values) {
    return values.empty() ? 0 : reinterpret_cast<std::uintptr_t>(values.data());
}

// Standard normal values; each is 0 with probability `zeros`.
inline Floats normal(std::int64_t n, unsigned seed, double zeros = 0.0) {
    std::mt19937 random(seed);
    std::normal_distribution<float> value;
    std::bernoulli_distribution zero(zeros);
    Floats out(static_cast<std::size_t>(n));
    for (float& x : out) x = zero(random) ? 0.0f : value(random);
    return out;
}

// Memory for results, filled with NaN to expose unwritten values.
inline Floats unwritten(std::int64_t n) {
    return Floats(static_cast<std::size_t>(n), std::numeric_limits<float>::quiet_NaN());
}

// Equal bits; a NaN equals every other NaN.
inline bool same_bits(const std::vector<Floats>& a, const std::vector<Floats>& b) {
    if (a.size() != b.size()) return false;
    for (std::size_t i = 0; i < a.size(); ++i)
        for (std::size_t j = 0; j < a[i].size(); ++j)
            if (std::bit_cast<std::uint32_t>(a[i][j]) != std::bit_cast<std::uint32_t>(b[i][j]) &&
                !(std::isnan(a[i][j]) && std::isnan(b[i][j])))
                return false;
    return true;
}

// Applies HDF5's shuffle filter.
inline Bytes shuffled(std::span<const std::byte> data, std::size_t item_size) {
    const std::size_t count = data.size() / item_size;
    Bytes out(data.begin(), data.end());
    for (std::size_t i = 0; i < count; ++i)
        for (std::size_t b = 0; b < item_size; ++b) out[b * count + i] = data[i * item_size + b];
    return out;
}

}  // namespace spinlock_fast::testing
