#include "filters.hpp"

#include "block_filters.hpp"
#include "blosc.hpp"
#include "byte_filters.hpp"
#include "errors.hpp"

#include <algorithm>
#include <array>
#include <string_view>

namespace spinlock_fast {
namespace {

struct Entry {
    std::uint32_t number;  // in the registry of HDF5
    std::string_view name;
    FilterKind kind;
    bool inflate = false, lz4 = false, zstd = false;  // libraries that the decoder needs
};

constexpr std::array kTable{
    Entry{1, "deflate", FilterKind::deflate, true, false, false},
    Entry{2, "shuffle", FilterKind::shuffle},
    Entry{3, "fletcher32", FilterKind::fletcher32},
    Entry{32000, "lzf", FilterKind::lzf},
    Entry{32001, "blosc", FilterKind::blosc, true, true, true},
    Entry{32004, "lz4", FilterKind::lz4, false, true, false},
    Entry{32008, "bitshuffle", FilterKind::bitshuffle, false, true, true},
    Entry{32015, "zstd", FilterKind::zstd, false, false, true},
    Entry{32026, "blosc2", FilterKind::blosc2, true, true, true},
};

constexpr std::size_t kMaxItemSize = std::size_t{1} << 20;  // above the size of any number type

// Client data of bitshuffle: version (2 values), item size, items per block, codec.
void read_bitshuffle_values(Filter& filter, std::span<const std::uint32_t> values) {
    constexpr std::uint32_t kLz4 = 2, kZstd = 3;
    if (values.size() > 3) filter.block_items = values[3];
    if (filter.block_items % 8 != 0) throw UnsupportedError("an unusual block size of bitshuffle");
    const std::uint32_t codec = values.size() > 4 ? values[4] : 0;
    if (codec == kLz4) filter.codec = FilterKind::lz4;
    if (codec == kZstd) filter.codec = FilterKind::zstd;
}

}  // namespace

bool Filter::compresses() const noexcept {
    if (kind == FilterKind::bitshuffle) return codec != FilterKind::bitshuffle;
    return kind != FilterKind::shuffle && kind != FilterKind::fletcher32;
}

std::vector<std::uint32_t> filter_numbers() {
    std::vector<std::uint32_t> numbers;
    for (const Entry& entry : kTable) numbers.push_back(entry.number);
    return numbers;
}

Filter make_filter(std::uint32_t number, std::span<const std::uint32_t> values) {
    const auto entry = std::ranges::find(kTable, number, &Entry::number);
    if (entry == kTable.end()) throw UnsupportedError("the filter " + std::to_string(number));
    const std::string name = "the filter " + std::string(entry->name);
    if (entry->inflate && inflate_library() == "none")
        throw UnsupportedError(name + ": this build has neither libdeflate nor zlib");
    if ((entry->lz4 && lz4_version().empty()) || (entry->zstd && zstd_version().empty()))
        throw UnsupportedError(name + ": this build lacks LZ4 or Zstandard");
    Filter filter{.kind = entry->kind};
    const std::size_t position = filter.kind == FilterKind::bitshuffle ? 2 : 0;
    if (filter.kind == FilterKind::shuffle || filter.kind == FilterKind::bitshuffle) {
        filter.item_size = values.size() > position ? values[position] : 0;
        if (filter.item_size == 0 || filter.item_size > kMaxItemSize) throw UnsupportedError(name + " without an item size");
    }
    if (filter.kind == FilterKind::bitshuffle) read_bitshuffle_values(filter, values);
    return filter;
}

std::optional<std::size_t> declared_size(const Filter& filter, std::span<const std::byte> in) {
    switch (filter.kind) {
        case FilterKind::lz4:
        case FilterKind::bitshuffle:
            return block_filter_size(in);
        case FilterKind::zstd:
            return ZstdDecoder::declared_size(in);
        case FilterKind::blosc:
            return blosc_size(in);
        case FilterKind::blosc2:
            return blosc2_size(in);
        default:
            return std::nullopt;
    }
}

std::optional<std::size_t> decompress(const Filter& filter, std::span<const std::byte> in, std::span<std::byte> out,
                                      Codecs& codecs) {
    switch (filter.kind) {
        case FilterKind::deflate:
            return codecs.inflater.inflate(in, out);
        case FilterKind::lzf:
            return decode_lzf(in, out);
        case FilterKind::zstd:
            return codecs.zstd.decode(in, out);
        case FilterKind::lz4:
            decode_lz4_filter(in, out);
            return out.size();
        case FilterKind::bitshuffle:
            decode_bitshuffle(filter, in, out, codecs);
            return out.size();
        case FilterKind::blosc:
            decode_blosc(in, out, codecs);
            return out.size();
        case FilterKind::blosc2:
            decode_blosc2(in, out, codecs);
            return out.size();
        case FilterKind::shuffle:
        case FilterKind::fletcher32:
            break;
    }
    throw DecodeError("not a compression filter");
}

void unfilter(const Filter& filter, std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs) {
    if (filter.kind == FilterKind::shuffle)
        unshuffle(in, filter.item_size, out);
    else
        unshuffle_bit_blocks(filter, in, out, codecs);
}

}  // namespace spinlock_fast
