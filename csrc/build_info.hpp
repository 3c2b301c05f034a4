// What this module was built with, and what the processor it runs on can do.
#pragma once

#include <string_view>

#include <pybind11/pybind11.h>

namespace spinlock_fast {

// The widest instruction set that this processor offers, of those the code has paths for:
// "avx512", "avx2", "sse2" or "portable".
std::string_view simd_level() noexcept;

void register_build_info(pybind11::module_& module);

}  // namespace spinlock_fast
