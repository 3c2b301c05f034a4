// Python bindings of the filters and of decoding one chunk.
#include "bind_filters.hpp"

#include "chunk_decoder.hpp"
#include "errors.hpp"
#include "register.hpp"

#include <pybind11/stl.h>

#include <stdexcept>

namespace py = pybind11;

namespace spinlock_fast {
namespace {

[[noreturn]] void raise(PyObject* type, const char* message) {
    PyErr_SetString(type, message);
    throw py::error_already_set();
}

py::bytes decode_chunk(const std::string& stored, std::uint32_t mask, const py::list& description,
                       std::size_t chunk_bytes, bool verify) {
    const std::vector<Filter> filters = to_filters(description);
    std::vector<std::byte> in(stored.size());
    std::memcpy(in.data(), stored.data(), stored.size());
    try {
        ChunkDecoder decoder;
        const auto out = decoder.decode(in, mask, filters, chunk_bytes, verify);
        return {reinterpret_cast<const char*>(out.data()), out.size()};
    } catch (const UnsupportedError& error) {
        raise(PyExc_NotImplementedError, error.what());
    } catch (const DecodeError& error) {
        raise(PyExc_ValueError, error.what());
    }
}

}  // namespace

std::vector<Filter> to_filters(const py::handle& description) {
    std::vector<Filter> filters;
    using Pairs = std::vector<std::pair<std::uint32_t, std::vector<std::uint32_t>>>;
    for (const auto& [number, values] : py::cast<Pairs>(description)) {
        try {
            filters.push_back(make_filter(number, values));
        } catch (const UnsupportedError& error) {
            raise(PyExc_NotImplementedError, error.what());
        }
    }
    return filters;
}

void register_filters(py::module_& module) {
    module.def("codec_libraries", [] {
        std::string text;
        if (const std::string version = lz4_version(); !version.empty()) text += "lz4 " + version;
        if (const std::string version = zstd_version(); !version.empty())
            text += (text.empty() ? "zstd " : ", zstd ") + version;
        return text.empty() ? "none" : text;
    });
    module.def("filter_numbers", &filter_numbers);
    module.def(
        "check_filters", [](const py::list& filters) { to_filters(filters); }, py::arg("filters"));
    module.def("decode_chunk", &decode_chunk, py::arg("stored"), py::arg("mask"), py::arg("filters"),
               py::arg("chunk_bytes"), py::arg("verify_checksums") = true);
}

}  // namespace spinlock_fast
