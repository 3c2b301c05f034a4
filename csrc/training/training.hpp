// The CPU path of a training step: what kernels/*/native.py calls.
#pragma once

#include <pybind11/pybind11.h>

namespace spinlock_fast {

void register_training(pybind11::module_& module);

// Its parts, a file each.
void register_two_layers(pybind11::module_& module);
void register_projections(pybind11::module_& module);
void register_quantizers(pybind11::module_& module);
void register_decoders(pybind11::module_& module);
void register_topo(pybind11::module_& module);
void register_residual(pybind11::module_& module);

}  // namespace spinlock_fast
