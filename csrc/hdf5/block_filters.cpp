#include "block_filters.hpp"

#include "byte_filters.hpp"
#include "byte_order.hpp"
#include "errors.hpp"

#include <algorithm>
#include <cstring>

namespace spinlock_fast {
namespace {

constexpr std::size_t kHeader = 12;  // decoded size (8 bytes), block size (4 bytes)

// Takes the next block of `in`: its compressed size (4 bytes) and its bytes.
std::span<const std::byte> take_block(std::span<const std::byte>& in) {
    if (in.size() < 4) throw DecodeError("the compressed data end early");
    const std::size_t size = read_u32_big(in, 0);
    if (size > in.size() - 4) throw DecodeError("the compressed data end early");
    const auto block = in.subspan(4, size);
    in = in.subspan(4 + size);
    return block;
}

// Items per block if none are given: 8 KiB, at least 128 items.
std::size_t default_block_items(std::size_t item_size) { return std::max<std::size_t>(8192 / item_size / 8 * 8, 128); }

// Calls `decode_block(block of out)` for each block of a multiple of 8 items and returns the items that remain, less than 8.
template <typename DecodeBlock>
std::span<std::byte> for_each_block(std::size_t item_size, std::size_t block_items, std::span<std::byte> out,
                                    DecodeBlock decode_block) {
    std::size_t items = out.size() / item_size;
    if (items * item_size != out.size()) throw DecodeError("the size is not a multiple of the item size");
    while (items >= 8) {
        const std::size_t count = std::min(block_items, items / 8 * 8);
        decode_block(out.first(count * item_size));
        out = out.subspan(count * item_size);
        items -= count;
    }
    return out;
}

}  // namespace

std::size_t block_filter_size(std::span<const std::byte> in) {
    if (in.size() < kHeader) throw DecodeError("the compressed data end early");
    return read_u64_big(in, 0);
}

void decode_lz4_filter(std::span<const std::byte> in, std::span<std::byte> out) {
    if (block_filter_size(in) != out.size()) throw DecodeError("the compressed data declare another size");
    const std::size_t block_size = read_u32_big(in, 8);
    if (block_size == 0 && !out.empty()) throw DecodeError("the block size is 0");
    in = in.subspan(kHeader);
    while (!out.empty()) {
        const auto decoded = out.first(std::min(block_size, out.size()));
        const auto block = take_block(in);
        if (block.size() == decoded.size())  // incompressible
            std::memcpy(decoded.data(), block.data(), block.size());
        else
            decode_lz4_block(block, decoded);
        out = out.subspan(decoded.size());
    }
}

void decode_bitshuffle(const Filter& filter, std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs) {
    if (block_filter_size(in) != out.size()) throw DecodeError("the compressed data declare another size");
    std::size_t block_items = read_u32_big(in, 8) / filter.item_size;
    if (block_items == 0) block_items = default_block_items(filter.item_size);
    if (block_items % 8 != 0) throw DecodeError("the block size is not a multiple of 8 items");
    in = in.subspan(kHeader);
    const auto rest = for_each_block(filter.item_size, block_items, out, [&](std::span<std::byte> decoded) {
        const auto block = take_block(in);
        const auto shuffled = codecs.block.reserve(decoded.size());
        if (filter.codec == FilterKind::lz4)
            decode_lz4_block(block, shuffled);
        else if (codecs.zstd.decode(block, shuffled) != shuffled.size())
            throw DecodeError("the compressed data are invalid");
        bit_unshuffle(shuffled, filter.item_size, decoded, codecs.planes.reserve(decoded.size()));
    });
    if (in.size() < rest.size()) throw DecodeError("the compressed data end early");
    if (!rest.empty()) std::memcpy(rest.data(), in.data(), rest.size());
}

void unshuffle_bit_blocks(const Filter& filter, std::span<const std::byte> in, std::span<std::byte> out,
                          Codecs& codecs) {
    const std::size_t block_items = filter.block_items ? filter.block_items : default_block_items(filter.item_size);
    const auto rest = for_each_block(filter.item_size, block_items, out, [&](std::span<std::byte> decoded) {
        bit_unshuffle(in.first(decoded.size()), filter.item_size, decoded, codecs.planes.reserve(decoded.size()));
        in = in.subspan(decoded.size());
    });
    if (!rest.empty()) std::memcpy(rest.data(), in.data(), rest.size());
}

void unshuffle_bits(std::span<const std::byte> in, std::size_t item_size, std::span<std::byte> out, Codecs& codecs) {
    const std::size_t whole = in.size() / item_size / 8 * 8 * item_size;
    if (whole > 0) bit_unshuffle(in.first(whole), item_size, out.first(whole), codecs.planes.reserve(whole));
    if (in.size() > whole) std::memcpy(out.data() + whole, in.data() + whole, in.size() - whole);
}

}  // namespace spinlock_fast
