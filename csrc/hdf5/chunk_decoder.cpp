#include "chunk_decoder.hpp"

#include "byte_filters.hpp"
#include "errors.hpp"

#include <algorithm>
#include <cstring>
#include <string>

namespace spinlock_fast {
namespace {

constexpr std::size_t kChecksumBytes = 4;
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
    for (std::size_t i = filters.size(); i-- > 0;) {
        if (!active(i)) continue;
        const Filter& filter = filters[i];
        if (filter.kind == FilterKind::fletcher32) {
            data = strip_checksum(data, verify);
            continue;
        }
        // The size before this filter: a checksum that was appended earlier is part of the decoded data, and the size is
        // unknown if the data were compressed before.
        std::size_t expected = chunk_bytes;
        bool compressed_before = false, last = true;
        for (std::size_t j = 0; j < i; ++j) {
            if (!active(j)) continue;
            last = false;
            compressed_before |= filters[j].compresses();
            if (filters[j].kind == FilterKind::fletcher32) expected += kChecksumBytes;
        }
        const auto target = last ? destination : std::span<std::byte>{};
        if (filter.compresses()) {
            data = decompress_to(filter, data, expected, target);
            if (data.size() < expected && !compressed_before) throw DecodeError("the compressed data end early");
        } else {
            const auto out = target.size() == data.size() && !target.empty() ? target : next_buffer(data, data.size());
            unfilter(filter, data, out, codecs_);
            data = out;
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

// Memory of a buffer that does not hold `data`.
std::span<std::byte> ChunkDecoder::next_buffer(std::span<const std::byte> data, std::size_t size) {
    const auto first = buffers_[0].reserve(0);
    return buffers_[!data.empty() && data.data() == first.data() ? 1 : 0].reserve(size);
}

// Decompresses to `destination` if the result has its size, else to a buffer. All decoded bytes are returned, also those
// beyond the chunk: the checksum and shuffle of a chunk with excess bytes cover them.
std::span<std::byte> ChunkDecoder::decompress_to(const Filter& filter, std::span<const std::byte> data,
                                                 std::size_t expected, std::span<std::byte> destination) {
    const std::size_t limit = expected + kMaxExcessBytes;  // bounds the memory that a damaged file can request
    const auto declared = declared_size(filter, data);
    for (std::size_t size = declared.value_or(expected); size <= limit;) {
        const auto out = size == destination.size() ? destination : next_buffer(data, size);
        if (const auto produced = decompress(filter, data, out, codecs_)) return out.first(*produced);
        if (size == limit) break;
        size = std::min(2 * size + kChecksumBytes, limit);
    }
    throw DecodeError("the compressed data are longer than the chunk");
}

std::size_t max_stored_size(std::size_t chunk_bytes, std::span<const Filter> filters) noexcept {
    // Codecs add at most an eighth to incompressible data; blosc2 pads multidimensional blocks. libhdf5 also accepts chunks
    // with excess bytes.
    const bool padded = std::ranges::find(filters, FilterKind::blosc2, &Filter::kind) != filters.end();
    return (padded ? 4 * chunk_bytes : chunk_bytes + chunk_bytes / 8) + kMaxExcessBytes + kChecksumBytes * filters.size();
}

}  // namespace spinlock_fast
