// The CPU path of a training step: what kernels/*/native.py calls.
#pragma once

#include <pybind11/pybind11.h>

namespace spinlock_fast {

void register_training(pybind11::module_& module);

}  // namespace spinlock_fast
