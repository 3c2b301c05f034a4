// One function per binding file, called by `module.cpp`.
#pragma once

#include <pybind11/pybind11.h>

namespace spinlock_fast {

void register_build_info(pybind11::module_& module);
void register_byte_filters(pybind11::module_& module);
void register_fields(pybind11::module_& module);
void register_filters(pybind11::module_& module);
void register_row_reader(pybind11::module_& module);
void register_training(pybind11::module_& module);

}  // namespace spinlock_fast
