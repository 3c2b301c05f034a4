#include "build_info.hpp"

namespace py = pybind11;

namespace spinlock_fast {

std::string_view simd_level() noexcept {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return "avx512";
    if (__builtin_cpu_supports("avx2")) return "avx2";
    return "sse2";  // part of every x86-64 processor
#else
    return "portable";
#endif
}

void register_build_info(py::module_& module) {
    module.attr("__version__") = SPINLOCK_FAST_VERSION;
    module.def("simd_level", [] { return std::string(simd_level()); });
    module.def("build_info", [] {
        py::dict info;
        info["version"] = SPINLOCK_FAST_VERSION;
        info["compiler"] = __VERSION__;
        info["cxx_standard"] = static_cast<long>(__cplusplus);
        info["simd_level"] = std::string(simd_level());
        return info;
    });
}

}  // namespace spinlock_fast
