// Cosines between the codes of a codebook; called by kernels/code_cosines.
#include <algorithm>
#include <vector>

#include "codebook_layout.hpp"
#include "kernels.hpp"
#include "operations.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace spinlock_fast::training {

// Mean over codebooks of the mean squared cosine between distinct codes; 0 for a codebook of one code.
double code_cosines(Address codebook, const std::vector<Index>& num_codes, const std::vector<Index>& dims,
                    int threads) {
    const std::vector<CodebookSlice> slices = codebook_slices(num_codes, dims);
    Index partial = 0, buffer = 0;
    for (const CodebookSlice& s : slices) {
        partial = std::max(partial, kernels().partial_floats(s.num_codes, s.num_codes, s.dims));
        buffer = std::max(buffer, s.num_codes * s.dims);
    }
    const Workspaces workspaces(partial, buffer);
    std::vector<double> means(slices.size());
    parallel_for(static_cast<Index>(slices.size()), threads, [&](Index g) {
        const CodebookSlice& s = slices[static_cast<std::size_t>(g)];
        const double sum = kernels().squared_cosines(pointer<const float>(codebook) + s.first_entry, s.num_codes,
                                                     s.dims, workspaces.for_this_thread());
        means[static_cast<std::size_t>(g)] = sum / std::max(1.0, static_cast<double>(s.num_codes * (s.num_codes - 1)));
    });
    double total = 0.0;
    for (const double mean : means) total += mean;
    return total / static_cast<double>(std::max<std::size_t>(means.size(), 1));
}

}  // namespace spinlock_fast::training
