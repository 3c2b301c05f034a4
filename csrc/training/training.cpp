#include "training.hpp"

#include <string>

#include <pybind11/stl.h>

#include "dispatch.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace spinlock_fast {

void register_training(py::module_& module) {
    module.def("use_openmp", &use_openmp);
    module.def("training_levels", &training::levels_here);
    module.def("use_training_level", &training::use_level);
    register_two_layers(module);
    register_projections(module);
    register_quantizers(module);
    register_decoders(module);
    register_topo(module);
    register_residual(module);
}

}  // namespace spinlock_fast
