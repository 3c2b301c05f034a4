// Python bindings of the operations in `operations.hpp`.
#include "register.hpp"

#include <string>

#include <pybind11/stl.h>

#include "checks.hpp"
#include "operations.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace spinlock_fast {
namespace {

// Releases the GIL: operations access only memory that the caller keeps alive, and no Python API.
template <class Operation>
void add(py::module_& module, const char* name, Operation* operation) {
    module.def(name, operation, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void register_training(py::module_& module) {
    module.def("use_openmp", &use_openmp);
    add(module, "mlp_forward", training::mlp_forward);
    add(module, "mlp_backward", training::mlp_backward);
    add(module, "output_linear", training::output_linear);
    add(module, "output_linear_backward", training::output_linear_backward);
    add(module, "normalize", training::normalize);
    add(module, "normalize_backward", training::normalize_backward);
    add(module, "segments", training::segment_layer_norm);
    add(module, "segments_backward", training::segment_layer_norm_backward);
    add(module, "assign", training::assign);
    add(module, "assign_backward", training::assign_backward);
    add(module, "average_codes", training::average_codes);
    add(module, "decoders_forward", training::decoders_forward);
    add(module, "decoders_backward", training::decoders_backward);
    add(module, "code_mlp_forward", training::code_mlp_forward);
    add(module, "code_mlp_backward", training::code_mlp_backward);
    add(module, "code_cosines", training::code_cosines);
    add(module, "joint_search", training::joint_search);
    add(module, "topo_forward", training::topo_forward);
    add(module, "topo_backward", training::topo_backward);
    add(module, "residual_assign", training::residual_assign);
    add(module, "residual_backward", training::residual_backward);
    add(module, "quantize_step", training::quantize_step);
    add(module, "quantize_step_backward", training::quantize_step_backward);
    module.def(
        "check_codes",
        [](training::Address codes, training::Index rows, const std::vector<training::Index>& num_codes,
           const std::string& name) {
            return training::check_codes(training::pointer<const std::int64_t>(codes), rows, num_codes, name);
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace spinlock_fast
