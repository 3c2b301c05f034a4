// Byte filters, filter pipelines, and copying rows out of chunks.
#include "byte_filters.hpp"
#include "check.hpp"
#include "chunk_decoder.hpp"
#include "errors.hpp"
#include "row_copy.hpp"

#include <algorithm>
#include <array>
#include <cstring>

using namespace spinlock_fast;
using namespace spinlock_fast::testing;

namespace {

const bool can_inflate = inflate_library() != "none";

Bytes with_checksum(Bytes data) {
    append(data, fletcher32(data), 4, false);
    return data;
}

void unshuffle_inverts_shuffle_in_all_implementations() {
    std::vector<Simd> forms{Simd::portable};
    if (best_simd() != Simd::portable) forms.push_back(Simd::sse2);
    if (best_simd() == Simd::avx2) forms.push_back(Simd::avx2);
    for (const std::size_t item : {1, 2, 3, 4, 5, 7, 8, 12, 16})
        for (const std::size_t size : {0, 1, 15, 16, 31, 33, 64, 127, 128, 129, 255, 256, 257, 1023, 4096, 4101}) {
            const Bytes data = random_bytes(size, static_cast<unsigned>(size));
            const Bytes stored = shuffled(data, item);
            for (const Simd form : forms) {
                Bytes out(size);
                unshuffle(stored, item, out, form);
                CHECK(out == data);
            }
        }
}

void swap_bytes_twice_is_identity() {
    for (const std::size_t item : {1, 2, 4, 8, 16}) {
        const Bytes data = random_bytes(67, 1);
        Bytes swapped = data;
        swap_bytes(swapped, item);
        if (item == 2 || item == 4 || item == 8) {
            CHECK(std::equal(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(item),
                             std::make_reverse_iterator(swapped.begin() + static_cast<std::ptrdiff_t>(item))));
            CHECK(swapped.back() == data.back());  // 67 is not a multiple: the last bytes stay
        }
        swap_bytes(swapped, item);
        CHECK(swapped == data);
    }
}

void decode_inverts_pipelines() {
    ChunkDecoder decoder;
    const Bytes data = random_bytes(4000, 2);
    const Filter shuffle{FilterKind::shuffle, 4}, deflate{FilterKind::deflate}, fletcher{FilterKind::fletcher32};
    const auto decode = [&](Bytes stored, std::vector<Filter> filters, std::uint32_t mask) {
        Bytes again = stored, given(data.size(), std::byte{0x55});
        const auto out = decoder.decode(stored, mask, filters, data.size(), true);
        const Bytes result(out.begin(), out.end());
        const auto placed = decoder.decode(again, mask, filters, data.size(), true, given);
        CHECK(placed.data() == given.data() && given == result);
        return result;
    };
    CHECK(decode(data, {}, 0) == data);
    CHECK(decode(shuffled(data, 4), {shuffle}, 0) == data);
    CHECK(decode(with_checksum(data), {fletcher}, 0) == data);
    CHECK(decode(with_checksum(shuffled(data, 4)), {shuffle, deflate, fletcher}, 0b010) == data);
    CHECK(decode(data, {shuffle, deflate, fletcher}, 0b111) == data);
    if (!can_inflate) return;
    CHECK(decode(zlib_stored(data), {deflate}, 0) == data);
    CHECK(decode(with_checksum(zlib_stored(shuffled(data, 4))), {shuffle, deflate, fletcher}, 0) == data);
    CHECK(decode(zlib_stored(with_checksum(data)), {fletcher, deflate}, 0) == data);
    CHECK(decode(zlib_stored(shuffled(with_checksum(data), 4)), {fletcher, shuffle, deflate}, 0) == data);
    CHECK(decode(shuffled(zlib_stored(data), 4), {deflate, shuffle}, 0) == data);
    Bytes longer = zlib_stored(data);
    longer.resize(longer.size() + 9);  // libhdf5 ignores bytes after the stream
    CHECK(decode(longer, {deflate}, 0) == data);
}

void decode_verifies_checksums() {
    ChunkDecoder decoder;
    const std::array<Filter, 1> filters{Filter{FilterKind::fletcher32}};
    const Bytes data = random_bytes(100, 3);
    Bytes stored = with_checksum(data);
    std::swap(stored[100], stored[101]);  // written like this by libhdf5 before 1.6.3
    std::swap(stored[102], stored[103]);
    CHECK(decoder.decode(stored, 0, filters, 100, true).size() == 100);
    stored[7] ^= std::byte{1};
    CHECK_THROWS(DecodeError, "checksum", decoder.decode(stored, 0, filters, 100, true));
    CHECK(decoder.decode(stored, 0, filters, 100, false).size() == 100);
    Bytes few(3);
    CHECK_THROWS(DecodeError, "too short", decoder.decode(few, 0, filters, 100, true));
}

void decode_rejects_wrong_sizes() {
    ChunkDecoder decoder;
    const std::array<Filter, 1> deflate{Filter{FilterKind::deflate}};
    const Bytes data = random_bytes(70'000, 4);
    Bytes stored = data;
    CHECK_THROWS(DecodeError, "70000 bytes instead of 70001", decoder.decode(stored, 0, {}, 70'001, true));
    if (!can_inflate) {
        CHECK_THROWS(DecodeError, "no deflate library", decoder.decode(stored, 0, deflate, 70'000, true));
        return;
    }
    stored = zlib_stored(data);
    CHECK_THROWS(DecodeError, "end early", decoder.decode(stored, 0, deflate, 70'001, true));
    // Like libhdf5, ignores a moderate number of further bytes.
    CHECK(decoder.decode(stored, 0, deflate, 69'999, true).size() == 69'999);
    stored = zlib_stored(Bytes(std::size_t{17} << 20));
    CHECK_THROWS(DecodeError, "longer", decoder.decode(stored, 0, deflate, 1000, true));
    stored = zlib_stored(data);
    stored.resize(60'000);
    CHECK_THROWS(DecodeError, "", decoder.decode(stored, 0, deflate, 70'000, true));
    stored.clear();
    CHECK_THROWS(DecodeError, "", decoder.decode(stored, 0, deflate, 70'000, true));
    stored = zlib_stored(data);
    stored[40'000] ^= std::byte{4};
    CHECK_THROWS(DecodeError, "invalid", decoder.decode(stored, 0, deflate, 70'000, true));
}

// Rows assembled from chunks that split them in both dimensions, with partial edge chunks.
void row_copy_assembles_rows_from_grid_columns() {
    Dataset dataset{.name = "x", .item_size = 2, .row_shape = {5, 7}, .shards = {}};
    Shard shard{.rows = 3, .chunk_rows = 2, .chunk_shape = {2, 3}, .fill = Bytes(2)};
    shard.offsets.resize(18), shard.sizes.resize(18), shard.masks.resize(18);
    dataset.shards.push_back(shard);
    dataset.validate(1);
    const Shard& valid = dataset.shards[0];
    CHECK(valid.grid_columns == 9 && dataset.row_bytes == 70 && dataset.chunk_bytes(valid) == 24);
    std::vector<std::uint16_t> row(35, 0xffff);
    for (std::uint64_t column = 0; column < valid.grid_columns; ++column) {
        const auto chunk_origin = dataset.chunk_origin(valid, 1, column);
        CHECK(chunk_origin[0] == 2);
        std::vector<std::uint16_t> chunk(12);
        for (std::size_t i = 0; i < 12; ++i) {
            const std::size_t r = i / 6, y = chunk_origin[1] + i / 3 % 2, x = chunk_origin[2] + i % 3;
            chunk[i] = static_cast<std::uint16_t>(100 * r + 7 * y + x);
        }
        RowCopy(dataset, valid, chunk_origin)(reinterpret_cast<const std::byte*>(chunk.data()), 1,
                                              reinterpret_cast<std::byte*>(row.data()));
    }
    for (std::size_t i = 0; i < 35; ++i) CHECK(row[i] == 100 + i);
}

void validate_rejects_impossible_sizes() {
    const auto validated = [](auto change) {
        Dataset dataset{.name = "x", .item_size = 4, .row_shape = {10}, .shards = {}};
        Shard shard{.rows = 8, .chunk_rows = 4, .chunk_shape = {10}, .fill = Bytes(4)};
        shard.offsets.resize(2), shard.sizes.resize(2), shard.masks.resize(2);
        dataset.shards.push_back(shard);
        change(dataset, dataset.shards[0]);
        dataset.validate(1);
    };
    constexpr std::uint64_t huge = std::uint64_t{1} << 62;
    validated([](Dataset&, Shard&) {});
    const auto refused = [&](const char* text, auto change) {
        CHECK_THROWS(std::invalid_argument, text, validated(change));
    };
    refused("a dimension is 0", [](Dataset& d, Shard&) { d.row_shape = {0}; });
    refused("impossibly large", [=](Dataset& d, Shard&) { d.row_shape = {huge}; });
    refused("impossibly large", [=](Dataset&, Shard& s) { s.chunk_shape = {huge}; });
    refused("impossibly large", [=](Dataset&, Shard& s) { s.chunk_rows = huge; });
    refused("impossibly large", [=](Dataset&, Shard& s) { s.rows = huge; });
    refused("impossibly large", [](Dataset&, Shard& s) { s.chunk_rows = 0; });
    refused("a dimension is 0", [](Dataset&, Shard& s) { s.chunk_shape = {0}; });
    refused("other dimensions", [](Dataset&, Shard& s) { s.chunk_shape = {5, 2}; });
    refused("the index", [](Dataset&, Shard& s) { s.sizes.pop_back(); });
    refused("the index", [](Dataset&, Shard& s) { s.rows = 9; });
    refused("fill value", [](Dataset&, Shard& s) { s.fill.clear(); });
    refused("no file", [](Dataset&, Shard& s) { s.file = 1; });
    refused("items of 17", [](Dataset& d, Shard&) { d.item_size = 17; });
    refused("applied twice",
            [](Dataset&, Shard& s) { s.filters = {{FilterKind::shuffle, 4}, {FilterKind::shuffle, 4}}; });
    refused("0 bytes", [](Dataset&, Shard& s) { s.filters = {{FilterKind::shuffle, 0}}; });
}

}  // namespace

int main() {
    unshuffle_inverts_shuffle_in_all_implementations();
    swap_bytes_twice_is_identity();
    decode_inverts_pipelines();
    decode_verifies_checksums();
    decode_rejects_wrong_sizes();
    row_copy_assembles_rows_from_grid_columns();
    validate_rejects_impossible_sizes();
}
