// The instruction set that all CPU kernels of this process use: the best of the processor, unless another is selected.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace spinlock_fast {

enum class InstructionSet { portable, avx2, avx512 };

namespace detail {

inline constexpr std::pair<const char*, InstructionSet> kInstructionSets[] = {
    {"avx512", InstructionSet::avx512}, {"avx2", InstructionSet::avx2}, {"portable", InstructionSet::portable}};

inline bool is_supported(InstructionSet set) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (set == InstructionSet::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (set == InstructionSet::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return set == InstructionSet::portable;
}

inline InstructionSet best() {
    for (const auto& [name, set] : kInstructionSets)
        if (is_supported(set)) return set;
    return InstructionSet::portable;
}

inline std::atomic<InstructionSet> selected = best();

}  // namespace detail

// Instruction sets that this processor supports, fastest first.
inline std::vector<std::string> supported_instruction_sets() {
    std::vector<std::string> names;
    for (const auto& [name, set] : detail::kInstructionSets)
        if (detail::is_supported(set)) names.emplace_back(name);
    return names;
}

// Selects an instruction set. Throws std::invalid_argument if the processor does not support it.
inline void use_instruction_set(const std::string& wanted) {
    for (const auto& [name, set] : detail::kInstructionSets)
        if (name == wanted && detail::is_supported(set)) return detail::selected.store(set);
    throw std::invalid_argument("not an instruction set of this processor: " + wanted);
}

inline InstructionSet instruction_set() { return detail::selected.load(std::memory_order_relaxed); }

}  // namespace spinlock_fast
