#include "chunk_decoder.hpp"

#include "byte_filters.hpp"
#include "errors.hpp"

#include <algorithm>
#include <cstring>
#include <string>

namespace spinlock_fast {
namespace {

constexpr std::size_t kChecksumBytes = 4;
constexpr std::size_t kMaxInflationRatio = 1032;                // of deflate
constexpr std::size_t kMaxExcessBytes = std::size_t{16} << 20;  // decoded bytes beyond the size of a chunk

std::span<std::byte> strip_checksum(std::span<std::byte> data, bool verify) {
    if (data.size() < kChecksumBytes) throw DecodeError("too short for its checksum");
    const auto body = data.first(data.size() - kChecksumBytes);
    if (!verify) return body;
    std::uint32_t stored = 0;
    for (std::size_t i = 0; i < kChecksumBytes; ++i)
        stored |= std::to_integer<std::uint32_t>(data[body.size() + i]) << (8 * i);
    const std::uint32_t computed = fletcher32(body);
    // libhdf5 before 1.6.3 wrote the bytes of each half swapped; readers accept both.
    const std::uint32_t swapped = ((computed & 0x00ff00ffU) << 8) | ((computed >> 8) & 0x00ff00ffU);
    if (stored != computed && stored != swapped) throw DecodeError("the checksum does not match");
    return body;
}

}  // namespace

std::span<std::byte> ChunkDecoder::decode(std::span<std::byte> stored, std::uint32_t mask,
                                          std::span<const Filter> filters, std::size_t chunk_bytes, bool verify,
                                          std::span<std::byte> destination) {
    const auto active = [&](std::size_t i) { return i >= 32 || ((mask >> i) & 1U) == 0; };
    std::span<std::byte> data = stored;
    // Output of inverting filter i: the caller's memory if no earlier filter remains to be inverted.
    const auto output = [&](std::size_t i, std::size_t size, Scratch& scratch) {
        for (std::size_t j = 0; j < i; ++j)
            if (active(j)) return scratch.reserve(size);
        return destination.empty() || size != chunk_bytes ? scratch.reserve(size) : destination;
    };
    for (std::size_t i = filters.size(); i-- > 0;) {
        if (!active(i)) continue;
        switch (filters[i].kind) {
            case FilterKind::fletcher32:
                data = strip_checksum(data, verify);
                break;
            case FilterKind::deflate: {
                std::size_t expected = chunk_bytes;
                // A checksum appended before compression is part of the decompressed data.
                for (std::size_t j = 0; j < i; ++j)
                    if (active(j) && filters[j].kind == FilterKind::fletcher32) expected += kChecksumBytes;
                const auto out = output(i, expected, inflated_);
                if (const auto produced = inflater_.inflate(data, out)) {
                    if (*produced < expected) throw DecodeError("the compressed data end early");
                    data = out;
                } else {
                    data = inflate_oversized(data, expected);
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
        throw DecodeError("holds " + std::to_string(data.size()) + " bytes instead of " + std::to_string(chunk_bytes));
    data = data.first(chunk_bytes);  // libhdf5 ignores further bytes, too
    if (!destination.empty() && data.data() != destination.data()) {
        std::memcpy(destination.data(), data.data(), chunk_bytes);
        return destination;
    }
    return data;
}

// Decodes a stream that is longer than the chunk: its checksum and shuffle cover all decoded bytes, so all are needed.
std::span<std::byte> ChunkDecoder::inflate_oversized(std::span<const std::byte> stored, std::size_t expected) {
    // A stream decodes to at most `possible` bytes; `limit` bounds the memory that a damaged file can request.
    const std::size_t possible = stored.size() * kMaxInflationRatio, limit = expected + kMaxExcessBytes;
    for (std::size_t size = expected; size < possible && size < limit;) {
        size = std::min(2 * size + kChecksumBytes, limit);
        const auto out = inflated_.reserve(size);
        if (const auto produced = inflater_.inflate(stored, out)) return out.first(*produced);
    }
    throw DecodeError("the compressed data are longer than the chunk");
}

std::size_t max_stored_size(std::size_t chunk_bytes, std::size_t filters) noexcept {
    // Deflate adds at most an eighth to incompressible data. libhdf5 also accepts chunks with excess bytes.
    return chunk_bytes + chunk_bytes / 8 + kMaxExcessBytes + kChecksumBytes * filters;
}

}  // namespace spinlock_fast
