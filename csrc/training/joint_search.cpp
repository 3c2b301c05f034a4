// Joint search of codes of a batch; called by kernels/joint_search.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.hpp"
#include "kernels.hpp"
#include "operations.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

void joint_search(Address codes, Address sums, Address gradient, Address tolerance, Address cost, Address tables,
                  Address filter, Address head, Address tail, Address gram, Address linear_head,
                  Address linear_gradient, const std::vector<Index>& num_codes,
                  Index B, Index H, Index linear_units, Index tail_columns, Index sweeps, int threads) {
    const Kernels& k = kernels();
    check_sizes(B, {H, linear_units, tail_columns, sweeps});
    if (H % 16 || linear_units % 16 || tail_columns % 16)
        throw std::invalid_argument("joint_search: widths must be multiples of 16");
    if (linear_units > H) throw std::invalid_argument("joint_search: linear_units must be at most the width");
    if (linear_units && (!linear_head || !linear_gradient))
        throw std::invalid_argument("joint_search: linear units need linear_head and linear_gradient");
    if (num_codes.empty() || *std::min_element(num_codes.begin(), num_codes.end()) < 1)
        throw std::invalid_argument("joint_search: num_codes must be at least 1");
    if (check_codes(pointer<const std::int64_t>(codes), B, num_codes, "joint_search"))
        throw std::out_of_range("joint_search: a row has no code");
    std::vector<Index> first_code;
    Index total = 0;
    for (const Index n : num_codes) {
        first_code.push_back(total);
        total += n;
    }
    JointSearchTask task{};
    task.H = H, task.R = H - linear_units, task.G = static_cast<Index>(num_codes.size()), task.sweeps = sweeps, task.tail_columns = tail_columns;
    task.total_codes = total, task.max_codes = *std::max_element(num_codes.begin(), num_codes.end());
    task.first_code = first_code.data(), task.num_codes = num_codes.data();
    task.tables = pointer<const float>(tables), task.filter = pointer<const float>(filter);
    task.head = pointer<const float>(head), task.tail = pointer<const float>(tail);
    task.linear_head = linear_units ? pointer<const float>(linear_head) : nullptr;
    task.linear_gradient = linear_units ? pointer<const float>(linear_gradient) : nullptr;
    task.gram = pointer<const float>(gram), task.tolerance = pointer<const float>(tolerance);
    task.cost = pointer<const float>(cost);
    task.sums = pointer<float>(sums), task.gradient = pointer<float>(gradient);
    task.codes = pointer<std::int64_t>(codes);
    constexpr Index kRows = 32;  // per task
    const Workspaces workspaces(0, k.joint_search_buffer_floats(H, task.max_codes));
    parallel_for(divide_up(B, kRows), threads, [&](Index i) {
        k.joint_search_rows(task, i * kRows, std::min(B, (i + 1) * kRows), workspaces.for_this_thread());
    });
}

}  // namespace spinlock_fast::training
