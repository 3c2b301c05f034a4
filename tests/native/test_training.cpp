// Every CPU operation: writes within its memory, gives bit-equal results for any number of threads, and results equal up
// to rounding for all instruction sets.
#include <cstdio>
#include <functional>

#include "instruction_sets.hpp"
#include "training_cases.hpp"

using namespace spinlock_fast;
using namespace spinlock_fast::testing;

namespace {

// Equal within 1e-4 of the largest value of an array: rounding of sums of a few hundred products of values near 1.
bool close(const Results& a, const Results& b) {
    for (std::size_t i = 0; i < a.size(); ++i) {
        float largest = 1.0f;
        for (const float x : a[i])
            if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
        for (std::size_t j = 0; j < a[i].size(); ++j) {
            if (std::isnan(a[i][j]) && std::isnan(b[i][j])) continue;
            if (!(std::abs(a[i][j] - b[i][j]) <= 1e-4f * largest)) return false;
        }
    }
    return true;
}

bool all_finite(const Results& found) {
    for (const Floats& values : found)
        for (const float x : values)
            if (!std::isfinite(x)) return false;
    return true;
}

using Operation = std::function<Results(const Shape&, int)>;

struct Named {
    const char* name;
    Operation run;
};

std::vector<Named> operations() {
    std::vector<Named> all;
    for (const bool with_inputs : {false, true})
        for (const bool transposed : {false, true})
            all.push_back({"two_layers", [=](const Shape& s, int threads) {
                               return two_layers(s, threads, with_inputs, transposed);
                           }});
    all.push_back({"projections", projections});
    for (const bool centered : {false, true})
        all.push_back(
            {"nearest", [=](const Shape& s, int threads) { return nearest(s, threads, centered, centered); }});
    for (const bool cosine : {false, true})
        for (const int gradient : {0, 1, 2})
            all.push_back(
                {"residual", [=](const Shape& s, int threads) { return residual(s, threads, cosine, gradient); }});
    for (const bool cosine : {false, true})
        all.push_back({"step", [=](const Shape& s, int threads) { return quantize_step(s, threads, cosine); }});
    for (const bool with_rows : {false, true})
        all.push_back({"decoders", [=](const Shape& s, int threads) { return decoders(s, threads, with_rows); }});
    all.push_back({"code network", code_network});
    for (const bool with_cost : {false, true})
        for (const bool with_linear : {false, true})
            all.push_back({"joint search", [=](const Shape& s, int threads) {
                               return joint_search(s, threads, with_cost, with_linear);
                           }});
    all.push_back({"topographic", topographic});
    return all;
}

// From one row and column, over sizes next to vector and tile sizes, to depths of several blocks.
std::vector<Shape> shapes() {
    return {
        {1, 1, 1, 1, {1}, {1}, {1}, {1}, false, 0.0},
        {2, 3, 5, 2, {1, 2}, {2, 3}, {2, 1}, {1, 2}, true, 0.5},
        {67, 33, 64, 47, {1, 17, 5}, {9, 31, 16}, {33, 4, 17}, {3, 17, 33}, false, 0.25},
        {130, 65, 17, 70, {31, 2}, {33, 1}, {40, 7}, {16, 5}, true, 0.0},
        {520, 24, 64, 20, {520, 3}, {20, 13}, {70, 5}, {20, 4}, true, 0.1},
        {20, 530, 33, 10, {5, 3}, {4, 9}, {20, 5}, {9, 4}, false, 0.1},
    };
}

}  // namespace

int main() {
    const auto levels = supported_instruction_sets();  // the last one is portable
    for (const Shape& shape : shapes())
        for (const Named& operation : operations()) {
            use_instruction_set(levels.back());
            const Results expected = operation.run(shape, 1);
            if (!shape.missing) CHECK(all_finite(expected) && "all results are written");
            for (const std::string& level : levels) {
                use_instruction_set(level);
                const Results found = operation.run(shape, 1);
                if (!close(expected, found))
                    std::fprintf(stderr, "%s of %lld rows, %s\n", operation.name, static_cast<long long>(shape.rows),
                                 level.c_str());
                CHECK(close(expected, found));
                CHECK(same_bits(found, operation.run(shape, 3)));
            }
        }
    std::printf("%zu instruction sets, %zu operations, %zu shapes\n", levels.size(), operations().size(),
                shapes().size());
    return 0;
}
