#include "byte_filters.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace py = pybind11;

namespace spinlock_fast {
namespace {

// Items [first, count) one by one; also the portable path for whole buffers.
void unshuffle_scalar(const std::byte* in, std::size_t item_size, std::size_t count, std::size_t first,
                      std::byte* out) noexcept {
    for (std::size_t b = 0; b < item_size; ++b) {
        const std::byte* plane = in + b * count;
        for (std::size_t i = first; i < count; ++i) out[i * item_size + b] = plane[i];
    }
}

#if defined(__SSE2__)
// Four byte planes to 16 items of 4 bytes at a time; returns the number of items done.
std::size_t unshuffle4_sse2(const std::byte* in, std::size_t count, std::byte* out) noexcept {
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const auto load = [&](std::size_t b) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + b * count + i));
        };
        const __m128i p0 = load(0), p1 = load(1), p2 = load(2), p3 = load(3);
        const __m128i lo01 = _mm_unpacklo_epi8(p0, p1), hi01 = _mm_unpackhi_epi8(p0, p1);
        const __m128i lo23 = _mm_unpacklo_epi8(p2, p3), hi23 = _mm_unpackhi_epi8(p2, p3);
        auto* dst = reinterpret_cast<__m128i*>(out + i * 4);
        _mm_storeu_si128(dst + 0, _mm_unpacklo_epi16(lo01, lo23));
        _mm_storeu_si128(dst + 1, _mm_unpackhi_epi16(lo01, lo23));
        _mm_storeu_si128(dst + 2, _mm_unpacklo_epi16(hi01, hi23));
        _mm_storeu_si128(dst + 3, _mm_unpackhi_epi16(hi01, hi23));
    }
    return i;
}
#endif

std::span<const std::byte> as_bytes(const py::buffer_info& info) {
    if (info.ndim > 0) {
        py::ssize_t expected = info.itemsize;
        for (py::ssize_t axis = info.ndim; axis-- > 0;) {
            if (info.shape[static_cast<std::size_t>(axis)] > 1 &&
                info.strides[static_cast<std::size_t>(axis)] != expected)
                throw std::invalid_argument("the buffer must be C-contiguous");
            expected *= info.shape[static_cast<std::size_t>(axis)];
        }
    }
    return {static_cast<const std::byte*>(info.ptr), static_cast<std::size_t>(info.size * info.itemsize)};
}

}  // namespace

void unshuffle(std::span<const std::byte> in, std::size_t item_size, std::span<std::byte> out) noexcept {
    const std::size_t count = in.size() / item_size;
    if (item_size == 1 || count < 2) {
        if (!in.empty()) std::memcpy(out.data(), in.data(), in.size());
        return;
    }
    std::size_t done = 0;
#if defined(__SSE2__)
    if (item_size == 4) done = unshuffle4_sse2(in.data(), count, out.data());
#endif
    unshuffle_scalar(in.data(), item_size, count, done, out.data());
    const std::size_t whole = count * item_size;
    if (in.size() > whole) std::memcpy(out.data() + whole, in.data() + whole, in.size() - whole);
}

std::uint32_t fletcher32(std::span<const std::byte> data) noexcept {
    std::uint32_t sum1 = 0, sum2 = 0;
    const std::byte* p = data.data();
    std::size_t words = data.size() / 2;
    const auto fold = [](std::uint32_t s) { return (s & 0xffffU) + (s >> 16); };
    while (words > 0) {
        // 360 words are the most that cannot overflow sum2 between two reductions.
        const std::size_t block = std::min<std::size_t>(words, 360);
        words -= block;
        for (std::size_t i = 0; i < block; ++i, p += 2) {
            sum1 += (std::to_integer<std::uint32_t>(p[0]) << 8) | std::to_integer<std::uint32_t>(p[1]);
            sum2 += sum1;
        }
        sum1 = fold(sum1);
        sum2 = fold(sum2);
    }
    if (data.size() % 2 != 0) {
        sum1 += std::to_integer<std::uint32_t>(*p) << 8;
        sum2 += sum1;
        sum1 = fold(sum1);
        sum2 = fold(sum2);
    }
    return (fold(sum2) << 16) | fold(sum1);
}

void register_byte_filters(py::module_& module) {
    module.def(
        "unshuffle",
        [](const py::buffer& data, std::size_t item_size) {
            if (item_size == 0) throw std::invalid_argument("item_size must be at least 1");
            const py::buffer_info info = data.request();
            const auto in = as_bytes(info);
            py::bytes result(nullptr, in.size());
            auto* out = reinterpret_cast<std::byte*>(PyBytes_AS_STRING(result.ptr()));
            {
                // Pure byte work on memory that both objects keep alive: other threads may run.
                const py::gil_scoped_release release;
                unshuffle(in, item_size, {out, in.size()});
            }
            return result;
        },
        py::arg("data"), py::arg("item_size"));

    module.def(
        "fletcher32",
        [](const py::buffer& data) {
            const py::buffer_info info = data.request();
            const auto in = as_bytes(info);
            // As above: reads only what `info` keeps alive.
            const py::gil_scoped_release release;
            return fletcher32(in);
        },
        py::arg("data"));
}

}  // namespace spinlock_fast
