// Conversion of filters from Python.
#pragma once

#include "filters.hpp"

#include <pybind11/pybind11.h>

namespace spinlock_fast {

// Filters from [(number, client data), ...]; raises NotImplementedError for filters that this build does not decode.
std::vector<Filter> to_filters(const pybind11::handle& description);

}  // namespace spinlock_fast
