#include "chunk_decoder.hpp"

#include "byte_filters.hpp"
#include "errors.hpp"

#include <cstring>
#include <string>

namespace spinlock_fast {
namespace {

constexpr std::size_t kChecksum = 4;

std::span<std::byte> strip_checksum(std::span<std::byte> data, bool verify) {
    if (data.size() < kChecksum) throw DecodeError("too short for its checksum");
    const auto body = data.first(data.size() - kChecksum);
    if (!verify) return body;
    std::uint32_t stored = 0;
    for (std::size_t i = 0; i < kChecksum; ++i)
        stored |= std::to_integer<std::uint32_t>(data[body.size() + i]) << (8 * i);
    const std::uint32_t found = fletcher32(body);
    // libhdf5 before 1.6.3 swapped the bytes of each half, and readers still accept that.
    const std::uint32_t swapped = ((found & 0x00ff00ffU) << 8) | ((found >> 8) & 0x00ff00ffU);
    if (stored != found && stored != swapped) throw DecodeError("the checksum does not match");
    return body;
}

}  // namespace

std::span<std::byte> ChunkDecoder::decode(std::span<std::byte> stored, std::uint32_t mask,
                                          std::span<const Filter> filters, std::size_t chunk_bytes, bool verify,
                                          std::span<std::byte> into) {
    const auto active = [&](std::size_t i) { return i >= 32 || ((mask >> i) & 1U) == 0; };
    std::span<std::byte> data = stored;
    // Memory for what filter i was applied to: where that is the chunk itself, the caller's.
    const auto output = [&](std::size_t i, std::size_t size, Scratch& own) {
        for (std::size_t j = 0; j < i; ++j)
            if (active(j)) return own.take(size);
        return into.empty() || size != chunk_bytes ? own.take(size) : into;
    };
    for (std::size_t i = filters.size(); i-- > 0;) {
        if (!active(i)) continue;
        switch (filters[i].kind) {
            case FilterKind::fletcher32: data = strip_checksum(data, verify); break;
            case FilterKind::deflate: {
                std::size_t expected = chunk_bytes;
                // A checksum that was appended before compression comes out of it.
                for (std::size_t j = 0; j < i; ++j)
                    if (active(j) && filters[j].kind == FilterKind::fletcher32) expected += kChecksum;
                const auto out = output(i, expected, inflated_);
                inflater_.inflate(data, out);
                data = out;
                break;
            }
            case FilterKind::shuffle: {
                const auto out = output(i, data.size(), unshuffled_);
                unshuffle(data, filters[i].item_size, out);
                data = out;
                break;
            }
        }
    }
    if (data.size() != chunk_bytes)
        throw DecodeError("holds " + std::to_string(data.size()) + " bytes instead of " +
                          std::to_string(chunk_bytes));
    if (!into.empty() && data.data() != into.data()) {
        std::memcpy(into.data(), data.data(), chunk_bytes);
        return into;
    }
    return data;
}

std::size_t max_stored_size(std::size_t chunk_bytes, std::size_t filters) noexcept {
    // No deflate makes its input longer by more than an eighth; libhdf5 allows 0.1 %.
    return chunk_bytes + chunk_bytes / 8 + 64 + kChecksum * filters;
}

}  // namespace spinlock_fast
