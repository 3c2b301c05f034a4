// Decoders of single compressed blocks: LZF, BloscLZ, LZ4 and Zstandard.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace spinlock_fast {

// Versions, for example "1.10.0", of the libraries of this build; empty without the library: decoding then throws.
std::string lz4_version();
std::string zstd_version();

// Each decodes a whole block and returns the number of decoded bytes, or nullopt if `out` is too small. `in` and `out` do
// not overlap. Throw DecodeError.
std::optional<std::size_t> decode_lzf(std::span<const std::byte> in, std::span<std::byte> out);
std::optional<std::size_t> decode_blosclz(std::span<const std::byte> in, std::span<std::byte> out);

// Decodes a block to exactly `out.size()` bytes. Throws DecodeError.
void decode_lz4_block(std::span<const std::byte> in, std::span<std::byte> out);

// Decodes Zstandard frames. Not thread-safe: its state is reused between calls.
class ZstdDecoder {
public:
    ZstdDecoder();
    ~ZstdDecoder();
    ZstdDecoder(ZstdDecoder&&) noexcept;
    ZstdDecoder& operator=(ZstdDecoder&&) noexcept;

    // The decoded size that the first frame declares, if it does.
    static std::optional<std::size_t> declared_size(std::span<const std::byte> in);

    // Returns the number of decoded bytes, or nullopt if `out` is too small. Throws DecodeError.
    std::optional<std::size_t> decode(std::span<const std::byte> in, std::span<std::byte> out);

private:
    struct State;
    std::unique_ptr<State> state_;  // created by the first call of `decode`
};

}  // namespace spinlock_fast
