// The HDF5 filters that this build decodes: one table from filter number to decoder.
#pragma once

#include "codecs.hpp"
#include "inflate.hpp"
#include "scratch.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace spinlock_fast {

enum class FilterKind : std::uint8_t { deflate, shuffle, fletcher32, lzf, blosc, lz4, bitshuffle, zstd, blosc2 };

// A filter of a dataset.
struct Filter {
    FilterKind kind;
    std::size_t item_size = 1;   // of shuffle and bitshuffle
    std::size_t block_items = 0;  // of bitshuffle without a codec; 0: its default
    FilterKind codec = FilterKind::bitshuffle;  // of bitshuffle: lz4, zstd, or bitshuffle for none

    bool operator==(const Filter&) const = default;

    // Whether the decoded data have another size than the stored data.
    bool compresses() const noexcept;
};

// Numbers of the filters that have a decoder, in the registry of HDF5.
std::vector<std::uint32_t> filter_numbers();

// The filter with a number of the HDF5 registry and its client data. Throws UnsupportedError with the reason, which
// completes "the native reader does not support".
Filter make_filter(std::uint32_t number, std::span<const std::uint32_t> values);

// Libraries and memory of the decoders. Not thread-safe: reused between chunks.
struct Codecs {
    Inflater inflater;
    ZstdDecoder zstd;
    Scratch block;   // a block before its filter is inverted
    Scratch planes;  // of `bit_unshuffle`
    Scratch tile;    // a decoded block of a multidimensional blosc2 array
};

// The number of bytes to which a compressed chunk decodes, where its format declares it. Throws DecodeError.
std::optional<std::size_t> declared_size(const Filter& filter, std::span<const std::byte> in);

// Decodes a compressed chunk and returns the number of decoded bytes, or nullopt if `out` is too small. If the size is
// declared, `out` must have it. Throws DecodeError and UnsupportedError.
std::optional<std::size_t> decompress(const Filter& filter, std::span<const std::byte> in, std::span<std::byte> out,
                                      Codecs& codecs);

// Inverts a filter that keeps the size: shuffle, or bitshuffle without a codec. `out` has the size of `in`.
void unfilter(const Filter& filter, std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs);

}  // namespace spinlock_fast
