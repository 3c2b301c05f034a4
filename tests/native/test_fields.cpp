// Operations on fields, in memory of exactly their sizes: every value is written, and all instruction sets give equal
// bits; the convolution gives them for those with fused multiplication and addition, and close values for the other.
#include <cmath>
#include <cstdio>
#include <functional>

#include "check.hpp"
#include "field_operations.hpp"
#include "instruction_sets.hpp"

using namespace spinlock_fast;
using namespace spinlock_fast::testing;
using simulate::Index;

namespace {

using Results = std::vector<Floats>;

struct Operation {
    const char* name;
    std::function<Results()> run;
    bool fused = false;  // products and sums may be contracted
};

Operation convolution(Index M, Index in, Index out_channels, Index G, Index k, bool scaled) {
    return {"torus_convolution",
            [=] {
                const Floats x = normal(M * in * G * G, 1), scale = normal(scaled ? M * in : 0, 2),
                             weight = normal(k * k * in * out_channels, 3), bias = normal(out_channels, 4);
                Results out{unwritten(M * out_channels * G * G)};
                simulate::torus_convolution(address(x), address(scale), address(weight), address(bias), M, in,
                                            out_channels, G, k, address(out[0]));
                return out;
            },
            true};
}

// The convolution by its formula, in float64.
Floats convolved(Index in, Index out_channels, Index G, Index k) {
    const Floats x = normal(in * G * G, 1), scale = normal(in, 2), weight = normal(k * k * in * out_channels, 3),
                 bias = normal(out_channels, 4);
    const auto at = [](const Floats& values, Index i) {
        return static_cast<double>(values[static_cast<std::size_t>(i)]);
    };
    Floats out;
    for (Index o = 0; o < out_channels; ++o)
        for (Index p = 0; p < G * G; ++p) {
            double sum = at(bias, o);
            for (Index tap = 0; tap < k * k; ++tap) {
                const Index row = (p / G + tap / k - k / 2 + G) % G, column = (p % G + tap % k - k / 2 + G) % G;
                for (Index c = 0; c < in; ++c)
                    sum += at(weight, (tap * in + c) * out_channels + o) * at(scale, c) *
                           at(x, (c * G + row) * G + column);
            }
            out.push_back(static_cast<float>(sum));
        }
    return out;
}

std::vector<Operation> operations() {
    std::vector<Operation> all;
    for (Index channels = 1; channels <= 13; channels += 3)
        for (const Index G : {Index{32}, Index{96}})
            all.push_back(convolution(2, channels == 1 ? 3 : channels, channels, G, channels % 2 ? 3 : 5, channels > 1));
    for (const Index channels : {2, 4, 7, 9, 31})
        for (const Index n : {0, 4, 60, 1024, 9216})
            all.push_back({"channel_sums", [=] {
                               const Floats x = normal(2 * channels * n, 1);
                               Results out{unwritten(2 * channels), unwritten(2 * channels)};
                               simulate::channel_sums(address(x), 2, channels, n, address(out[0]), address(out[1]));
                               return out;
                           }});
    for (const Index n : {0, 1, 17, 4099})
        all.push_back({"confined_step", [=] {
                           const Floats u = normal(n, 1), f = normal(n, 2), noise = normal(n, 3);
                           Results out{unwritten(n)};
                           simulate::confined_step(address(u), address(f), address(noise), n, 0.9f, 0.3f, 0.5f, 1.2f,
                                                   address(out[0]));
                           return out;
                       }});
    for (const Index n : {0, 1, 33, 530})
        all.push_back({"split_complex", [=] {
                           const Floats values = normal(2 * n, 1);
                           Results out{unwritten(n), unwritten(n), unwritten(n)};
                           simulate::split_complex(address(values), n, address(out[0]), address(out[1]),
                                                   address(out[2]));
                           return out;
                       }});
    for (const Index G : {1, 2, 12, 32, 66}) {
        const Floats fields = normal(3 * G * G, 1), mean = normal(3, 2);
        all.push_back({"squared_gradients", [=] {
                           Results out{unwritten(3 * G * G)};
                           simulate::squared_gradients(address(fields), 3, G, address(out[0]));
                           return out;
                       }});
        all.push_back({"interfaces_and_extremes", [=] {
                           Results out{unwritten(3), unwritten(3), unwritten(3)};
                           simulate::interfaces_and_extremes(address(fields), address(mean), 3, G, address(out[0]),
                                                             address(out[1]), address(out[2]));
                           return out;
                       }});
        const Index scale = G % 2 ? 1 : 2;
        all.push_back({"block_means", [=] {
                           Results out{unwritten(3 * (G / scale) * (G / scale))};
                           simulate::block_means(address(fields), 3, G, scale, address(out[0]));
                           return out;
                       }});
    }
    return all;
}

// Equal up to rounding of a few hundred products of values near 1.
bool close(const Floats& a, const Floats& b) {
    for (std::size_t i = 0; i < a.size(); ++i)
        if (!(std::abs(a[i] - b[i]) <= 1e-4f)) return false;
    return a.size() == b.size();
}

void check_sizes() {
    CHECK_THROWS(std::invalid_argument, "sizes", simulate::torus_convolution(0, 0, 0, 0, 1, 3, 3, 33, 3, 0));
    CHECK_THROWS(std::invalid_argument, "sizes", simulate::torus_convolution(0, 0, 0, 0, 1, 3, 3, 32, 4, 0));
    CHECK_THROWS(std::invalid_argument, "sizes", simulate::channel_sums(0, 1, 2, 6, 0, 0));
    CHECK_THROWS(std::invalid_argument, "sizes", simulate::squared_gradients(0, 1, 0, 0));
    CHECK_THROWS(std::invalid_argument, "sizes", simulate::block_means(0, 1, 30, 4, 0));
    CHECK_THROWS(std::invalid_argument, "processor", use_instruction_set("abacus"));
}

}  // namespace

int main() {
    const auto sets = supported_instruction_sets();  // the last one is portable
    const auto all = operations();
    for (const Operation& operation : all) {
        Results first;
        for (const std::string& set : sets) {
            use_instruction_set(set);
            const Results found = operation.run();
            for (const Floats& values : found)
                for (const float x : values) CHECK(std::isfinite(x) && "every value is written");
            if (first.empty()) first = found;
            const bool equal = operation.fused && set == "portable" ? close(first[0], found[0]) : same_bits(first, found);
            if (!equal) std::fprintf(stderr, "%s of %s\n", operation.name, set.c_str());
            CHECK(equal);
        }
    }
    for (const std::string& set : sets) {
        use_instruction_set(set);
        CHECK(close(convolution(1, 5, 8, 32, 5, true).run()[0], convolved(5, 8, 32, 5)));
    }
    check_sizes();
    std::printf("%zu instruction sets, %zu operations\n", sets.size(), all.size());
    return 0;
}
