// SPDX-License-Identifier: Apache-2.0
#include "overlap.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "dtypes.h"

namespace carafepp {
namespace {

// Both questions are: has  sum of coefficient[k] * x[k] = target  a solution with 0 <= x[k] <= bound[k], coefficients
// positive? A search from the largest coefficient down answers it. For slices of dense arrays, each coefficient exceeds
// all that the smaller ones can add up to. So there are one or two values to try at each step.
class BoundedSum {
public:
    void add(int64_t coefficient, int64_t bound) {
        if (coefficient == 0 || bound <= 0) return;
        for (int k = 0; k < count_; k++) {
            if (terms_[k].coefficient == coefficient) {  // x + y with bounds m and n takes every value to m + n
                terms_[k].bound += bound;
                return;
            }
        }
        terms_[count_++] = {coefficient, bound, 0, 0};
    }

    bool reaches(int64_t target) {
        std::sort(terms_, terms_ + count_, [](const Term& a, const Term& b) { return a.coefficient > b.coefficient; });
        int64_t reach = 0, divisor = 0;
        for (int k = count_ - 1; k >= 0; k--) {
            terms_[k].reach_below = reach;
            terms_[k].divisor_below = divisor;
            reach += terms_[k].coefficient * terms_[k].bound;
            divisor = std::gcd(divisor, terms_[k].coefficient);
        }
        steps_ = 0;
        return search(0, target);
    }

private:
    struct Term {
        int64_t coefficient, bound;
        int64_t reach_below;    // what the smaller coefficients add up to at most
        int64_t divisor_below;  // and what divides all their sums
    };

    static constexpr int kMaxTerms = 9;      // four axes of each of two arrays, and one for the bytes of an element
    static constexpr int kMaxSteps = 20000;  // well below a millisecond

    bool search(int k, int64_t target) {
        if (target < 0) return false;
        if (k == count_) return target == 0;
        const Term& term = terms_[k];
        const int64_t high = std::min(term.bound, target / term.coefficient);
        const int64_t low = std::max<int64_t>(0, ceil_div(target - term.reach_below, term.coefficient));
        for (int64_t x = high; x >= low; x--) {
            if (++steps_ > kMaxSteps) return true;
            const int64_t rest = target - x * term.coefficient;
            if (term.divisor_below == 0 ? rest != 0 : rest % term.divisor_below != 0) continue;
            if (search(k + 1, rest)) return true;
        }
        return false;
    }

    Term terms_[kMaxTerms] = {};
    int count_ = 0;
    int steps_ = 0;
};

struct Dimension {
    int64_t size, stride;
};

struct Span {
    Dimension axes[4];  // strides in bytes, made positive by starting each axis from its lowest address
    intptr_t begin;     // lowest address of an element
    int64_t extent;     // from there to the highest
    int64_t itemsize;
};

Span span_of(const Array& a) {
    const int64_t size = itemsize(a.dtype);
    Span span{{{a.n, a.stride_n * size}, {a.c, a.stride_c * size}, {a.h, a.stride_h * size}, {a.w, a.stride_w * size}},
              reinterpret_cast<intptr_t>(a.data),
              0,
              size};
    for (Dimension& axis : span.axes) {
        const int64_t length = (axis.size - 1) * axis.stride;
        if (length < 0) span.begin += length;
        axis.stride = std::abs(axis.stride);
        span.extent += std::abs(length);
    }
    return span;
}

}  // namespace

bool share_memory(const Array& array_a, const Array& array_b) {
    if (array_a.empty() || array_b.empty()) return false;
    const Span a = span_of(array_a), b = span_of(array_b);
    if (a.begin + a.extent + a.itemsize <= b.begin || b.begin + b.extent + b.itemsize <= a.begin) return false;

    // a.begin + sum(a) = b.begin + sum(b) + e with -a.itemsize < e < b.itemsize. The steps of b and e count from their
    // ends: that makes every coefficient positive.
    BoundedSum sum;
    for (const Dimension& axis : a.axes) sum.add(axis.stride, axis.size - 1);
    for (const Dimension& axis : b.axes) sum.add(axis.stride, axis.size - 1);
    sum.add(1, a.itemsize + b.itemsize - 2);
    return sum.reaches(b.begin - a.begin + b.extent + b.itemsize - 1);
}

bool overlaps_itself(const Array& array) {
    if (array.empty()) return false;
    Span span = span_of(array);
    std::sort(span.axes, span.axes + 4, [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
    bool nested = true;  // each stride steps over all that the smaller ones reach
    int64_t reach = 0;
    for (const Dimension& axis : span.axes) {
        if (axis.size == 1) continue;
        nested = nested && axis.stride > reach;
        reach += (axis.size - 1) * axis.stride;
    }
    if (nested) return false;

    // Two indices collide when a nonzero difference d has sum(stride * d) = 0. Let axis k be the first with d not 0,
    // there positive without loss. Then d[k] - 1 and the d of later axes, counted from their lowest value, give a sum
    // of positive terms.
    for (int k = 0; k < 4; k++) {
        const Dimension& axis = span.axes[k];
        if (axis.size == 1) continue;
        if (axis.stride == 0) return true;
        BoundedSum sum;
        sum.add(axis.stride, axis.size - 2);
        int64_t target = -axis.stride;
        for (int j = k + 1; j < 4; j++) {
            sum.add(span.axes[j].stride, 2 * (span.axes[j].size - 1));
            target += span.axes[j].stride * (span.axes[j].size - 1);
        }
        if (sum.reaches(target)) return true;
    }
    return false;
}

}  // namespace carafepp
