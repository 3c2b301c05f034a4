// Run-time selection of the instruction set of the kernels.
#pragma once

#include <string>
#include <vector>

namespace spinlock_fast::training {

// Instruction sets that this processor supports, fastest first.
std::vector<std::string> supported_levels();

// Selects the kernels of an instruction set. Throws std::invalid_argument if the processor does not support it.
void use_level(const std::string& level);

}  // namespace spinlock_fast::training
