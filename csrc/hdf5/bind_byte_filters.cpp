// Python bindings of the byte filters.
#include "byte_filters.hpp"
#include "errors.hpp"
#include "inflate.hpp"
#include "register.hpp"

#include <stdexcept>

namespace py = pybind11;

namespace spinlock_fast {
namespace {

std::span<const std::byte> as_bytes(const py::buffer_info& info) {
    if (info.ndim > 0) {
        py::ssize_t expected = info.itemsize;
        for (py::ssize_t axis = info.ndim; axis-- > 0;) {
            if (info.shape[static_cast<std::size_t>(axis)] > 1 &&
                info.strides[static_cast<std::size_t>(axis)] != expected)
                throw std::invalid_argument("the buffer must be C-contiguous");
            expected *= info.shape[static_cast<std::size_t>(axis)];
        }
    }
    return {static_cast<const std::byte*>(info.ptr), static_cast<std::size_t>(info.size * info.itemsize)};
}

}  // namespace

void register_byte_filters(py::module_& module) {
    module.def(
        "unshuffle",
        [](const py::buffer& data, std::size_t item_size) {
            if (item_size == 0) throw std::invalid_argument("item_size must be at least 1");
            const py::buffer_info info = data.request();
            const auto in = as_bytes(info);
            py::bytes result(nullptr, in.size());
            auto* out = reinterpret_cast<std::byte*>(PyBytes_AS_STRING(result.ptr()));
            {
                // `info` and `result` keep the memory alive; no Python API is called.
                const py::gil_scoped_release release;
                unshuffle(in, item_size, {out, in.size()});
            }
            return result;
        },
        py::arg("data"), py::arg("item_size"));

    module.def(
        "fletcher32",
        [](const py::buffer& data) {
            const py::buffer_info info = data.request();
            const auto in = as_bytes(info);
            // `info` keeps the memory alive; no Python API is called.
            const py::gil_scoped_release release;
            return fletcher32(in);
        },
        py::arg("data"));

    module.def(
        "inflate",
        [](const py::buffer& data, const py::buffer& out) {
            const py::buffer_info in_info = data.request(), out_info = out.request(true);
            const auto in = as_bytes(in_info), space = as_bytes(out_info);
            try {
                // The buffer infos keep the memory alive; callers must not write to `out` during the call.
                const py::gil_scoped_release release;
                const auto produced = Inflater().inflate(in, {static_cast<std::byte*>(out_info.ptr), space.size()});
                if (!produced) throw DecodeError("the compressed data are longer than the chunk");
                if (*produced < space.size()) throw DecodeError("the compressed data end early");
            } catch (const DecodeError& error) {
                throw std::invalid_argument(error.what());
            }
        },
        py::arg("data"), py::arg("out"));
}

}  // namespace spinlock_fast
