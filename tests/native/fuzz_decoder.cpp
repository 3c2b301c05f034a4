// Damaged chunks: for any input, the decoder returns a chunk of the right size or throws DecodeError.
//
// `LLVMFuzzerTestOneInput` is a libFuzzer target (clang++ -fsanitize=fuzzer -DFUZZER ...). Without libFuzzer, `main` calls
// it with valid chunks that are damaged at random, from a fixed seed.
#include "byte_filters.hpp"
#include "check.hpp"
#include "chunk_decoder.hpp"
#include "errors.hpp"

#include <algorithm>

using namespace spinlock_fast;
using namespace spinlock_fast::testing;

// The codec of the input: deflate or another one.
Filter fuzzed_codec(unsigned choice) {
    static const std::uint32_t numbers[] = {1, 32000, 32001, 32004, 32008, 32008, 32015, 32026};
    const std::vector<std::uint32_t> values{0, 0, 4, 0, choice == 4 ? 2U : 3U};  // of bitshuffle: lz4 or zstd
    return make_filter(numbers[choice % 8], values);
}

// The first four bytes select filters, mask and size of the chunk; the rest are the stored bytes.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < 4) return 0;
    static constexpr FilterKind kinds[] = {FilterKind::shuffle, FilterKind::deflate, FilterKind::fletcher32};
    std::vector<Filter> filters;
    for (unsigned i = 0; i < 3; ++i) {
        const FilterKind kind = kinds[(i + data[0]) % 3];
        if (((data[0] >> (2 + i)) & 1) == 0) continue;
        try {
            filters.push_back(kind == FilterKind::deflate ? fuzzed_codec(data[3] / 32)
                                                          : Filter{kind, static_cast<std::size_t>(1 + data[0] % 9)});
        } catch (const UnsupportedError&) {  // without the library of the codec
        }
    }
    const std::size_t chunk_bytes = 1 + data[2] + 256U * (data[3] % 32);
    const auto* bytes = reinterpret_cast<const std::byte*>(data);
    Bytes stored(bytes + 4, bytes + size);
    ChunkDecoder decoder;
    try {
        const auto out = decoder.decode(stored, data[1], filters, chunk_bytes, (data[0] & 1) != 0);
        CHECK(out.size() == chunk_bytes);
        // Reads all bytes, so that sanitizers report unwritten or invalid memory.
        CHECK(fletcher32(out) != 0x12345678U || out.empty());
    } catch (const DecodeError&) {
    } catch (const UnsupportedError&) {
    }
    return 0;
}

#if !defined(FUZZER)
int main() {
    std::mt19937 random(7);
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random()) % n; };
    for (unsigned round = 0; round < 20'000; ++round) {
        const Bytes content = random_bytes(1 + below(3000), round);
        Bytes stored = zlib_stored(below(2) == 0 ? content : shuffled(content, 4));
        if (below(2) == 0) append(stored, fletcher32(stored), 4, false);
        for (std::size_t damage = below(4); damage-- > 0;)
            stored[below(stored.size())] = static_cast<std::byte>(random());
        if (below(4) == 0) stored.resize(below(stored.size() + 1));
        if (below(8) == 0) stored.resize(stored.size() + below(100));
        const std::size_t size = content.size() - 1 + (below(8) == 0 ? below(9) : 0);
        std::vector<std::uint8_t> input{static_cast<std::uint8_t>(random()),
                                        static_cast<std::uint8_t>(below(2) ? 0 : random()),
                                        static_cast<std::uint8_t>(size % 256),
                                        static_cast<std::uint8_t>(size / 256 + 32 * (below(3) == 0 ? below(8) : 0))};
        for (const std::byte b : stored) input.push_back(std::to_integer<std::uint8_t>(b));
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
}
#endif
