#include "parallel_products.hpp"

#include <algorithm>
#include <cmath>

#include "parallel.hpp"

namespace spinlock_fast::training {

std::vector<Product> split_rows(const std::vector<Product>& products, int threads) {
    const auto target_pieces = static_cast<Index>(threads > 1 ? 8 * threads : 1);
    const Index parts = (target_pieces + static_cast<Index>(products.size()) - 1) / static_cast<Index>(products.size());
    std::vector<Product> out;
    for (const Product& p : products) {
        const Index rows = std::max<Index>((p.M + parts - 1) / parts, 4 * kernels().rows);
        for (Index m = 0; m < p.M; m += rows) {
            Product piece = p;
            piece.M = std::min(rows, p.M - m);
            piece.a = block(p.a, m, 0);
            piece.out = p.out + m * p.out_row;
            piece.first_row = p.first_row + m;
            if (p.relu_output) piece.relu_output = p.relu_output + m * p.out_row;
            if (m + rows < p.M) piece.column_sums = nullptr;
            out.push_back(piece);
        }
    }
    return out;
}

Workspaces workspaces_for(const std::vector<Product>& products, Index partial, Index buffer) {
    const Kernels& k = kernels();
    for (const Product& p : products) {
        partial = std::max(partial, k.partial_floats(p.M + 1, p.N, p.K));
        if (p.sparse) buffer = std::max(buffer, k.sparse_buffer_floats(p.M, p.K));
    }
    return {partial, buffer};
}

void run_products(const std::vector<Product>& products, int threads) {
    const Kernels& k = kernels();
    const std::vector<Product> pieces = split_rows(products, threads);
    const Workspaces workspaces = workspaces_for(pieces);
    parallel_for(static_cast<Index>(pieces.size()), threads,
                 [&](Index i) { k.product(pieces[static_cast<std::size_t>(i)], workspaces.for_this_thread()); });
}

Dropout make_dropout(double rate, Address seed, Index first_row) {
    if (rate <= 0.0) return {0, 0};
    const double threshold = std::min(std::round(rate * 4294967296.0), 4294967295.0);
    return {*pointer<const std::uint64_t>(seed), static_cast<std::uint32_t>(threshold), first_row};
}

}  // namespace spinlock_fast::training
