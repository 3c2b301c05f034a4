#include "blosc.hpp"

#include "block_filters.hpp"
#include "byte_filters.hpp"
#include "byte_order.hpp"
#include "errors.hpp"

#include <algorithm>
#include <cstring>

namespace spinlock_fast {
namespace {

constexpr std::size_t kHeader = 16, kExtendedHeader = 32;
constexpr std::size_t kMaxSize = std::size_t{1} << 31;  // sizes are positive 32-bit integers
enum : unsigned { kBlosclz = 0, kLz4 = 1, kZlib = 3, kZstd = 4 };                             // codecs
enum : unsigned { kZeros = 1, kNaN = 2, kValue = 3, kUninitialised = 4 };                     // special chunks
enum : unsigned { kNoFilter = 0, kShuffle = 1, kBitshuffle = 2, kTruncatedPrecision = 4 };  // filters

unsigned byte_at(std::span<const std::byte> in, std::size_t offset) { return std::to_integer<unsigned>(in[offset]); }

[[noreturn]] void damaged(const char* what = "the compressed data are invalid") { throw DecodeError(what); }

void repeat(std::span<const std::byte> value, std::span<std::byte> out) {
    for (std::size_t i = 0; i < out.size(); i += value.size())
        std::memcpy(out.data() + i, value.data(), std::min(value.size(), out.size() - i));
}

}  // namespace

// Header: version, version of the codec, flags and item size (1 byte each), decoded size, block size and stored size.
BloscChunk::BloscChunk(std::span<const std::byte> in, bool extended) {
    if (in.size() < kHeader) damaged("the compressed data end early");
    version_ = byte_at(in, 0);
    const unsigned flags = byte_at(in, 2);
    item_size_ = byte_at(in, 3);
    size_ = read_u32(in, 4);
    block_size_ = read_u32(in, 8);
    const std::size_t stored = read_u32(in, 12);
    extended_ = (flags & 5) == 5;
    if (extended_ ? !extended || version_ < 3 : version_ != 2) damaged("an unknown version of blosc");
    if (version_ > 5) throw UnsupportedError("version " + std::to_string(version_) + " of blosc2's chunks");
    header_ = extended_ ? kExtendedHeader : kHeader;
    if (stored < header_ || stored > in.size()) damaged("the compressed data end early");
    if (size_ == 0 || size_ >= kMaxSize || block_size_ == 0 || item_size_ == 0) damaged();
    block_size_ = std::min(block_size_, size_);
    bytes_ = in.first(stored);
    copied_ = (flags & 2) != 0;
    split_ = (flags & 16) == 0;
    codec_ = flags >> 5;
    if (extended_) {
        read_extension();
    } else {
        if (flags & 8) damaged("an unknown version of blosc");
        if (flags & 1) transform_ = Transform::shuffle;
        if (flags & 4) transform_ = Transform::bitshuffle;
        shuffled_size_ = item_size_;
        // Before there was a flag, small blocks and large items were not split.
        split_ = split_ && item_size_ <= 16 && block_size_ / item_size_ >= 128;
    }
    if (copied_ && special_ == 0) {
        if (bytes_.size() != header_ + size_) damaged();
    } else if (special_ == 0) {
        if (codec_ == 2 || codec_ > kZstd) throw UnsupportedError("a codec of blosc other than its usual ones");
        if (blocks() > (bytes_.size() - header_) / 4) damaged("the compressed data end early");
    }
}

// Bytes 16 to 31: filters (6), codec, its settings, settings of the filters (6), flags.
void BloscChunk::read_extension() {
    const unsigned more_flags = byte_at(bytes_, 30), flags = byte_at(bytes_, 31);
    special_ = (flags >> 4) & 7;
    if (special_ > kUninitialised) damaged();
    if (special_ == kValue && bytes_.size() == header_) damaged("the compressed data end early");
    if (more_flags != 0 && special_ == 0) throw UnsupportedError("blosc2's blocks of variable length");
    if ((flags & 1) && special_ == 0) throw UnsupportedError("blosc2's dictionaries");
    if (flags & 0x8a) throw UnsupportedError("an unusual feature of blosc2");
    const std::size_t filters = version_ == 3 ? 5 : 6;
    for (std::size_t i = 0; i < filters; ++i) {
        const unsigned filter = byte_at(bytes_, 16 + i), setting = byte_at(bytes_, 24 + i);
        if (filter == kNoFilter || filter == kTruncatedPrecision) continue;
        if (filter != kShuffle && filter != kBitshuffle)
            throw UnsupportedError("filter " + std::to_string(filter) + " of blosc2");
        if (transform_ != Transform::none) throw UnsupportedError("several filters of blosc2");
        transform_ = filter == kShuffle ? Transform::shuffle : Transform::bitshuffle;
        shuffled_size_ = filter == kShuffle && setting != 0 ? setting : item_size_;
    }
}

bool BloscChunk::fill(std::span<std::byte> out) const {
    constexpr std::uint32_t nan32 = 0x7fc00000;
    constexpr std::uint64_t nan64 = 0x7ff8000000000000;
    if (special_ == 0) return false;
    if (special_ == kValue)
        repeat(bytes_.subspan(header_), out);
    else if (special_ == kNaN && item_size_ == sizeof nan32)
        repeat(std::as_bytes(std::span(&nan32, 1)), out);
    else if (special_ == kNaN && item_size_ == sizeof nan64)
        repeat(std::as_bytes(std::span(&nan64, 1)), out);
    else if (special_ == kNaN)
        damaged();
    else
        std::ranges::fill(out, std::byte{0});
    return true;
}

void BloscChunk::decode_block(std::size_t index, std::span<std::byte> out, Codecs& codecs) const {
    if (copied_) {
        std::memcpy(out.data(), bytes_.data() + header_ + index * block_size_, out.size());
        return;
    }
    // Blosc 1 leaves a block as it is if its number of items is not a multiple of 8.
    const bool unshuffled = version_ == 2 && transform_ == Transform::bitshuffle && out.size() / item_size_ % 8 != 0;
    if (transform_ == Transform::none || unshuffled) return read_streams(index, out, codecs);
    const auto data = codecs.block.reserve(out.size());
    read_streams(index, data, codecs);
    if (transform_ == Transform::shuffle)
        unshuffle(data, shuffled_size_, out);
    else
        unshuffle_bits(data, shuffled_size_, out, codecs);
}

void BloscChunk::decode(std::span<std::byte> out, Codecs& codecs) const {
    if (fill(out)) return;
    for (std::size_t i = 0; i < blocks(); ++i) {
        const std::size_t start = i * block_size_;
        decode_block(i, out.subspan(start, std::min(block_size_, size_ - start)), codecs);
    }
}

// A block is one stream or, if split, one for each byte of an item. A stream is its stored size and its bytes.
void BloscChunk::read_streams(std::size_t index, std::span<std::byte> out, Codecs& codecs) const {
    const std::size_t start = read_u32(bytes_, header_ + 4 * index);
    if (start < header_ || start >= bytes_.size()) damaged();
    const std::size_t streams = split_ && out.size() == block_size_ ? item_size_ : 1;
    const std::size_t size = out.size() / streams;
    if (size * streams != out.size()) damaged();
    auto in = bytes_.subspan(start);
    for (std::size_t i = 0; i < streams; ++i) {
        if (in.size() < 4) damaged("the compressed data end early");
        const auto stored = static_cast<std::int32_t>(read_u32(in, 0));
        const auto decoded = out.subspan(i * size, size);
        in = in.subspan(4);
        if (extended_ && stored <= 0) {  // a repeated byte: 0, or announced by bit 0 of the next byte
            if (stored < -255) damaged();
            if (stored < 0) {
                if (in.empty() || (byte_at(in, 0) & 1) == 0) damaged();
                in = in.subspan(1);
            }
            std::ranges::fill(decoded, static_cast<std::byte>(-stored));
            continue;
        }
        if (stored <= 0 || static_cast<std::size_t>(stored) > in.size()) damaged("the compressed data end early");
        const auto stream = in.first(static_cast<std::size_t>(stored));
        if (stream.size() == size)  // incompressible
            std::memcpy(decoded.data(), stream.data(), size);
        else
            decode_stream(stream, decoded, codecs);
        in = in.subspan(stream.size());
    }
}

void BloscChunk::decode_stream(std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs) const {
    std::optional<std::size_t> produced = out.size();
    if (codec_ == kBlosclz) produced = decode_blosclz(in, out);
    if (codec_ == kLz4) decode_lz4_block(in, out);
    if (codec_ == kZlib) produced = codecs.inflater.inflate(in, out);
    if (codec_ == kZstd) produced = codecs.zstd.decode(in, out);
    if (produced != out.size()) damaged();
}

std::size_t blosc_size(std::span<const std::byte> in) { return BloscChunk(in, false).size(); }

void decode_blosc(std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs) {
    const BloscChunk chunk(in, false);
    if (chunk.size() != out.size()) damaged("the compressed data declare another size");
    chunk.decode(out, codecs);
}

}  // namespace spinlock_fast
