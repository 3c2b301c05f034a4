#include "chunk_decoder.hpp"

#include "byte_filters.hpp"
#include "errors.hpp"

#include <algorithm>
#include <cstring>
#include <string>

namespace spinlock_fast {
namespace {

constexpr std::size_t kChecksum = 4;
constexpr std::size_t kMostDeflated = 1032;          // bytes that one byte of a deflate stream stands for at most
constexpr std::size_t kMostLonger = std::size_t{16} << 20;  // bytes that a chunk may hold beyond its own

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
                if (const auto made = inflater_.inflate(data, out)) {
                    if (*made < expected) throw DecodeError("the compressed data end early");
                    data = out;
                } else {
                    data = inflate_longer(data, expected);
                }
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
    if (data.size() < chunk_bytes)
        throw DecodeError("holds " + std::to_string(data.size()) + " bytes instead of " +
                          std::to_string(chunk_bytes));
    data = data.first(chunk_bytes);  // libhdf5 ignores what follows, too
    if (!into.empty() && data.data() != into.data()) {
        std::memcpy(into.data(), data.data(), chunk_bytes);
        return into;
    }
    return data;
}

// A stream that holds more than the chunk. The checksums and the shuffle of such a chunk are those of all of it.
std::span<std::byte> ChunkDecoder::inflate_longer(std::span<const std::byte> stored, std::size_t expected) {
    // No stream holds more than this; memory beyond the limit is not asked for, whatever the file says.
    const std::size_t possible = stored.size() * kMostDeflated, limit = expected + kMostLonger;
    for (std::size_t size = expected; size < possible && size < limit;) {
        size = std::min(2 * size + kChecksum, limit);
        const auto out = inflated_.take(size);
        if (const auto made = inflater_.inflate(stored, out)) return out.first(*made);
    }
    throw DecodeError("the compressed data are longer than the chunk");
}

std::size_t max_stored_size(std::size_t chunk_bytes, std::size_t filters) noexcept {
    // No deflate makes its input longer by more than an eighth; libhdf5 allows 0.1 %. It also reads chunks that hold more
    // than they should.
    return chunk_bytes + chunk_bytes / 8 + kMostLonger + kChecksum * filters;
}

}  // namespace spinlock_fast
