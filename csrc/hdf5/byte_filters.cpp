#include "byte_filters.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SPINLOCK_FAST_X86 1
#include <immintrin.h>
#endif

namespace spinlock_fast {
namespace {

// Portable loop over items [first, count).
void unshuffle_scalar(const std::byte* in, std::size_t item_size, std::size_t count, std::size_t first,
                      std::byte* out) noexcept {
    for (std::size_t b = 0; b < item_size; ++b) {
        const std::byte* plane = in + b * count;
        for (std::size_t i = first; i < count; ++i) out[i * item_size + b] = plane[i];
    }
}

#if defined(SPINLOCK_FAST_X86)

// Byte k of all items forms plane k. Interleaving plane k with plane k + N/2, log2(N) times, restores the items.

// 16 items per iteration; returns the number of items done.
template <std::size_t N>
std::size_t unshuffle_sse2(const std::byte* in, std::size_t count, std::byte* out) noexcept {
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m128i v[N], w[N];
        for (std::size_t b = 0; b < N; ++b)
            v[b] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + b * count + i));
        for (std::size_t step = 1; step < N; step *= 2) {
            for (std::size_t k = 0; k < N / 2; ++k) {
                w[2 * k] = _mm_unpacklo_epi8(v[k], v[k + N / 2]);
                w[2 * k + 1] = _mm_unpackhi_epi8(v[k], v[k + N / 2]);
            }
            for (std::size_t k = 0; k < N; ++k) v[k] = w[k];
        }
        auto* dst = reinterpret_cast<__m128i*>(out + i * N);
        for (std::size_t k = 0; k < N; ++k) _mm_storeu_si128(dst + k, v[k]);
    }
    return i;
}

// 32 items per iteration. AVX2 unpack instructions operate within 128-bit halves: the low halves hold items 0 to 15,
// the high halves items 16 to 31.
template <std::size_t N>
__attribute__((target("avx2"))) std::size_t unshuffle_avx2(const std::byte* in, std::size_t count,
                                                           std::byte* out) noexcept {
    std::size_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m256i v[N], w[N];
        for (std::size_t b = 0; b < N; ++b)
            v[b] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + b * count + i));
        for (std::size_t step = 1; step < N; step *= 2) {
            for (std::size_t k = 0; k < N / 2; ++k) {
                w[2 * k] = _mm256_unpacklo_epi8(v[k], v[k + N / 2]);
                w[2 * k + 1] = _mm256_unpackhi_epi8(v[k], v[k + N / 2]);
            }
            for (std::size_t k = 0; k < N; ++k) v[k] = w[k];
        }
        auto* dst = reinterpret_cast<__m128i*>(out + i * N);
        for (std::size_t k = 0; k < N; ++k) {
            _mm_storeu_si128(dst + k, _mm256_castsi256_si128(v[k]));
            _mm_storeu_si128(dst + N + k, _mm256_extracti128_si256(v[k], 1));
        }
    }
    return i;
}

template <std::size_t N>
std::size_t unshuffle_wide(const std::byte* in, std::size_t count, std::byte* out, Simd simd) noexcept {
    if (simd == Simd::avx2) return unshuffle_avx2<N>(in, count, out);
    if (simd == Simd::sse2) return unshuffle_sse2<N>(in, count, out);
    return 0;
}

#endif

// Transposes the 8 x 8 bits of each word: bit i of byte k becomes bit k of byte i. The compiler vectorizes the loop.
[[gnu::always_inline]] inline void transpose_bits(std::byte* data, std::size_t size) noexcept {
    static_assert(std::endian::native == std::endian::little);
    for (std::size_t i = 0; i + 8 <= size; i += 8) {
        std::uint64_t word;
        std::memcpy(&word, data + i, 8);
        std::uint64_t moved = (word ^ (word >> 7)) & 0x00aa00aa00aa00aaU;
        word ^= moved ^ (moved << 7);
        moved = (word ^ (word >> 14)) & 0x0000cccc0000ccccU;
        word ^= moved ^ (moved << 14);
        moved = (word ^ (word >> 28)) & 0x00000000f0f0f0f0U;
        word ^= moved ^ (moved << 28);
        std::memcpy(data + i, &word, 8);
    }
}

#if defined(SPINLOCK_FAST_X86)
__attribute__((target("avx2"))) void transpose_bits_avx2(std::byte* data, std::size_t size) noexcept {
    transpose_bits(data, size);
}
#endif

template <typename Word, typename Swap>
void swap_words(std::span<std::byte> data, Swap swap) noexcept {
    for (std::size_t i = 0; i + sizeof(Word) <= data.size(); i += sizeof(Word)) {
        Word word;
        std::memcpy(&word, data.data() + i, sizeof(Word));
        word = swap(word);
        std::memcpy(data.data() + i, &word, sizeof(Word));
    }
}

}  // namespace

std::string_view simd_level() noexcept {
#if defined(SPINLOCK_FAST_X86)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return "avx512";
    if (__builtin_cpu_supports("avx2")) return "avx2";
    return "sse2";  // baseline of x86-64
#else
    return "portable";
#endif
}

Simd best_simd() noexcept {
#if defined(SPINLOCK_FAST_X86)
    return __builtin_cpu_supports("avx2") ? Simd::avx2 : Simd::sse2;
#else
    return Simd::portable;
#endif
}

void unshuffle(std::span<const std::byte> in, std::size_t item_size, std::span<std::byte> out,
               [[maybe_unused]] Simd simd) noexcept {
    const std::size_t count = in.size() / item_size;
    if (item_size == 1 || count < 2) {
        if (!in.empty()) std::memcpy(out.data(), in.data(), in.size());
        return;
    }
    std::size_t done = 0;
#if defined(SPINLOCK_FAST_X86)
    if (item_size == 2) done = unshuffle_wide<2>(in.data(), count, out.data(), simd);
    if (item_size == 4) done = unshuffle_wide<4>(in.data(), count, out.data(), simd);
    if (item_size == 8) done = unshuffle_wide<8>(in.data(), count, out.data(), simd);
#endif
    unshuffle_scalar(in.data(), item_size, count, done, out.data());
    const std::size_t whole = count * item_size;
    if (in.size() > whole) std::memcpy(out.data() + whole, in.data() + whole, in.size() - whole);
}

void bit_unshuffle(std::span<const std::byte> in, std::size_t item_size, std::span<std::byte> out,
                   std::span<std::byte> planes, Simd simd) noexcept {
    const std::size_t count = in.size() / item_size;
    const auto bytes = item_size == 1 ? out : planes;
    // Byte b of all items: 8 rows of bits, interleaved to words of 8 x 8 bits.
    for (std::size_t b = 0; b < item_size; ++b)
        unshuffle(in.subspan(b * count, count), 8, bytes.subspan(b * count, count), simd);
#if defined(SPINLOCK_FAST_X86)
    if (simd == Simd::avx2)
        transpose_bits_avx2(bytes.data(), bytes.size());
    else
#endif
        transpose_bits(bytes.data(), bytes.size());
    if (item_size > 1) unshuffle(bytes, item_size, out, simd);
}

void swap_bytes(std::span<std::byte> data, std::size_t item_size) noexcept {
    const auto swap16 = [](std::uint16_t w) { return static_cast<std::uint16_t>((w << 8) | (w >> 8)); };
    if (item_size == 2) swap_words<std::uint16_t>(data, swap16);
    if (item_size == 4) swap_words<std::uint32_t>(data, [](std::uint32_t w) { return __builtin_bswap32(w); });
    if (item_size == 8) swap_words<std::uint64_t>(data, [](std::uint64_t w) { return __builtin_bswap64(w); });
}

std::uint32_t fletcher32(std::span<const std::byte> data) noexcept {
    std::uint32_t sum1 = 0, sum2 = 0;
    const std::byte* p = data.data();
    std::size_t words = data.size() / 2;
    const auto fold = [](std::uint32_t s) { return (s & 0xffffU) + (s >> 16); };
    while (words > 0) {
        // At most 360 words between reductions: more could overflow sum2.
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

}  // namespace spinlock_fast
