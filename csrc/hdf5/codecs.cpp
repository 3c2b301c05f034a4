#include "codecs.hpp"

#include "errors.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(SPINLOCK_FAST_LZ4)
#include <lz4.h>
#endif
#if defined(SPINLOCK_FAST_ZSTD)
#include <zstd.h>
#include <zstd_errors.h>
#endif

namespace spinlock_fast {
namespace {

constexpr const char* kInvalid = "the compressed data are invalid";

// Copies of this many bytes may write behind the end of a run, where there is room.
constexpr std::size_t kWideCopy = 32;

// Appends `length` bytes that start `distance` bytes before `to` and may overlap what is written.
void copy_match(std::byte* to, std::size_t distance, std::size_t length, const std::byte* end) noexcept {
    const std::byte* from = to - distance;
    std::byte* const stop = to + length;
    if (distance == 1) {
        std::memset(to, std::to_integer<int>(*from), length);
        return;
    }
    if (distance >= 16 && static_cast<std::size_t>(end - stop) >= 16) {
        do {
            std::memcpy(to, from, 16);
            to += 16, from += 16;
        } while (to < stop);
        return;
    }
    // Doubles the distance until 8 bytes do not overlap.
    while (distance < 8 && to < stop) {
        const std::size_t count = std::min(distance, static_cast<std::size_t>(stop - to));
        for (std::size_t i = 0; i < count; ++i) to[i] = from[i];
        to += count;
        distance += count;
    }
    if (static_cast<std::size_t>(end - stop) >= 8) {
        for (; to < stop; to += 8, from += 8) std::memcpy(to, from, 8);
    } else {
        while (to < stop) *to++ = *from++;
    }
}

// Copies `length` literal bytes, at most 32.
void copy_literals(const std::byte* from, const std::byte* from_end, std::byte* to, const std::byte* to_end,
                   std::size_t length) noexcept {
    if (static_cast<std::size_t>(from_end - from) >= kWideCopy && static_cast<std::size_t>(to_end - to) >= kWideCopy)
        std::memcpy(to, from, kWideCopy);
    else
        std::memcpy(to, from, length);
}

}  // namespace

// A control byte below 32 precedes that many literal bytes, plus one. Otherwise its upper 3 bits (7: plus the next byte)
// are the length of a match minus 2; its lower 5 bits and one more byte are the distance minus 1.
std::optional<std::size_t> decode_lzf(std::span<const std::byte> in, std::span<std::byte> out) {
    const std::byte* from = in.data();
    const std::byte* const from_end = from + in.size();
    std::byte* to = out.data();
    std::byte* const to_end = to + out.size();
    const auto next = [&] {
        if (from == from_end) throw DecodeError(kInvalid);
        return std::to_integer<std::size_t>(*from++);
    };
    while (from < from_end) {
        const std::size_t control = next();
        std::size_t length = control + 1;
        if (control < 32) {
            if (static_cast<std::size_t>(from_end - from) < length) throw DecodeError(kInvalid);
            if (static_cast<std::size_t>(to_end - to) < length) return std::nullopt;
            copy_literals(from, from_end, to, to_end, length);
            from += length;
        } else {
            length = control >> 5;
            if (length == 7) length += next();
            length += 2;
            const std::size_t distance = ((control & 31) << 8 | next()) + 1;
            if (static_cast<std::size_t>(to - out.data()) < distance) throw DecodeError(kInvalid);
            if (static_cast<std::size_t>(to_end - to) < length) return std::nullopt;
            copy_match(to, distance, length, to_end);
        }
        to += length;
    }
    return static_cast<std::size_t>(to - out.data());
}

// Like LZF, with other limits: the upper 3 bits of a match are its length minus 2, extended by bytes of 255; the largest
// distance of 13 bits announces two more bytes. The first and the last run are of literals.
std::optional<std::size_t> decode_blosclz(std::span<const std::byte> in, std::span<std::byte> out) {
    constexpr std::size_t kShortDistance = 8191;
    const std::byte* from = in.data();
    const std::byte* const from_end = from + in.size();
    std::byte* to = out.data();
    std::byte* const to_end = to + out.size();
    const auto next = [&] {
        if (from == from_end) throw DecodeError(kInvalid);
        return std::to_integer<std::size_t>(*from++);
    };
    for (std::size_t control = next() & 31;; control = next()) {
        std::size_t length = control + 1;
        if (control < 32) {
            if (static_cast<std::size_t>(from_end - from) < length) throw DecodeError(kInvalid);
            if (static_cast<std::size_t>(to_end - to) < length) return std::nullopt;
            copy_literals(from, from_end, to, to_end, length);
            from += length;
        } else {
            length = (control >> 5) + 2;
            if (control >= 7 << 5) {
                std::size_t more = 0;
                do {
                    more = next();
                    length += more;
                } while (more == 255);
            }
            std::size_t distance = ((control & 31) << 8) + next();
            if (distance == kShortDistance) {
                const std::size_t high = next();
                distance += high << 8 | next();
            }
            ++distance;
            if (static_cast<std::size_t>(to - out.data()) < distance) throw DecodeError(kInvalid);
            if (static_cast<std::size_t>(to_end - to) < length) return std::nullopt;
            if (from == from_end) throw DecodeError(kInvalid);  // the last run is always of literals
            copy_match(to, distance, length, to_end);
        }
        to += length;
        if (from == from_end) return static_cast<std::size_t>(to - out.data());
    }
}

#if defined(SPINLOCK_FAST_LZ4)

std::string lz4_version() { return LZ4_versionString(); }

void decode_lz4_block(std::span<const std::byte> in, std::span<std::byte> out) {
    constexpr std::size_t limit = std::numeric_limits<int>::max();
    if (in.size() > limit || out.size() > limit) throw DecodeError("a block is too large for LZ4");
    if (in.empty()) throw DecodeError(kInvalid);
    const int produced =
        LZ4_decompress_safe(reinterpret_cast<const char*>(in.data()), reinterpret_cast<char*>(out.data()),
                            static_cast<int>(in.size()), static_cast<int>(out.size()));
    if (produced < 0 || static_cast<std::size_t>(produced) != out.size()) throw DecodeError(kInvalid);
}

#else

std::string lz4_version() { return {}; }

void decode_lz4_block(std::span<const std::byte>, std::span<std::byte>) {
    throw DecodeError("this build has no LZ4 library");
}

#endif

#if defined(SPINLOCK_FAST_ZSTD)

struct ZstdDecoder::State {
    struct Free {
        void operator()(ZSTD_DCtx* context) const noexcept { ZSTD_freeDCtx(context); }
    };
    std::unique_ptr<ZSTD_DCtx, Free> context{ZSTD_createDCtx()};
};

std::string zstd_version() { return ZSTD_versionString(); }

std::optional<std::size_t> ZstdDecoder::declared_size(std::span<const std::byte> in) {
    const unsigned long long size = ZSTD_getFrameContentSize(in.data(), in.size());
    if (size == ZSTD_CONTENTSIZE_ERROR) throw DecodeError(kInvalid);
    if (size == ZSTD_CONTENTSIZE_UNKNOWN) return std::nullopt;
    return static_cast<std::size_t>(size);
}

std::optional<std::size_t> ZstdDecoder::decode(std::span<const std::byte> in, std::span<std::byte> out) {
    if (!state_) state_ = std::make_unique<State>();
    if (!state_->context) throw std::bad_alloc();
    const std::size_t result =
        ZSTD_decompressDCtx(state_->context.get(), out.data(), out.size(), in.data(), in.size());
    if (!ZSTD_isError(result)) return result;
    switch (ZSTD_getErrorCode(result)) {
        case ZSTD_error_dstSize_tooSmall:
            return std::nullopt;
        case ZSTD_error_memory_allocation:
            throw std::bad_alloc();
        case ZSTD_error_checksum_wrong:
            throw DecodeError("the checksum of the compressed data does not match");
        default:
            throw DecodeError(kInvalid);
    }
}

#else

struct ZstdDecoder::State {};

std::string zstd_version() { return {}; }

std::optional<std::size_t> ZstdDecoder::declared_size(std::span<const std::byte>) { return std::nullopt; }

std::optional<std::size_t> ZstdDecoder::decode(std::span<const std::byte>, std::span<std::byte>) {
    throw DecodeError("this build has no Zstandard library");
}

#endif

ZstdDecoder::ZstdDecoder() = default;
ZstdDecoder::~ZstdDecoder() = default;
ZstdDecoder::ZstdDecoder(ZstdDecoder&&) noexcept = default;
ZstdDecoder& ZstdDecoder::operator=(ZstdDecoder&&) noexcept = default;

}  // namespace spinlock_fast
