// A two-layer network of the code vectors of all codebooks side by side: y = dropout(relu(e W1 + b1)) W2 + b2; called by
// kernels/code_mlp.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.hpp"
#include "codebook_layout.hpp"
#include "kernels.hpp"
#include "operations.hpp"
#include "parallel.hpp"
#include "parallel_products.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

// Sets hidden [B, H] and out [B, E] for codes [B, G]; rows without a code are NaN. `tables` [sum K, H] is scratch memory.
void code_mlp_forward(Address codes, Address codebook, const MatrixAddress& w1, Address b1, const MatrixAddress& w2,
                      Address b2, const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B,
                      Index H, Index E, double rate, Address seed, Address tables, Address hidden, Address out,
                      int threads) {
    check_sizes(B, {H, E});
    check_codes(pointer<const std::int64_t>(codes), B, num_codes, "code_mlp");
    std::vector<Product> products;
    std::vector<Index> first_code;
    for (const CodebookSlice& s : codebook_slices(num_codes, dims)) {
        first_code.push_back(s.first_code);
        products.push_back({s.num_codes, H, s.dims,
                            row_major(pointer<const float>(codebook) + s.first_entry, s.dims),
                            block(operand(w1), s.first_column, 0), pointer<float>(tables) + s.first_code * H, H});
    }
    run_products(products, threads);
    const CodeLayerTask task{static_cast<Index>(first_code.size()), H, pointer<const std::int64_t>(codes),
                             first_code.data(), pointer<const float>(tables), pointer<const float>(b1),
                             make_dropout(rate, seed, 0), pointer<float>(hidden)};
    constexpr Index kRowsPerTask = 64;
    parallel_for(divide_up(B, kRowsPerTask), threads, [&](Index i) {
        kernels().code_layer_rows(task, i * kRowsPerTask, std::min(B, (i + 1) * kRowsPerTask));
    });
    Product second{B, E, H, row_major(task.hidden, H), operand(w2), pointer<float>(out), E};
    second.alpha = dropout_scale(rate);
    second.sparse = true;
    second.bias = pointer<const float>(b2);
    run_products({second}, threads);
}

// Gradients of the code vectors of the rows, [B, sum D], and of the parameters: grad_w1 [H, sum D] and grad_w2 [H, E].
// grad_hidden [B, H] and sums [sum K, H] are scratch memory.
void code_mlp_backward(Address grad, Address codes, Address codebook, const MatrixAddress& w1, const MatrixAddress& w2,
                       Address hidden, const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B,
                       Index H, Index E, double rate, Address grad_hidden, Address sums, Address grad_quantized,
                       Address grad_w1, Address grad_b1, Address grad_w2, Address grad_b2, int threads) {
    check_sizes(B, {H, E});
    check_codes(pointer<const std::int64_t>(codes), B, num_codes, "code_mlp");
    const std::vector<CodebookSlice> slices = codebook_slices(num_codes, dims);
    const Index total = total_size(dims), G = static_cast<Index>(slices.size());
    const Operand dy = row_major(pointer<const float>(grad), E), second = operand(w2), first = operand(w1);
    float *dh = pointer<float>(grad_hidden), *code_sums = pointer<float>(sums);
    Product hidden_product{B, H, E, dy, {second.p, second.column, second.row}, dh, H};
    hidden_product.alpha = dropout_scale(rate);
    hidden_product.relu_output = pointer<const float>(hidden);
    run_products({hidden_product}, threads);
    parallel_for(G, threads, [&](Index g) {
        const CodebookSlice& s = slices[static_cast<std::size_t>(g)];
        kernels().sum_rows_by_code(pointer<const std::int64_t>(codes), G, g, dh, B, H, s.num_codes,
                                   code_sums + s.first_code * H);
    });
    std::vector<Product> products;
    Product w2_product{H, E, B, transposed(pointer<const float>(hidden), H), dy, pointer<float>(grad_w2), E};
    w2_product.alpha = hidden_product.alpha;
    w2_product.sparse = true;
    w2_product.column_sums = pointer<float>(grad_b2);
    products.push_back(w2_product);
    Product input_product{B,  total, H, row_major(dh, H), {first.p, first.column, first.row},
                          pointer<float>(grad_quantized), total};
    input_product.sparse = true;
    products.push_back(input_product);
    for (const CodebookSlice& s : slices)
        products.push_back({H, s.dims, s.num_codes, transposed(code_sums + s.first_code * H, H),
                            row_major(pointer<const float>(codebook) + s.first_entry, s.dims),
                            pointer<float>(grad_w1) + s.first_column, total});
    run_products(products, threads);
    kernels().column_sums(dh, B, H, H, pointer<float>(grad_b1));
}

}  // namespace spinlock_fast::training
