// Which instruction set the kernels are taken from.
#pragma once

#include <string>
#include <vector>

namespace spinlock_fast::training {

// Those that this processor runs, the fastest first.
std::vector<std::string> levels_here();

// From now on kernels are those of a level; raises std::invalid_argument where the processor does not run it.
void use_level(const std::string& level);

}  // namespace spinlock_fast::training
