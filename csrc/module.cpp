#include "register.hpp"

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native HDF5 reader, and CPU kernels of simulation and training, of spinlock_fast.";
    spinlock_fast::register_build_info(module);
    spinlock_fast::register_byte_filters(module);
    spinlock_fast::register_fields(module);
    spinlock_fast::register_filters(module);
    spinlock_fast::register_row_reader(module);
    spinlock_fast::register_training(module);
}
