#include "inflate.hpp"

#include "errors.hpp"

#if defined(SPINLOCK_FAST_LIBDEFLATE)
#include <libdeflate.h>
#elif defined(SPINLOCK_FAST_ZLIB)
#include <limits>
#include <zlib.h>
#endif

namespace spinlock_fast {

#if defined(SPINLOCK_FAST_LIBDEFLATE)

struct Inflater::State {
    struct Free {
        void operator()(libdeflate_decompressor* d) const noexcept { libdeflate_free_decompressor(d); }
    };
    std::unique_ptr<libdeflate_decompressor, Free> decompressor{libdeflate_alloc_decompressor()};
};

std::string inflate_library() { return "libdeflate " LIBDEFLATE_VERSION_STRING; }

Inflater::Inflater() : state_(std::make_unique<State>()) {
    if (!state_->decompressor) throw std::bad_alloc();
}

std::optional<std::size_t> Inflater::inflate(std::span<const std::byte> in, std::span<std::byte> out) {
    if (in.empty())
        throw DecodeError("the compressed data are empty");  // libdeflate would do arithmetic on a null pointer
    std::size_t consumed = 0, produced = 0;
    const libdeflate_result result = libdeflate_zlib_decompress_ex(state_->decompressor.get(), in.data(), in.size(),
                                                                   out.data(), out.size(), &consumed, &produced);
    switch (result) {
        case LIBDEFLATE_SUCCESS:
            return produced;
        case LIBDEFLATE_INSUFFICIENT_SPACE:
            return std::nullopt;
        case LIBDEFLATE_BAD_DATA:
        case LIBDEFLATE_SHORT_OUTPUT:
            throw DecodeError("the compressed data are invalid");
    }
    throw DecodeError("the compressed data cannot be decoded");
}

#elif defined(SPINLOCK_FAST_ZLIB)

struct Inflater::State {
    State() {
        if (inflateInit(&stream) != Z_OK) throw std::bad_alloc();
    }
    ~State() { inflateEnd(&stream); }
    State(const State&) = delete;
    State& operator=(const State&) = delete;

    z_stream stream{};
};

std::string inflate_library() { return std::string("zlib ") + zlibVersion(); }

Inflater::Inflater() : state_(std::make_unique<State>()) {}

std::optional<std::size_t> Inflater::inflate(std::span<const std::byte> in, std::span<std::byte> out) {
    constexpr std::size_t timeout = std::numeric_limits<uInt>::max();
    // Valid files stay below this: libhdf5 limits chunks to less than 4 GiB.
    if (in.size() > timeout || out.size() > timeout) throw DecodeError("the chunk is too large for zlib");
    z_stream& stream = state_->stream;
    if (inflateReset(&stream) != Z_OK) throw DecodeError("zlib cannot be reset");
    stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(in.data()));  // zlib does not write to it
    stream.avail_in = static_cast<uInt>(in.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    const int result = ::inflate(&stream, Z_FINISH);
    if (result == Z_STREAM_END) return out.size() - stream.avail_out;
    if ((result == Z_OK || result == Z_BUF_ERROR) && stream.avail_out == 0) return std::nullopt;
    throw DecodeError("the compressed data are invalid");
}

#else

struct Inflater::State {};

std::string inflate_library() { return "none"; }

Inflater::Inflater() = default;

std::optional<std::size_t> Inflater::inflate(std::span<const std::byte>, std::span<std::byte>) {
    throw DecodeError("this build has no deflate library");
}

#endif

Inflater::~Inflater() = default;
Inflater::Inflater(Inflater&&) noexcept = default;
Inflater& Inflater::operator=(Inflater&&) noexcept = default;

}  // namespace spinlock_fast
