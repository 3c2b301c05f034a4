// Decoders of all compression filters, on chunks that HDF5 wrote (codec_chunks.txt), whole and damaged.
#include "byte_filters.hpp"
#include "check.hpp"
#include "chunk_decoder.hpp"
#include "errors.hpp"

#include <fstream>
#include <memory>
#include <sstream>

using namespace spinlock_fast;
using namespace spinlock_fast::testing;

namespace {

struct StoredChunk {
    std::string text;  // of its line, for messages
    std::vector<Filter> filters;
    Bytes content, stored;
};

// The contents of make_codec_chunks.py.
Bytes content(const std::string& name, std::size_t size) {
    Bytes bytes(size);
    for (std::uint64_t i = 0; i < size; ++i) {
        std::uint64_t value = 0;
        if (name == "ramp") value = i % 4 < 2 ? i / 12 : 0;
        if (name == "noise") value = (i * 2654435761 & 0xffffffff) >> 13;
        if (name == "constant") value = 63;
        bytes[i] = static_cast<std::byte>(value);
    }
    return bytes;
}

std::vector<StoredChunk> read_chunks() {
    std::vector<StoredChunk> chunks;
    std::ifstream file(CODEC_CHUNKS);
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string name, hex;
        std::size_t size = 0, filters = 0, values = 0;
        std::uint32_t number = 0;
        words >> name >> size >> filters;
        StoredChunk chunk{.text = line.substr(0, 60), .filters = {}, .content = content(name, size), .stored = {}};
        while (filters-- > 0) {
            words >> number >> values;
            std::vector<std::uint32_t> data(values);
            for (std::uint32_t& value : data) words >> value;
            chunk.filters.push_back(make_filter(number, data));
        }
        words >> hex;
        for (std::size_t i = 0; i < hex.size(); i += 2)
            chunk.stored.push_back(static_cast<std::byte>(std::stoul(hex.substr(i, 2), nullptr, 16)));
        chunks.push_back(std::move(chunk));
    }
    CHECK(chunks.size() > 50);
    return chunks;
}

// Decodes to the decoder's memory, or with `place` to a destination. The exact size lets the sanitizer find overruns.
Bytes decode(ChunkDecoder& decoder, const StoredChunk& chunk, std::span<const std::byte> stored, std::size_t size,
             bool place) {
    const auto copy = std::make_unique<std::byte[]>(stored.size());
    std::copy(stored.begin(), stored.end(), copy.get());
    Bytes destination(place ? size : 0);
    const auto out = decoder.decode({copy.get(), stored.size()}, 0, chunk.filters, size, true, destination);
    CHECK(out.size() == size);
    return {out.begin(), out.end()};
}

void valid_chunks_decode(const std::vector<StoredChunk>& chunks) {
    ChunkDecoder reused;
    for (const StoredChunk& chunk : chunks) {
        for (const bool place : {false, true}) {
            ChunkDecoder fresh;
            const bool equal = decode(fresh, chunk, chunk.stored, chunk.content.size(), place) == chunk.content &&
                               decode(reused, chunk, chunk.stored, chunk.content.size(), place) == chunk.content;
            if (!equal) std::fprintf(stderr, "%s\n", chunk.text.c_str());
            CHECK(equal);
        }
    }
}

// Every prefix of a chunk is damaged, except that trailing bytes of a frame or stream may be unused.
void truncated_chunks_throw(const std::vector<StoredChunk>& chunks) {
    for (const StoredChunk& chunk : chunks) {
        ChunkDecoder decoder;
        for (std::size_t size = 0; size < chunk.stored.size(); size += 1 + size / 16) {
            try {
                const Bytes out = decode(decoder, chunk, std::span(chunk.stored).first(size), chunk.content.size(), true);
                CHECK(out == chunk.content);
            } catch (const DecodeError&) {
            } catch (const UnsupportedError&) {
            }
        }
    }
}

// Any damage: a result of the right size, DecodeError or UnsupportedError; never a fault or much memory.
void damaged_chunks_do_no_harm(const std::vector<StoredChunk>& chunks, unsigned rounds) {
    std::mt19937 random(11);
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random()) % n; };
    static constexpr std::uint8_t extremes[] = {0x00, 0x01, 0x7f, 0x80, 0xff};
    for (const StoredChunk& chunk : chunks) {
        ChunkDecoder decoder;
        for (unsigned round = 0; round < rounds; ++round) {
            Bytes stored = chunk.stored;
            const std::size_t head = std::min<std::size_t>(stored.size(), below(2) == 0 ? 48 : stored.size());
            for (std::size_t damage = 1 + below(4); damage-- > 0;) {
                const std::size_t start = below(head), length = std::size_t{1} << below(4);
                const auto value = static_cast<std::byte>(below(2) == 0 ? extremes[below(5)] : random() & 0xff);
                if (below(3) == 0)
                    stored[start] ^= static_cast<std::byte>(1U << below(8));
                else
                    for (std::size_t i = start; i < std::min(stored.size(), start + length); ++i) stored[i] = value;
            }
            if (below(6) == 0) stored.resize(below(stored.size() + 1));
            if (below(12) == 0) stored.resize(stored.size() + below(50));
            try {
                decode(decoder, chunk, stored, chunk.content.size() - (below(8) == 0 ? 1 : 0), below(2) == 0);
            } catch (const DecodeError&) {
            } catch (const UnsupportedError&) {
            }
        }
    }
}

void declared_sizes_are_limited(const std::vector<StoredChunk>& chunks) {
    for (const StoredChunk& chunk : chunks) {
        const FilterKind kind = chunk.filters.back().kind;
        if (kind != FilterKind::lz4 && kind != FilterKind::bitshuffle) continue;
        if (!chunk.filters.back().compresses()) continue;
        ChunkDecoder decoder;
        StoredChunk bomb = chunk;
        bomb.stored[2] = std::byte{0x40};  // of 8 bytes, big-endian
        CHECK_THROWS(DecodeError, "longer than the chunk",
                     decode(decoder, chunk, bomb.stored, chunk.content.size(), false));
    }
}

void filters_of_unknown_numbers_or_data_are_unsupported() {
    const std::vector<std::uint32_t> none, item{0, 0, 4}, odd{0, 0, 4, 12};
    CHECK_THROWS(UnsupportedError, "the filter 4", make_filter(4, none));
    CHECK_THROWS(UnsupportedError, "item size", make_filter(2, none));
    CHECK(make_filter(2, std::vector<std::uint32_t>{8}).item_size == 8);
    if (lz4_version().empty() || zstd_version().empty()) return;
    CHECK_THROWS(UnsupportedError, "item size", make_filter(32008, none));
    CHECK_THROWS(UnsupportedError, "block size", make_filter(32008, odd));
    CHECK(!make_filter(32008, item).compresses());
}

}  // namespace

int main(int count, char** arguments) {
    filters_of_unknown_numbers_or_data_are_unsupported();
    if (inflate_library() == "none" || lz4_version().empty() || zstd_version().empty()) return 0;
    const auto chunks = read_chunks();
    valid_chunks_decode(chunks);
    truncated_chunks_throw(chunks);
    declared_sizes_are_limited(chunks);
    damaged_chunks_do_no_harm(chunks, count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 300);
}
