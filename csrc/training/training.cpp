#include "training.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include <pybind11/stl.h>

#include "byte_filters.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace py = pybind11;

namespace spinlock_fast {

namespace training {

namespace {

bool runs_here(const std::string& level) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (level == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (level == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return level == "portable";
}

const Kernels& kernels_of(const std::string& level) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (level == "avx512") return avx512_kernels();
    if (level == "avx2") return avx2_kernels();
#endif
    return portable_kernels();
}

std::vector<std::string> levels_here() {
    std::vector<std::string> found;
    for (const char* level : {"avx512", "avx2", "portable"})
        if (runs_here(level)) found.emplace_back(level);
    return found;
}

std::atomic<const Kernels*> chosen = nullptr;

}  // namespace

const Kernels& kernels() {
    const Kernels* found = chosen.load(std::memory_order_relaxed);
    if (found == nullptr) {
        found = &kernels_of(levels_here().front());
        chosen.store(found, std::memory_order_relaxed);
    }
    return *found;
}

}  // namespace training

namespace {

using namespace training;

// Address, distance of rows, distance of columns.
using PyOperand = std::tuple<std::uintptr_t, Index, Index>;

Operand operand(const PyOperand& o) { return {at<const float>(std::get<0>(o)), std::get<1>(o), std::get<2>(o)}; }

Operand block(Operand o, Index i, Index j) { return {o.p + i * o.row + j * o.column, o.row, o.column}; }

// Splits products by rows of their results, so that threads share them evenly.
std::vector<Product> split(const std::vector<Product>& products, int threads) {
    const auto wanted = static_cast<Index>(threads > 1 ? 8 * threads : 1);
    const Index parts = (wanted + static_cast<Index>(products.size()) - 1) / static_cast<Index>(products.size());
    std::vector<Product> out;
    for (const Product& p : products) {
        const Index rows = std::max<Index>((p.M + parts - 1) / parts, 4 * kernels().rows);
        for (Index m = 0; m < p.M; m += rows) {
            Product piece = p;
            piece.M = std::min(rows, p.M - m);
            piece.a = block(p.a, m, 0);
            piece.out = p.out + m * p.out_row;
            piece.first_row = p.first_row + m;
            if (p.positive) piece.positive = p.positive + m * p.out_row;
            if (m + rows < p.M) piece.column_sums = nullptr;
            out.push_back(piece);
        }
    }
    return out;
}

Workspaces spaces_of(const std::vector<Product>& products, Index partial = 0, Index buffer = 0) {
    const Kernels& k = kernels();
    for (const Product& p : products) {
        partial = std::max(partial, k.partial_floats(p.M + 1, p.N, p.K));
        if (p.sparse) buffer = std::max(buffer, k.sparse_buffer_floats(p.M, p.K));
    }
    return {partial, buffer};
}

void run(const std::vector<Product>& products, int threads) {
    const Kernels& k = kernels();
    const std::vector<Product> pieces = split(products, threads);
    const Workspaces spaces = spaces_of(pieces);
    parallel_for(static_cast<Index>(pieces.size()), threads,
                 [&](Index i) { k.product(pieces[static_cast<std::size_t>(i)], spaces.here()); });
}

Dropout dropout_of(double rate, std::uintptr_t seed) {
    if (rate <= 0.0) return {0, 0};
    const double threshold = std::min(std::round(rate * 4294967296.0), 4294967295.0);
    return {*at<const std::uint64_t>(seed), static_cast<std::uint32_t>(threshold)};
}

// ---- grouped layers

void mlp_forward(const PyOperand& x, const PyOperand& w1, std::uintptr_t b1, const PyOperand& w2, Index w2_group,
                 std::uintptr_t b2, const std::vector<Index>& sizes, Index B, Index H, Index E, double rate,
                 std::uintptr_t seed, std::uintptr_t hidden, std::uintptr_t out, int threads) {
    const py::gil_scoped_release release;  // only memory that the caller holds is touched
    const Dropout dropout = dropout_of(rate, seed);
    std::vector<Product> first, second;
    Index column = 0;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        Product p{B, H, n, block(operand(x), 0, column), block(operand(w1), column, 0), at<float>(hidden) + g * B * H, H};
        p.bias = at<const float>(b1) + g * H;
        p.relu = true;
        p.dropout = dropout;
        p.first_row = g * B;
        first.push_back(p);
        Operand weight = operand(w2);
        weight.p += g * w2_group;
        Product q{B, E, H, {at<const float>(hidden) + g * B * H, H, 1}, weight, at<float>(out) + g * B * E, E};
        q.alpha = static_cast<float>(rate < 1.0 ? 1.0 / (1.0 - rate) : 0.0);
        q.sparse = true;
        q.bias = at<const float>(b2) + g * E;
        second.push_back(q);
        column += n;
    }
    run(first, threads);
    run(second, threads);
}

void mlp_backward(std::uintptr_t grad, const PyOperand& x, const PyOperand& w1, const PyOperand& w2, Index w2_group,
                  std::uintptr_t hidden, const std::vector<Index>& sizes, Index B, Index H, Index E, double rate,
                  std::uintptr_t of_hidden, std::uintptr_t of_x, const PyOperand& of_w1, std::uintptr_t of_b1,
                  std::uintptr_t of_w2, std::uintptr_t of_b2, int threads) {
    const py::gil_scoped_release release;
    const float scale = static_cast<float>(rate < 1.0 ? 1.0 / (1.0 - rate) : 0.0);
    const Kernels& k = kernels();
    const Index G = static_cast<Index>(sizes.size());
    constexpr Index kRows = 256;  // of a task, whatever the number of threads: the parts are added up in one order
    const Index parts = std::max<Index>((B + kRows - 1) / kRows, 1);
    std::vector<Product> to_hidden, of_second, rest;
    std::vector<FirstLayerTask> of_first;
    Index column = 0, total = 0, partial = 0, buffer = 0;
    for (const Index n : sizes) total += n;
    thread_local Floats memory;
    float* sums = of_x ? nullptr : memory.reserve((total + G) * parts * H);
    for (Index g = 0; g < G; ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        const Operand dy{at<const float>(grad) + g * B * E, E, 1}, h{at<const float>(hidden) + g * B * H, H, 1};
        const Operand inputs = block(operand(x), 0, column), back = block(operand(w1), column, 0);
        const Operand turned{at<const float>(std::get<0>(w2)) + g * w2_group, std::get<2>(w2), std::get<1>(w2)};
        Product q{H, E, B, {h.p, 1, H}, dy, at<float>(of_w2) + g * H * E, E};
        q.alpha = scale;
        q.sparse = true;
        q.column_sums = at<float>(of_b2) + g * E;
        of_second.push_back(q);
        if (of_x) {
            const Operand dh{at<const float>(of_hidden) + g * B * H, H, 1};
            Product p{B, H, E, dy, turned, at<float>(of_hidden) + g * B * H, H};
            p.alpha = scale;
            p.positive = h.p;
            to_hidden.push_back(p);
            auto* weights = at<float>(std::get<0>(of_w1)) + column * std::get<1>(of_w1);
            Product r{n, H, B, {inputs.p, inputs.column, inputs.row}, dh, weights, std::get<1>(of_w1)};
            if (std::get<2>(of_w1) != 1) {  // turned: then the zeros of dh can be left out
                r = {H, n, B, {dh.p, 1, H}, inputs, weights, std::get<2>(of_w1)};
                r.sparse = true;
            }
            rest.push_back(r);
            Product s{B, n, H, dh, {back.p, back.column, back.row}, at<float>(of_x) + column, total};
            s.sparse = true;
            rest.push_back(s);
        } else {
            for (Index part = 0; part < parts; ++part) {
                const Index first = part * kRows, rows = std::max<Index>(std::min(kRows, B - first), 0);
                float* out = sums + ((column + g) * parts + part * (n + 1)) * H;
                of_first.push_back({rows, n, H, E, block(inputs, first, 0), dy.p + first * E, turned, h.p + first * H,
                                    scale, out});
                partial = std::max({partial, k.partial_floats(rows, H, E), k.partial_floats(n + 1, H, rows)});
                buffer = std::max(buffer, k.first_layer_buffer_floats(rows, H));
            }
        }
        column += n;
    }
    if (of_x) {
        run(to_hidden, threads);
        rest.insert(rest.end(), of_second.begin(), of_second.end());
        run(rest, threads);
        for (Index g = 0; g < G; ++g)
            k.column_sums(at<const float>(of_hidden) + g * B * H, B, H, H, at<float>(of_b1) + g * H);
        return;
    }
    const std::vector<Product> pieces = split(of_second, threads);
    const Workspaces spaces = spaces_of(pieces, partial, buffer);
    const Index firsts = static_cast<Index>(of_first.size());
    parallel_for(firsts + static_cast<Index>(pieces.size()), threads, [&](Index i) {
        if (i < firsts)
            k.first_layer(of_first[static_cast<std::size_t>(i)], spaces.here());
        else
            k.product(pieces[static_cast<std::size_t>(i - firsts)], spaces.here());
    });
    column = 0;
    for (Index g = 0; g < G; ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        const float* first = sums + (column + g) * parts * H;
        for (Index f = 0; f <= n; ++f) {
            float* out = f < n ? at<float>(std::get<0>(of_w1)) + (column + f) * H : at<float>(of_b1) + g * H;
            std::copy(first + f * H, first + (f + 1) * H, out);
            for (Index part = 1; part < parts; ++part)
                for (Index c = 0; c < H; ++c) out[c] += first[(part * (n + 1) + f) * H + c];
        }
        column += n;
    }
}

// (x gain + shift) W^T + bias for x [G, B, in], gain and shift [G, in], W [sum n, in], to columns of out [B, sum n]:
// gain and shift go into the weights. `scaled` [sum n, in] is what is left of them.
void output_linear(std::uintptr_t x, std::uintptr_t gain, std::uintptr_t shift, std::uintptr_t weight,
                   std::uintptr_t bias, const std::vector<Index>& sizes, Index B, Index in, std::uintptr_t scaled,
                   std::uintptr_t out, int threads) {
    const py::gil_scoped_release release;
    std::vector<Product> products;
    Index column = 0, total = 0;
    for (const Index n : sizes) total += n;
    std::vector<float> offset(static_cast<std::size_t>(total));
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const float *factors = at<const float>(gain) + g * in, *shifts = at<const float>(shift) + g * in;
        for (const Index end = column + sizes[static_cast<std::size_t>(g)]; column < end; ++column) {
            const float* row = at<const float>(weight) + column * in;
            float* result = at<float>(scaled) + column * in;
            float sum = 0.0f;
            for (Index i = 0; i < in; ++i) {
                result[i] = row[i] * factors[i];
                sum += row[i] * shifts[i];
            }
            offset[static_cast<std::size_t>(column)] = at<const float>(bias)[column] + sum;
        }
    }
    column = 0;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        Product p{B, n, in, {at<const float>(x) + g * B * in, in, 1}, {at<const float>(scaled) + column * in, 1, in},
                  at<float>(out) + column, total};
        p.bias = offset.data() + column;
        products.push_back(p);
        column += n;
    }
    run(products, threads);
}

void output_linear_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t gain, std::uintptr_t shift,
                            std::uintptr_t weight, std::uintptr_t scaled, const std::vector<Index>& sizes, Index B,
                            Index in, std::uintptr_t of_x, std::uintptr_t of_gain, std::uintptr_t of_shift,
                            std::uintptr_t of_weight, std::uintptr_t of_bias, int threads) {
    const py::gil_scoped_release release;
    std::vector<Product> products;
    Index column = 0, total = 0;
    for (const Index n : sizes) total += n;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const Index n = sizes[static_cast<std::size_t>(g)];
        const float* part = at<const float>(grad) + column;
        products.push_back({B, in, n, {part, total, 1}, {at<const float>(scaled) + column * in, in, 1},
                            at<float>(of_x) + g * B * in, in});
        products.push_back({n, in, B, {part, 1, total}, {at<const float>(x) + g * B * in, in, 1},
                            at<float>(of_weight) + column * in, in});
        column += n;
    }
    run(products, threads);
    kernels().column_sums(at<const float>(grad), B, total, total, at<float>(of_bias));
    column = 0;
    for (Index g = 0; g < static_cast<Index>(sizes.size()); ++g) {
        const float *factors = at<const float>(gain) + g * in, *shifts = at<const float>(shift) + g * in;
        float *gains = at<float>(of_gain) + g * in, *of_shifts = at<float>(of_shift) + g * in;
        std::fill(gains, gains + in, 0.0f);
        std::fill(of_shifts, of_shifts + in, 0.0f);
        for (const Index end = column + sizes[static_cast<std::size_t>(g)]; column < end; ++column) {
            const float *row = at<const float>(weight) + column * in, offset = at<const float>(of_bias)[column];
            float* result = at<float>(of_weight) + column * in;  // still by the scaled weights
            for (Index i = 0; i < in; ++i) {
                gains[i] += result[i] * row[i];
                of_shifts[i] += offset * row[i];
                result[i] = result[i] * factors[i] + offset * shifts[i];
            }
        }
    }
}

constexpr Index kRowsOfATask = 64;

void normalize(std::uintptr_t x, Index rows, Index n, double eps, std::uintptr_t deviation, int threads) {
    const py::gil_scoped_release release;
    parallel_for((rows + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index i) {
        const Index first = i * kRowsOfATask;
        kernels().normalize(at<float>(x) + first * n, std::min(kRowsOfATask, rows - first), n, static_cast<float>(eps),
                            at<float>(deviation) + first);
    });
}

void normalize_backward(std::uintptr_t grad, std::uintptr_t normed, std::uintptr_t deviation, Index rows, Index n,
                        std::uintptr_t of_x, int threads) {
    const py::gil_scoped_release release;
    parallel_for((rows + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index i) {
        const Index first = i * kRowsOfATask;
        kernels().normalize_backward(at<const float>(grad) + first * n, at<const float>(normed) + first * n,
                                     at<const float>(deviation) + first, std::min(kRowsOfATask, rows - first), n,
                                     at<float>(of_x) + first * n);
    });
}

void segments(std::uintptr_t x, Index B, const std::vector<Index>& sizes, std::uintptr_t weight, std::uintptr_t bias,
              double eps, double rate, std::uintptr_t seed, std::uintptr_t normed, std::uintptr_t deviation,
              std::uintptr_t out, int threads) {
    const py::gil_scoped_release release;
    Index total = 0;
    for (const Index n : sizes) total += n;
    const Dropout dropout = dropout_of(rate, seed);
    const float scale = static_cast<float>(rate < 1.0 ? 1.0 / (1.0 - rate) : 0.0);
    parallel_for((B + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index i) {
        kernels().segments(at<const float>(x), i * kRowsOfATask, std::min(B, (i + 1) * kRowsOfATask), total,
                           static_cast<Index>(sizes.size()), sizes.data(), at<const float>(weight),
                           at<const float>(bias), static_cast<float>(eps), dropout, scale, at<float>(normed),
                           at<float>(deviation), at<float>(out));
    });
}

void segments_backward(std::uintptr_t grad, std::uintptr_t normed, std::uintptr_t deviation, Index B,
                       const std::vector<Index>& sizes, std::uintptr_t weight, double rate, std::uintptr_t seed,
                       std::uintptr_t of_x, std::uintptr_t of_weight, std::uintptr_t of_bias, int threads) {
    const py::gil_scoped_release release;
    Index total = 0;
    for (const Index n : sizes) total += n;
    const Dropout dropout = dropout_of(rate, seed);
    const float scale = static_cast<float>(rate < 1.0 ? 1.0 / (1.0 - rate) : 0.0);
    parallel_for((B + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index i) {
        kernels().segments_backward(at<const float>(grad), at<const float>(normed), at<const float>(deviation),
                                    i * kRowsOfATask, std::min(B, (i + 1) * kRowsOfATask), total,
                                    static_cast<Index>(sizes.size()), sizes.data(), at<const float>(weight), dropout,
                                    scale, at<float>(of_x));
    });
    kernels().weighted_column_sums(at<const float>(grad), at<const float>(normed), B, total, at<float>(of_weight),
                                   at<float>(of_bias));
}

// ---- nearest codes

std::vector<Book> books_of(const std::vector<Index>& num_codes, const std::vector<Index>& dims) {
    std::vector<Book> books;
    Book next{0, 0, 0, 0, 0};
    for (std::size_t g = 0; g < dims.size(); ++g) {
        next.dims = dims[g];
        next.codes = num_codes[g];
        books.push_back(next);
        next.first_column += dims[g];
        next.first_code += num_codes[g];
        next.first_entry += num_codes[g] * dims[g];
    }
    return books;
}

void assign(std::uintptr_t z, Index z_row, Index N, std::uintptr_t codebook, std::uintptr_t mask, bool centred,
            const std::vector<Index>& num_codes, const std::vector<Index>& dims, std::uintptr_t codes,
            std::uintptr_t quantized, std::uintptr_t error, std::uintptr_t counts, std::uintptr_t sums, int threads) {
    const py::gil_scoped_release release;
    const Kernels& k = kernels();
    const std::vector<Book> books = books_of(num_codes, dims);
    AssignTask task{};
    task.z = at<const float>(z), task.z_row = z_row, task.codebook = at<const float>(codebook);
    task.mask = at<const std::uint8_t>(mask), task.centred = centred;
    task.codes = at<std::int64_t>(codes), task.quantized = at<float>(quantized);
    task.G = static_cast<Index>(books.size());
    constexpr Index kRows = 512;
    const Index most = std::min(kRows, N), blocks = (N + kRows - 1) / kRows;
    Index partial = 0, buffer = 0;
    for (const Book& b : books) {
        task.total_dims += b.dims;
        partial = std::max(partial, k.partial_floats(most, b.codes, b.dims));
        buffer = std::max(buffer, k.nearest_buffer_floats(most, b.codes, b.dims));
    }
    const Workspaces spaces(partial, buffer);
    parallel_for(task.G * blocks, threads, [&](Index i) {
        AssignTask mine = task;
        mine.g = i / blocks;
        mine.book = books[static_cast<std::size_t>(mine.g)];
        mine.first = i % blocks * kRows;
        mine.last = std::min(N, mine.first + kRows);
        k.nearest(mine, spaces.here());
    });
    parallel_for(task.G, threads, [&](Index g) {
        AssignTask mine = task;
        mine.g = g;
        mine.book = books[static_cast<std::size_t>(g)];
        mine.last = N;
        float* count = counts ? at<float>(counts) + mine.book.first_code : nullptr;
        float* sum = counts ? at<float>(sums) + mine.book.first_entry : nullptr;
        at<float>(error)[g] = static_cast<float>(k.tally(mine, count, sum));
    });
}

// grad + 2 of_error_g (z - quantized), without the second term where there is no code.
void assign_backward(std::uintptr_t grad, std::uintptr_t of_error, std::uintptr_t z, std::uintptr_t quantized,
                     std::uintptr_t codes, Index N, const std::vector<Index>& dims, std::uintptr_t of_z, int threads) {
    const py::gil_scoped_release release;
    const Index G = static_cast<Index>(dims.size());
    Index total = 0;
    for (const Index d : dims) total += d;
    parallel_for((N + kRowsOfATask - 1) / kRowsOfATask, threads, [&](Index task) {
        for (Index i = task * kRowsOfATask; i < std::min(N, (task + 1) * kRowsOfATask); ++i) {
            const float *upstream = at<const float>(grad) + i * total, *row = at<const float>(z) + i * total;
            const float* code = at<const float>(quantized) + i * total;
            float* out = at<float>(of_z) + i * total;
            Index c = 0;
            for (Index g = 0; g < G; ++g) {
                const bool none = at<const std::int64_t>(codes)[i * G + g] < 0;
                const float factor = 2.0f * at<const float>(of_error)[g];
                for (const Index end = c + dims[static_cast<std::size_t>(g)]; c < end; ++c)
                    out[c] = none ? upstream[c] : upstream[c] + factor * (row[c] - code[c]);
            }
        }
    });
}

// ---- partial decoders

template <class Call>
void for_each_decoder(DecoderTask task, const std::vector<Index>& num_codes, const std::vector<Index>& dims, int threads,
                      Call call) {
    const Kernels& k = kernels();
    const std::vector<Book> books = books_of(num_codes, dims);
    task.G = static_cast<Index>(books.size());
    Index partial = 0, buffer = 0;
    task.total_dims = 0;
    for (const Book& b : books) {
        task.total_dims += b.dims;
        buffer = std::max(buffer, k.decoder_buffer_floats(task.B, task.F, task.H, b.codes, b.dims));
        for (const auto& [m, n, depth] : {std::tuple{b.codes, task.H, b.dims}, {b.codes, task.F, task.H},
                                          {b.codes, task.H, task.F}, {task.H, task.F, b.codes},
                                          {b.dims, task.H, b.codes}, {task.F, b.dims, task.H}, {task.B, b.dims, task.F}})
            partial = std::max(partial, k.partial_floats(m + 1, n, depth));
    }
    const Workspaces spaces(partial, buffer);
    parallel_for(task.G, threads, [&](Index g) {
        DecoderTask mine = task;
        mine.g = g;
        mine.book = books[static_cast<std::size_t>(g)];
        call(mine, spaces.here());
    });
}

double decoders_forward(std::uintptr_t x, std::uintptr_t mean, std::uintptr_t codes, std::uintptr_t codebook,
                        std::uintptr_t w1, std::uintptr_t b1, std::uintptr_t w2, std::uintptr_t b2,
                        const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B, Index F, Index H,
                        std::uintptr_t hidden, std::uintptr_t decoded, std::uintptr_t off, int threads) {
    const py::gil_scoped_release release;
    DecoderTask task{};
    task.B = B, task.F = F, task.H = H;
    task.x = at<const float>(x), task.mean = at<const float>(mean), task.codes = at<const std::int64_t>(codes);
    task.codebook = at<const float>(codebook);
    task.w1 = at<const float>(w1), task.b1 = at<const float>(b1);
    task.w2 = at<const float>(w2), task.b2 = at<const float>(b2);
    task.hidden = at<float>(hidden), task.decoded = at<float>(decoded), task.off = at<float>(off);
    std::vector<double> shares(dims.size());
    for_each_decoder(task, num_codes, dims, threads, [&](const DecoderTask& t, const Workspace& w) {
        shares[static_cast<std::size_t>(t.g)] = kernels().decoder_forward(t, w);
    });
    double loss = 0.0;
    for (const double share : shares) loss += share;
    double scatter = 0.0;
    for (Index i = 0; i < B * F; ++i) scatter += static_cast<double>(task.x[i]) * static_cast<double>(task.x[i]);
    const auto groups = static_cast<double>(dims.size());
    for (Index i = 0; i < B * static_cast<Index>(dims.size()); ++i)
        if (task.codes[i] < 0) return std::numeric_limits<double>::quiet_NaN();
    return (loss + groups * scatter) / (groups * static_cast<double>(B * F));
}

void decoders_backward(double scale, std::uintptr_t x, std::uintptr_t codes, std::uintptr_t codebook, std::uintptr_t w1,
                       std::uintptr_t w2, const std::vector<Index>& num_codes, const std::vector<Index>& dims, Index B,
                       Index F, Index H, std::uintptr_t hidden, std::uintptr_t decoded, std::uintptr_t off,
                       std::uintptr_t of_quantized, std::uintptr_t of_w1, std::uintptr_t of_b1, std::uintptr_t of_w2,
                       std::uintptr_t of_b2, int threads) {
    const py::gil_scoped_release release;
    DecoderTask task{};
    task.B = B, task.F = F, task.H = H;
    task.x = at<const float>(x), task.codes = at<const std::int64_t>(codes), task.codebook = at<const float>(codebook);
    task.w1 = at<const float>(w1), task.w2 = at<const float>(w2);
    task.hidden = at<float>(hidden), task.decoded = at<float>(decoded), task.off = at<float>(off);
    task.of_quantized = at<float>(of_quantized);
    task.of_w1 = at<float>(of_w1), task.of_b1 = at<float>(of_b1);
    task.of_w2 = at<float>(of_w2), task.of_b2 = at<float>(of_b2);
    task.scale = static_cast<float>(scale);
    for_each_decoder(task, num_codes, dims, threads,
                     [&](const DecoderTask& t, const Workspace& w) { kernels().decoder_backward(t, w); });
}

// ---- topographic correlations

constexpr Index kWidth = 32;  // a multiple of every instruction set's columns

Index padded(Index n, Index to) { return (n + to - 1) / to * to; }

// Points with the memory that their distances need.
struct OwnedPoints {
    std::vector<Index> first, dims;
    Floats& memory;
    Points points;

    OwnedPoints(const float* p, Index S, Index row, std::vector<Index> sizes, Floats& space)
        : dims(std::move(sizes)), memory(space) {
        Index column = 0;
        for (const Index d : dims) {
            first.push_back(column);
            column += d;
        }
        const Index wide = padded(S, kWidth), groups = static_cast<Index>(dims.size());
        float* panels = memory.reserve(wide * (column + groups));
        points = {p, S, row, groups, first.data(), dims.data(), panels, panels + wide * column, wide};
    }
};

// Sums over the pairs i < j.
struct Moments {
    double mean[3], square[3], pre, post;
};

// d_x, d_z, d_e are [S, wide], above the diagonal.
Moments moments_of(const float* const d[3], Index S, Index wide) {
    const Kernels& k = kernels();
    Moments m{};
    const double pairs = std::max(1.0, 0.5 * static_cast<double>(S) * static_cast<double>(S - 1));
    for (Index i = 0; i < S; ++i) {
        const float* const row[3] = {d[0] + i * wide, d[1] + i * wide, d[2] + i * wide};
        double sums[3];
        k.row_sums(row, i + 1, S, sums);
        for (int which = 0; which < 3; ++which) m.mean[which] += sums[which] / pairs;
    }
    for (Index i = 0; i < S; ++i) {
        const float* const row[3] = {d[0] + i * wide, d[1] + i * wide, d[2] + i * wide};
        double sums[5];
        k.row_moments(row, i + 1, S, m.mean, sums);
        for (int which = 0; which < 3; ++which) m.square[which] += sums[which] / pairs;
        m.pre += sums[3] / pairs;
        m.post += sums[4] / pairs;
    }
    return m;
}

// Whether a variance of float32 distances is more than the rounding of values about their mean.
bool varies(double mean, double variance) {
    const double rounding = 16.0 * std::numeric_limits<float>::epsilon() * mean;
    return variance > std::max(rounding * rounding, static_cast<double>(std::numeric_limits<float>::min()));
}

// Returns the correlations and, for the backward pass, the factors of d_x - mean, d_z - mean, d_e - mean in the
// gradients of both correlations by d_z and by d_e, and the means. `distances` [3, S, wide] is written.
std::tuple<double, double, std::vector<double>> topo_forward(std::uintptr_t x, Index F, std::uintptr_t z,
                                                             std::uintptr_t codes, std::uintptr_t codebook, Index S,
                                                             const std::vector<Index>& num_codes,
                                                             const std::vector<Index>& dims, std::uintptr_t distances,
                                                             std::uintptr_t tables, bool missing, int threads) {
    const py::gil_scoped_release release;
    const Kernels& k = kernels();
    const Index G = static_cast<Index>(dims.size()), wide = padded(S, kWidth);
    Index total = 0;
    for (const Index d : dims) total += d;
    thread_local Floats feature_memory, latent_memory;
    const OwnedPoints features(at<const float>(x), S, F, {F}, feature_memory);
    const OwnedPoints latents(at<const float>(z), S, total, dims, latent_memory);
    float* d[3];
    for (int i = 0; i < 3; ++i) d[i] = at<float>(distances) + i * S * wide;
    const std::vector<Book> books = books_of(num_codes, dims);
    std::vector<Index> first_entry(books.size());
    for (std::size_t g = 1; g < books.size(); ++g)
        first_entry[g] = first_entry[g - 1] + num_codes[g - 1] * num_codes[g - 1];
    parallel_for(2 * G + 1, threads, [&](Index i) {
        if (i == 2 * G) {
            k.pack_points(features.points, 0);
        } else if (i % 2 == 0) {
            k.pack_points(latents.points, i / 2);
        } else {
            const Book& b = books[static_cast<std::size_t>(i / 2)];
            k.code_distances(at<const float>(codebook) + b.first_entry, b.codes, b.dims,
                             at<float>(tables) + first_entry[static_cast<std::size_t>(i / 2)]);
        }
    });
    const Workspaces spaces(0, 0);
    const Index blocks = (S + k.rows - 1) / k.rows;
    parallel_for(2 * blocks + blocks, threads, [&](Index task) {
        const Index i = task / 3, first = i * k.rows;
        if (task % 3 == 0) {
            k.distances(latents.points, first, d[1], wide, spaces.here());
        } else if (task % 3 == 1) {
            k.distances(features.points, first, d[0], wide, spaces.here());
        } else {
            const auto* all = at<const std::int32_t>(codes);  // [G, S]
            for (Index r = first; r < std::min(S, first + k.rows); ++r) {
                float* out = d[2] + r * wide;
                std::fill(out, out + wide, 0.0f);
                for (Index g = 0; g < G; ++g) {
                    const auto& b = books[static_cast<std::size_t>(g)];
                    const float* table = at<const float>(tables) + first_entry[static_cast<std::size_t>(g)];
                    k.add_lookup(table + all[g * S + r] * b.codes, b.codes, all + g * S, r + 1, S, out);
                }
                for (Index j = r + 1; j < S; ++j) out[j] /= static_cast<float>(G);
            }
        }
    });
    const Moments m = moments_of(d, S, wide);
    const float* norms = latents.points.norms;
    const bool finite = std::all_of(norms, norms + G * wide, [](float norm) { return std::isfinite(norm); });
    const bool pre_counts = finite && varies(m.mean[0], m.square[0]) && varies(m.mean[1], m.square[1]);
    const bool post_counts = finite && !missing && varies(m.mean[1], m.square[1]) && varies(m.mean[2], m.square[2]);
    const double sx = std::sqrt(m.square[0]), sz = std::sqrt(m.square[1]), se = std::sqrt(m.square[2]);
    const double pre = pre_counts ? m.pre / (sx * sz) : 0.0, post = post_counts ? m.post / (sz * se) : 0.0;
    // dr/db_ij = (a_ij / (s_a s_b) - r b_ij / s_b^2) / pairs for centred a, b.
    std::vector<double> factors(9, 0.0);
    if (pre_counts) {
        factors[0] = 1.0 / (sx * sz);
        factors[1] = -pre / (sz * sz);
    }
    if (post_counts) {
        factors[2] = 1.0 / (sz * se);
        factors[3] = -post / (sz * sz);
        factors[4] = 1.0 / (sz * se);
        factors[5] = -post / (se * se);
    }
    std::copy(m.mean, m.mean + 3, factors.begin() + 6);
    return {pre, post, factors};
}

void topo_backward(double of_pre, double of_post, const std::vector<double>& factors, std::uintptr_t z,
                   std::uintptr_t codes, std::uintptr_t codebook, Index S, const std::vector<Index>& num_codes,
                   const std::vector<Index>& dims, std::uintptr_t distances, std::uintptr_t tables, std::uintptr_t of_z,
                   int threads) {
    const py::gil_scoped_release release;
    const Kernels& k = kernels();
    const Index G = static_cast<Index>(dims.size()), wide = padded(S, kWidth);
    Index total = 0;
    for (const Index d : dims) total += d;
    thread_local Floats latent_memory, of_dz, of_de;
    const OwnedPoints latents(at<const float>(z), S, total, dims, latent_memory);
    const float* d[3];
    for (int i = 0; i < 3; ++i) d[i] = at<const float>(distances) + i * S * wide;
    // Each pair once; the mean over codebooks.
    const double share = 2.0 / (std::max(1.0, static_cast<double>(S) * static_cast<double>(S - 1)) * static_cast<double>(G));
    PairWeights weights{};
    for (int i = 0; i < 3; ++i) weights.d[i] = d[i], weights.mean[i] = factors[static_cast<std::size_t>(6 + i)];
    weights.S = S, weights.wide = wide;
    weights.z_by_x = share * of_pre * factors[0];
    weights.z_by_z = share * (of_pre * factors[1] + of_post * factors[3]);
    weights.z_by_e = share * of_post * factors[2];
    weights.e_by_z = share * of_post * factors[4];
    weights.e_by_e = share * of_post * factors[5];
    weights.of_z = of_dz.reserve(S * wide), weights.of_e = of_de.reserve(S * wide);
    const Index blocks = (S + kPairBlock - 1) / kPairBlock;
    parallel_for(blocks + G, threads, [&](Index task) {
        if (task < blocks)
            k.pair_weights(weights, task * kPairBlock);
        else
            k.pack_points(latents.points, task - blocks);
    });
    const std::vector<Book> books = books_of(num_codes, dims);
    Index buffer = 0, partial = 0;
    std::vector<Index> first_entry(books.size());
    for (std::size_t g = 0; g < books.size(); ++g) {
        if (g) first_entry[g] = first_entry[g - 1] + num_codes[g - 1] * num_codes[g - 1];
        buffer = std::max({buffer, k.pull_buffer_floats(S, wide, dims[g]), k.pull_codes_buffer_floats(S, num_codes[g], dims[g])});
        partial = std::max({partial, k.partial_floats(4 * k.rows, dims[g], S), k.partial_floats(S, dims[g], num_codes[g])});
    }
    const Workspaces spaces(partial, buffer);
    const bool with_codes = of_post != 0.0 && factors[4] != 0.0;
    parallel_for(G, threads, [&](Index g) {
        const Book& b = books[static_cast<std::size_t>(g)];
        float* out = at<float>(of_z) + b.first_column;
        k.pull(latents.points, g, weights.of_z, wide, out, total, spaces.here());
        if (with_codes)
            k.pull_codes(at<const float>(tables) + first_entry[static_cast<std::size_t>(g)],
                         at<const float>(codebook) + b.first_entry, b.codes, b.dims, at<const std::int32_t>(codes) + g * S,
                         S, weights.of_e, wide, out, total, spaces.here());
    });
}

}  // namespace

void register_training(py::module_& module) {
    module.def("use_openmp", &use_openmp);
    module.def("training_levels", &training::levels_here);
    module.def("use_training_level", [](const std::string& level) {
        if (!training::runs_here(level)) throw py::value_error("not an instruction set of this processor: " + level);
        training::chosen.store(&training::kernels_of(level));
    });
    module.def("mlp_forward", &mlp_forward);
    module.def("mlp_backward", &mlp_backward);
    module.def("output_linear", &output_linear);
    module.def("output_linear_backward", &output_linear_backward);
    module.def("normalize", &normalize);
    module.def("normalize_backward", &normalize_backward);
    module.def("segments", &segments);
    module.def("segments_backward", &segments_backward);
    module.def("assign", &assign);
    module.def("assign_backward", &assign_backward);
    module.def("decoders_forward", &decoders_forward);
    module.def("decoders_backward", &decoders_backward);
    module.def("topo_forward", &topo_forward);
    module.def("topo_backward", &topo_backward);
}

}  // namespace spinlock_fast
