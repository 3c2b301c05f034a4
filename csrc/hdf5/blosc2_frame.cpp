// Frames of Blosc 2: a header, a chunk, an index of chunk offsets, and metadata. HDF5 stores one chunk per frame.
#include "blosc.hpp"

#include "byte_order.hpp"
#include "errors.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <string_view>

namespace spinlock_fast {
namespace {

constexpr std::size_t kMinHeader = 0x57, kMaxDimensions = 15;
constexpr std::size_t kMaxSize = std::size_t{1} << 40;

[[noreturn]] void damaged(const char* what = "the frame of blosc2 is invalid") { throw DecodeError(what); }

std::uint64_t big_endian(std::span<const std::byte> in, std::size_t offset, std::size_t size) {
    if (offset > in.size() || size > in.size() - offset) damaged("the compressed data end early");
    std::uint64_t value = 0;
    for (const std::byte byte : in.subspan(offset, size)) value = value << 8 | std::to_integer<std::uint64_t>(byte);
    return value;
}

std::string_view text(std::span<const std::byte> in, std::size_t offset, std::size_t size) {
    if (offset > in.size() || size > in.size() - offset) damaged("the compressed data end early");
    return {reinterpret_cast<const char*>(in.data()) + offset, size};
}

// Shapes of a multidimensional array whose only chunk is split into blocks; the blocks at its ends are padded.
struct Grid {
    std::size_t dimensions = 0;
    std::array<std::size_t, kMaxDimensions> shape{}, block{}, blocks{};
};

struct Frame {
    std::span<const std::byte> header, chunk, index;
    std::size_t size = 0, item_size = 0;
    Grid grid;  // of 0 dimensions: the frame is not multidimensional

    // Bytes of the array without padding.
    std::size_t array_size() const;
};

std::size_t product(std::size_t start, std::span<const std::size_t> factors) {
    for (const std::size_t factor : factors) {
        if (factor == 0 || start > kMaxSize / factor) damaged();
        start *= factor;
    }
    return start;
}

std::size_t Frame::array_size() const {
    return grid.dimensions == 0 ? size : product(item_size, std::span(grid.shape).first(grid.dimensions));
}

// The metadata "b2nd": version, number of dimensions, shape (int64), chunk shape and block shape (int32).
Grid read_grid(std::span<const std::byte> meta) {
    Grid grid;
    grid.dimensions = big_endian(meta, 2, 1);
    if (grid.dimensions == 0) damaged();
    if (grid.dimensions > kMaxDimensions) throw UnsupportedError("a blosc2 array of more than 15 dimensions");
    std::size_t offset = 3;
    const auto read = [&](auto& shape, std::size_t bytes) {
        ++offset;  // type: an array of `dimensions` items
        for (std::size_t d = 0; d < grid.dimensions; ++d, offset += 1 + bytes) {
            shape[d] = big_endian(meta, offset + 1, bytes);
            if (shape[d] == 0 || shape[d] > kMaxSize) damaged();
        }
    };
    std::array<std::size_t, kMaxDimensions> chunk{};
    read(grid.shape, 8);
    read(chunk, 4);
    read(grid.block, 4);
    for (std::size_t d = 0; d < grid.dimensions; ++d) {
        if (chunk[d] != grid.shape[d]) throw UnsupportedError("a blosc2 array that is not one chunk");
        if (grid.block[d] > chunk[d]) damaged();  // bounds the memory of a block
        grid.blocks[d] = (chunk[d] + grid.block[d] - 1) / grid.block[d];
    }
    return grid;
}

// The named metadata in the header: a map from name to the offset of a block of bytes.
std::span<const std::byte> find_metadata(std::span<const std::byte> header, std::string_view name) {
    if (header.size() < kMinHeader + 7) return {};
    const std::size_t entries = big_endian(header, kMinHeader + 5, 2);
    std::size_t at = kMinHeader + 7;
    for (std::size_t i = 0; i < entries; ++i) {
        const std::size_t length = big_endian(header, at, 1) & 31;
        const std::string_view found = text(header, at + 1, length);
        const std::size_t offset = big_endian(header, at + 1 + length + 1, 4);
        at += 1 + length + 5;
        if (found != name) continue;
        const std::size_t size = big_endian(header, offset + 1, 4);
        if (offset + 5 > header.size() || size > header.size() - offset - 5) damaged();
        return header.subspan(offset + 5, size);
    }
    return {};
}

Frame read_frame(std::span<const std::byte> in) {
    if (in.size() < kMinHeader) damaged("the compressed data end early");
    if (text(in, 2, 8) != std::string_view("b2frame\0", 8)) damaged();
    const std::size_t header_size = big_endian(in, 0x0b, 4), frame_size = big_endian(in, 0x10, 8);
    const std::size_t version = big_endian(in, 0x19, 1) & 15;
    if (version > 3) throw UnsupportedError("version " + std::to_string(version) + " of blosc2's frames");
    if ((big_endian(in, 0x1a, 1) & 15) != 0) throw UnsupportedError("a sparse frame of blosc2");
    if (frame_size > in.size() || header_size > frame_size || header_size < kMinHeader) damaged();
    const std::size_t stored = big_endian(in, 0x27, 8), chunk_size = big_endian(in, 0x3a, 4);
    if (stored > frame_size - header_size) damaged();
    Frame frame;
    frame.header = in.first(header_size);
    frame.size = big_endian(in, 0x1e, 8);
    frame.item_size = big_endian(in, 0x30, 4);
    frame.chunk = in.subspan(header_size, stored);
    frame.index = in.subspan(header_size + stored, frame_size - header_size - stored);
    if (frame.size == 0 || frame.size > kMaxSize || frame.item_size == 0) damaged();
    if (chunk_size < frame.size) throw UnsupportedError("a frame of blosc2 with several chunks");
    if (const auto meta = find_metadata(frame.header, "b2nd"); !meta.empty()) frame.grid = read_grid(meta);
    if (!find_metadata(frame.header, "caterva").empty()) throw UnsupportedError("an array of caterva");
    return frame;
}

// The entry of the chunk in the index: its offset or, if negative, a code of its value.
std::int64_t chunk_offset(const Frame& frame, Codecs& codecs) {
    std::array<std::byte, 8> bytes;
    const BloscChunk index(frame.index, true);
    if (index.size() != bytes.size()) throw UnsupportedError("a frame of blosc2 with several chunks");
    index.decode(bytes, codecs);
    return std::bit_cast<std::int64_t>(bytes);
}

// Whether each block is a contiguous part of the array: only one dimension is split, and those before it have size 1.
bool contiguous_blocks(const Grid& grid) {
    std::size_t d = 0;
    while (d < grid.dimensions && grid.block[d] == 1) ++d;
    for (++d; d < grid.dimensions; ++d)
        if (grid.block[d] != grid.shape[d]) return false;
    return true;
}

// Copies the part of a block that is inside the array; position: of the first item of the block.
void copy_block(const Grid& grid, std::size_t item_size, std::span<const std::size_t> position, const std::byte* block,
                std::byte* out) {
    const std::size_t last = grid.dimensions - 1;
    std::array<std::size_t, kMaxDimensions> extent{}, at{};
    for (std::size_t d = 0; d <= last; ++d) extent[d] = std::min(grid.block[d], grid.shape[d] - position[d]);
    for (;;) {
        std::size_t from = 0, to = 0;
        for (std::size_t d = 0; d <= last; ++d) {
            from = from * grid.block[d] + (d < last ? at[d] : 0);
            to = to * grid.shape[d] + position[d] + (d < last ? at[d] : 0);
        }
        std::memcpy(out + to * item_size, block + from * item_size, extent[last] * item_size);
        std::size_t d = last;
        while (d > 0 && ++at[d - 1] == extent[d - 1]) at[--d] = 0;
        if (d == 0) return;
    }
}

void decode_grid(const Frame& frame, const BloscChunk& chunk, std::span<std::byte> out, Codecs& codecs) {
    const Grid& grid = frame.grid;
    const std::size_t dimensions = grid.dimensions, item = frame.item_size;
    const std::size_t block_bytes = product(item, std::span(grid.block).first(dimensions));
    if (chunk.fill(out)) return;
    if (chunk.block_size() != block_bytes ||
        chunk.size() != product(block_bytes, std::span(grid.blocks).first(dimensions)))
        damaged();
    const bool contiguous = contiguous_blocks(grid);
    for (std::size_t index = 0; index < chunk.blocks(); ++index) {
        std::array<std::size_t, kMaxDimensions> position{};
        std::size_t rest = index, start = 0;
        for (std::size_t d = dimensions; d-- > 0; rest /= grid.blocks[d])
            position[d] = rest % grid.blocks[d] * grid.block[d];
        bool padded = false;
        for (std::size_t d = 0; d < dimensions; ++d) {
            padded |= position[d] + grid.block[d] > grid.shape[d];
            start = start * grid.shape[d] + position[d];
        }
        if (contiguous && !padded) {
            chunk.decode_block(index, out.subspan(start * item, block_bytes), codecs);
        } else {
            const auto tile = codecs.tile.reserve(block_bytes);
            chunk.decode_block(index, tile, codecs);
            copy_block(grid, item, position, tile.data(), out.data());
        }
    }
}

// Fills `out` according to a negative entry of the index.
void fill_special(std::int64_t entry, std::size_t item_size, std::span<std::byte> out) {
    constexpr unsigned kZeros = 1, kNaN = 2, kUninitialised = 4;
    const unsigned special = static_cast<unsigned>(static_cast<std::uint64_t>(entry) >> 56) & 7;
    if (special == kZeros || special == kUninitialised) {
        std::ranges::fill(out, std::byte{0});
    } else if (special == kNaN && (item_size == 4 || item_size == 8)) {
        const std::uint64_t nan = item_size == 8 ? 0x7ff8000000000000U : 0x7fc000007fc00000U;
        for (std::size_t i = 0; i < out.size(); i += 8)
            std::memcpy(out.data() + i, &nan, std::min<std::size_t>(8, out.size() - i));
    } else {
        damaged();
    }
}

}  // namespace

std::size_t blosc2_size(std::span<const std::byte> in) { return read_frame(in).array_size(); }

void decode_blosc2(std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs) {
    const Frame frame = read_frame(in);
    if (frame.array_size() != out.size()) damaged("the compressed data declare another size");
    const std::int64_t entry = chunk_offset(frame, codecs);
    if (entry < 0) return fill_special(entry, frame.item_size, out);
    if (static_cast<std::uint64_t>(entry) >= frame.chunk.size()) damaged();
    const BloscChunk chunk(frame.chunk.subspan(static_cast<std::size_t>(entry)), true);
    if (frame.grid.dimensions > 0) return decode_grid(frame, chunk, out, codecs);
    if (chunk.size() != out.size()) damaged("the compressed data declare another size");
    chunk.decode(out, codecs);
}

}  // namespace spinlock_fast
