// Versions, compiler and instruction sets of the build.
#include <pybind11/stl.h>

#include "hdf5/byte_filters.hpp"
#include "hdf5/inflate.hpp"
#include "instruction_sets.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace spinlock_fast {

void register_build_info(py::module_& module) {
    module.attr("__version__") = SPINLOCK_FAST_VERSION;
    module.def("simd_level", [] { return std::string(simd_level()); });
    module.def("instruction_sets", &supported_instruction_sets);
    module.def("use_instruction_set", &use_instruction_set);
    module.def("inflate_library", &inflate_library);
    module.def("build_info", [] {
        py::dict info;
        info["version"] = SPINLOCK_FAST_VERSION;
        info["compiler"] = __VERSION__;
        info["cxx_standard"] = static_cast<long>(__cplusplus);
        info["simd_level"] = std::string(simd_level());
        info["inflate"] = inflate_library();
        return info;
    });
}

}  // namespace spinlock_fast
