// The filters blosc and blosc2 of HDF5, after the published formats of Blosc: README_CHUNK_FORMAT.rst,
// README_CFRAME_FORMAT.rst and README_B2ND_METALAYER.rst of C-Blosc2.
#pragma once

#include "filters.hpp"

namespace spinlock_fast {

// A chunk of Blosc: blocks that were filtered and compressed independently.
class BloscChunk {
public:
    // `extended`: whether the header of Blosc 2 is accepted. Throws DecodeError and UnsupportedError.
    BloscChunk(std::span<const std::byte> in, bool extended);

    std::size_t size() const noexcept { return size_; }
    std::size_t block_size() const noexcept { return block_size_; }
    std::size_t blocks() const noexcept { return (size_ + block_size_ - 1) / block_size_; }

    // Fills `out` and returns true if the chunk consists of one repeated value.
    bool fill(std::span<std::byte> out) const;

    // Decodes block `index` to `out`, which has the size of that block. Throws DecodeError.
    void decode_block(std::size_t index, std::span<std::byte> out, Codecs& codecs) const;

    // Decodes all blocks to `out`, which has the size of the chunk. Throws DecodeError.
    void decode(std::span<std::byte> out, Codecs& codecs) const;

private:
    enum class Transform : std::uint8_t { none, shuffle, bitshuffle };

    void read_extension();
    void read_streams(std::size_t index, std::span<std::byte> out, Codecs& codecs) const;
    void decode_stream(std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs) const;

    std::span<const std::byte> bytes_;
    std::size_t header_ = 16, size_ = 0, block_size_ = 0, item_size_ = 1;
    unsigned version_ = 0, codec_ = 0, special_ = 0;
    bool extended_ = false, copied_ = false, split_ = false;
    Transform transform_ = Transform::none;
    std::size_t shuffled_size_ = 1;  // item size of `transform_`
};

// Decoded sizes according to the headers. Throw DecodeError and UnsupportedError.
std::size_t blosc_size(std::span<const std::byte> in);
std::size_t blosc2_size(std::span<const std::byte> in);

// Decode to exactly `out.size()` bytes, the declared size. Throw DecodeError and UnsupportedError.
void decode_blosc(std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs);
void decode_blosc2(std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs);

}  // namespace spinlock_fast
