// Joint search of codes: one codebook after the other takes the code that minimises the squared error
// |relu(s) W2 - y|^2 of a row with hidden sums s = b1 + sum_g T_g[k_g] and target y. With the change d of the hidden
// values, the Gram matrix G = W2 W2^T and half the gradient c = G relu(s) - W2 y, the error changes by
//   d^T G d + 2 c . d = |d P|^2 + 2 c . d,  P P^T = G.
// The columns of P are principal components of the decoder's output. A sum over the first of them is a lower bound of
// |d P|^2 that rejects most codes: the first kFilter for all codes, with one row per lane; kHead for those that remain,
// and all for the few that still do, both row by row over the nonzeros of d. The result is that of the full search.
// Linear units, after the R hidden units, are what a code adds to the output: change l, without relu. Then the error
// changes by |d W2 + l|^2 + 2 c . (d, l), with |d W2 + l|^2 = d^T G d + 2 d . (l W2^T) + |l|^2 for codes that remain.
#pragma once

#include "product_impl.hpp"

namespace spinlock_fast::SPINLOCK_SIMD {

using training::JointSearchTask;

constexpr Index kFilter = training::kFilterComponents;
constexpr Index kHead = training::kHeadComponents;
constexpr int kFilterValues = 1 + static_cast<int>(kFilter);  // c . relu(s), and the components of relu(s)

Index joint_search_buffer_floats(Index H, Index K) {
    return kLanes * (5 * H + (kFilterValues + 1) * K) + 2 * H + 2 * K;
}

inline Vector relu(Vector v) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_max_ps(reinterpret_cast<__m512>(v), _mm512_setzero_ps()));
#elif defined(__AVX2__)
    return reinterpret_cast<Vector>(_mm256_max_ps(reinterpret_cast<__m256>(v), _mm256_setzero_ps()));
#else
    return v > Vector{} ? v : Vector{};
#endif
}

// Filter values of kCodes codes in kLanes rows. base, gradient: [H, kLanes]; linear_head: [kCodes, kHead] or null;
// out: [kCodes, kFilterValues, kLanes].
template <int kCodes>
inline void filter_codes(const float* base, const float* gradient, Index R, Index H, const float* table,
                         const float* filter, const float* linear_head, float* out) {
    Vector sums[kCodes][kFilterValues] = {};
    for (Index h = 0; h < R; ++h) {
        const Vector s = load(base + h * kLanes), c = load(gradient + h * kLanes);
        const float* components = filter + h * kFilter;
#pragma GCC unroll 4
        for (int i = 0; i < kCodes; ++i) {
            const Vector hidden = relu(s + table[i * H + h]);
            sums[i][0] += c * hidden;
#pragma GCC unroll 4
            for (int j = 1; j < kFilterValues; ++j) sums[i][j] += components[j - 1] * hidden;
        }
    }
    for (Index h = R; h < H; ++h) {
        const Vector c = load(gradient + h * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kCodes; ++i) sums[i][0] += c * table[i * H + h];
    }
    if (linear_head)
        for (int i = 0; i < kCodes; ++i)
            for (int j = 1; j < kFilterValues; ++j) sums[i][j] += linear_head[i * kHead + j - 1];
    for (int i = 0; i < kCodes; ++i)
        for (int j = 0; j < kFilterValues; ++j) store(out + (i * kFilterValues + j) * kLanes, sums[i][j]);
}

// store_panel(column, vector) of sum_h d[h] m[h, :] for kPanel vectors of columns.
template <int kPanel, class Store>
inline void sparse_product(const float* d, Index H, const float* m, Index row, Store store_panel) {
    Vector sum[2][kPanel] = {};  // two chains hide the latency of the additions
    for (Index h0 = 0; h0 < H; h0 += kSkipDepth) {
        const auto add = [&](Vector* chain, Mask left) {
            const Index h = h0 + __builtin_ctzll(left);
#pragma GCC unroll 8
            for (int v = 0; v < kPanel; ++v) chain[v] += d[h] * load(m + h * row + v * kLanes);
        };
        for (Mask left = nonzeros(d + h0, H - h0 < kSkipDepth ? H - h0 : kSkipDepth); left; left &= left - 1) {
            add(sum[0], left);
            left &= left - 1;
            if (!left) break;
            add(sum[1], left);
        }
    }
    for (int v = 0; v < kPanel; ++v) store_panel(v * kLanes, sum[0][v] + sum[1][v]);
}

// The same for `columns` columns, a multiple of 16.
template <class Store>
inline void sparse_product(const float* d, Index H, const float* m, Index row, Index columns, Store store_panel) {
    constexpr int kWide = 4, kNarrow = 16 / kLanes;
    Index j = 0;
    const auto shifted = [&](Index first) { return [=](Index c, Vector v) { store_panel(first + c, v); }; };
    for (; j + kWide * kLanes <= columns; j += kWide * kLanes) sparse_product<kWide>(d, H, m + j, row, shifted(j));
    for (; j < columns; j += kNarrow * kLanes) sparse_product<kNarrow>(d, H, m + j, row, shifted(j));
}

// Squared norm of d m.
inline float sparse_norm(const float* d, Index R, const float* m, Index columns) {
    Vector squares = {};
    sparse_product(d, R, m, columns, columns, [&](Index, Vector v) { squares += v * v; });
    return horizontal_sum(squares);
}

// The same with kHead columns, of d m + to - from; without the last two if they are null.
inline float sparse_head_norm(const float* d, Index R, const float* m, const float* from, const float* to) {
    Vector squares = {};
    sparse_product<kHead / kLanes>(d, R, m, kHead, [&](Index j, Vector v) {
        if (to) v += load(to + j) - load(from + j);
        squares += v * v;
    });
    return horizontal_sum(squares);
}

// The search of up to kLanes rows.
class RowSearch {
public:
    RowSearch(const JointSearchTask& task, Index first, Index rows, float* buffer)
        : t(task),
          first_(first),
          rows_(rows),
          base(buffer),
          gradient(base + kLanes * t.H),
          base_t(gradient + kLanes * t.H),
          gradient_t(base_t + kLanes * t.H),
          filtered(gradient_t + kLanes * t.H),
          bounds(filtered + kLanes * kFilterValues * t.max_codes),
          change(bounds + kLanes * t.max_codes),
          best_change(change + t.H),
          survivors(reinterpret_cast<std::int32_t*>(best_change + t.H)) {}

    // One sweep over the codebooks; returns whether any code changed.
    bool sweep() {
        bool any = false, moved = true;
        for (Index g = 0; g < t.G; ++g) {
            filter(g, moved);
            moved = false;
            for (Index i = 0; i < rows_; ++i) moved |= improve(g, i);
            any |= moved;
        }
        return any;
    }

private:
    float* sums(Index i) const { return t.sums + (first_ + i) * t.H; }
    float* row_gradient(Index i) const { return t.gradient + (first_ + i) * t.H; }
    std::int64_t& code(Index g, Index i) const { return t.codes[(first_ + i) * t.G + g]; }
    const float* table(Index g, Index k) const { return t.tables + (t.first_code[g] + k) * t.H; }
    const float* linear_head(Index g, Index k) const {
        return t.linear_head ? t.linear_head + (t.first_code[g] + k) * kHead : nullptr;
    }
    const float* linear_gradient(Index g, Index k) const { return t.linear_gradient + (t.first_code[g] + k) * t.R; }

    // Lower bounds [K, kLanes] of the changes of the error for all codes of codebook g. Missing rows repeat row 0.
    void filter(Index g, bool moved) {
        const Index H = t.H, K = t.num_codes[g];
        for (Index i = 0; i < kLanes; ++i) {
            const Index row = i < rows_ ? i : 0;
            const float *s = sums(row), *own = table(g, code(g, row));
            for (Index h = 0; h < H; h += kLanes) store(base + i * H + h, load(s + h) - load(own + h));
            if (moved)
                std::memcpy(gradient + i * H, row_gradient(row), static_cast<std::size_t>(H) * sizeof(float));
        }
        transpose(base, H, H, kLanes, base_t, kLanes);
        if (moved) transpose(gradient, H, H, kLanes, gradient_t, kLanes);
        constexpr int kCodes = kLanes == 16 ? 4 : 2;
        Index k = 0;
        for (; k + kCodes <= K; k += kCodes)
            filter_codes<kCodes>(base_t, gradient_t, t.R, H, table(g, k), t.filter, linear_head(g, k),
                                 values(k));
        for (; k < K; ++k)
            filter_codes<1>(base_t, gradient_t, t.R, H, table(g, k), t.filter, linear_head(g, k), values(k));
        Vector own[kFilterValues];
        for (int j = 0; j < kFilterValues; ++j)
            for (Index i = 0; i < kLanes; ++i) own[j][i] = values(code(g, i < rows_ ? i : 0))[j * kLanes + i];
        for (k = 0; k < K; ++k) {
            Vector bound = 2.0f * (load(values(k)) - own[0]);
            for (int j = 1; j < kFilterValues; ++j) {
                const Vector d = load(values(k) + j * kLanes) - own[j];
                bound += d * d;
            }
            store(bounds + k * kLanes, bound);
        }
    }

    float* values(Index k) const { return filtered + k * kFilterValues * kLanes; }

    // Gives row i the best code of codebook g; returns whether it changed.
    bool improve(Index g, Index i) {
        const Index H = t.H, K = t.num_codes[g], own = code(g, i);
        float least = -t.tolerance[first_ + i];
        const float* cost = t.cost ? t.cost + (first_ + i) * t.total_codes + t.first_code[g] : nullptr;
        const auto added_cost = [&](Index k) { return cost ? cost[k] - cost[own] : 0.0f; };
        Index count = 0, best = -1;
        for (Index k = 0; k < K; ++k) {
            float& bound = bounds[k * kLanes + i];
            if (cost) bound += added_cost(k);
            if (bound < least && k != own) survivors[count++] = static_cast<std::int32_t>(k);
        }
        const auto bound = [&](Index n) { return bounds[survivors[n] * kLanes + i]; };
        while (count > 0) {  // in the order of the bounds, the lowest index of equal ones first
            Index next = 0;
            for (Index n = 1; n < count; ++n)
                if (bound(n) < bound(next)) next = n;
            if (!(bound(next) < least)) break;
            const Index k = survivors[next];
            for (Index n = next; n + 1 < count; ++n) survivors[n] = survivors[n + 1];
            --count;
            const float error = error_change(g, i, k, added_cost(k), least);
            if (!(error < least)) continue;
            least = error;
            best = k;
            float* exchanged = change;
            change = best_change;
            best_change = exchanged;
        }
        if (best < 0) return false;
        const float *from = table(g, own), *to = table(g, best);
        float *s = sums(i), *c = row_gradient(i);
        for (Index h = 0; h < t.R; h += kLanes) store(s + h, load(s + h) - load(from + h) + load(to + h));
        const auto add = [&](Index j, Vector v) { store(c + j, load(c + j) + v); };
        sparse_product(best_change, t.R, t.gram, H, H, add);
        if (t.linear_gradient) {
            const float *before = linear_gradient(g, own), *after = linear_gradient(g, best);
            for (Index h = 0; h < t.R; h += kLanes) add(h, load(after + h) - load(before + h));
        }
        for (Index h = t.R; h < H; h += kLanes) add(h, load(best_change + h));
        code(g, i) = best;
        return true;
    }

    // Change of the error and cost of row i with code k, or a lower bound that is not below `least`; sets `change`.
    float error_change(Index g, Index i, Index k, float added_cost, float least) {
        const Index H = t.H, R = t.R;
        const float *s = sums(i), *c = row_gradient(i), *from = base + i * H, *to = table(g, k);
        Vector product = {};
        for (Index h = 0; h < R; h += kLanes) {
            const Vector d = relu(load(from + h) + load(to + h)) - relu(load(s + h));
            store(change + h, d);
            product += d * load(c + h);
        }
        for (Index h = R; h < H; h += kLanes) {  // the sums of linear units are zero
            const Vector d = load(from + h) + load(to + h);
            store(change + h, d);
            product += d * load(c + h);
        }
        const Index own = code(g, i);
        const float offset = added_cost + 2.0f * horizontal_sum(product);
        const float bound = offset + sparse_head_norm(change, R, t.head, linear_head(g, own), linear_head(g, k));
        if (!(bound < least)) return bound;
        if (!t.linear_gradient) return bound + sparse_norm(change, R, t.tail, t.tail_columns);
        const float *before = linear_gradient(g, own), *after = linear_gradient(g, k);
        Vector norm = {};
        sparse_product(change, R, t.gram, H, R, [&](Index j, Vector v) {
            norm += load(change + j) * (v + 2.0f * (load(after + j) - load(before + j)));
        });
        for (Index h = R; h < H; h += kLanes) norm += load(change + h) * load(change + h);
        return offset + horizontal_sum(norm);
    }

    const JointSearchTask& t;
    Index first_, rows_;
    float *base, *gradient;      // [kLanes, H] hidden sums without codebook g, and gradients, of the rows
    float *base_t, *gradient_t;  // the same, [H, kLanes]
    float* filtered;             // [K, kFilterValues, kLanes]
    float* bounds;               // [K, kLanes]
    float *change, *best_change;  // [H]
    std::int32_t* survivors;      // [K]
};

// Searches the codes of rows [first, last), until nothing changes or for the number of sweeps.
void joint_search_rows(const JointSearchTask& t, Index first, Index last, const Workspace& w) {
    for (Index i = first; i < last; i += kLanes) {
        RowSearch search(t, i, last - i < kLanes ? last - i : kLanes, w.buffer);
        for (Index n = 0; n < t.sweeps && search.sweep(); ++n) {
        }
    }
}

}  // namespace spinlock_fast::SPINLOCK_SIMD
