#include "instruction_sets.hpp"

#include <atomic>
#include <stdexcept>

#include "kernels.hpp"

namespace spinlock_fast::training {
namespace {

bool is_supported(const std::string& level) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (level == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (level == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return level == "portable";
}

const Kernels& kernels_for(const std::string& level) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (level == "avx512") return avx512_kernels();
    if (level == "avx2") return avx2_kernels();
#endif
    return portable_kernels();
}

std::atomic<const Kernels*> selected = nullptr;

}  // namespace

std::vector<std::string> supported_levels() {
    std::vector<std::string> levels;
    for (const char* level : {"avx512", "avx2", "portable"})
        if (is_supported(level)) levels.emplace_back(level);
    return levels;
}

void use_level(const std::string& level) {
    if (!is_supported(level)) throw std::invalid_argument("not an instruction set of this processor: " + level);
    selected.store(&kernels_for(level));
}

const Kernels& kernels() {
    const Kernels* current = selected.load(std::memory_order_relaxed);
    if (current == nullptr) {
        current = &kernels_for(supported_levels().front());
        selected.store(current, std::memory_order_relaxed);
    }
    return *current;
}

}  // namespace spinlock_fast::training
