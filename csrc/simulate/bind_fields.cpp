// Python bindings of the operations in `field_operations.hpp`; without the GIL, as they use no Python API.
#include "register.hpp"
#include "simulate/field_operations.hpp"

namespace py = pybind11;

namespace spinlock_fast {

void register_fields(py::module_& module) {
    const auto add = [&module](const char* name, auto* operation) {
        module.def(name, operation, py::call_guard<py::gil_scoped_release>());
    };
    add("torus_convolution", &simulate::torus_convolution);
    add("channel_sums", &simulate::channel_sums);
    add("confined_step", &simulate::confined_step);
    add("squared_gradients", &simulate::squared_gradients);
    add("interfaces_and_extremes", &simulate::interfaces_and_extremes);
    add("block_means", &simulate::block_means);
    add("split_complex", &simulate::split_complex);
}

}  // namespace spinlock_fast
