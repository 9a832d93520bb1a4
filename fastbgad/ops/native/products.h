// Vectors of this machine's width, and products out [M, N] (+)= A [M, K] B [K, N] with sums in registers.
//
// No intrinsics: vectors are a GCC and Clang extension. A is broadcast from any strides; rows of B and of out are
// vectors, in memory padded to a multiple of PAD numbers. Where a sum starts and what becomes of it is up to the
// caller.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16, BLOCK_ROWS = 8, BLOCK_VECTORS = 3;  // 24 of 32 registers are sums
#elif defined(__AVX__)
constexpr int LANES = 8, BLOCK_ROWS = 4, BLOCK_VECTORS = 3;  // 12 of 16
#else
constexpr int LANES = 4, BLOCK_ROWS = 8, BLOCK_VECTORS = 3;
#endif

#define INLINE static inline __attribute__((always_inline))

typedef int64_t Int;
constexpr int PAD = 8;  // in memory, rows of matrices have a multiple of it
constexpr int HALF_LANES = LANES / 2;  // the end of a row of 16 k + 8 numbers; shorter vectors leave none

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(HALF_LANES * 4)));
typedef float LooseHalf __attribute__((vector_size(HALF_LANES * 4), aligned(4), may_alias));

namespace {

INLINE Vector load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
INLINE void store(float* p, Vector v) { *reinterpret_cast<Loose*>(p) = v; }
INLINE Half load_half(const float* p) { return *reinterpret_cast<const LooseHalf*>(p); }
INLINE void store_half(float* p, Half v) { *reinterpret_cast<LooseHalf*>(p) = v; }
INLINE Vector broadcast(float x) { return x - Vector{}; }
INLINE Integers bits(Vector v) { return reinterpret_cast<Integers>(v); }
INLINE Vector of_bits(Integers v) { return reinterpret_cast<Vector>(v); }

INLINE Int padded(Int n) { return (n + PAD - 1) / PAD * PAD; }
INLINE Int least(Int a, Int b) { return a < b ? a : b; }

// e^x to full float32 accuracy, through Inf and NaN: 2^n e^r with |r| <= ln(2) / 2.
INLINE Vector exponential(Vector x) {
    x = x < -104.0f ? broadcast(-104.0f) : x;
    x = x > 89.0f ? broadcast(89.0f) : x;
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds
    Vector n = x * 1.44269504f + to_integer;
    Integers whole = bits(n) - bits(broadcast(to_integer));
    n -= to_integer;
    Vector r = x - n * 0.693359375f;  // ln(2) in two parts, the first exact
    r = r + n * 2.12194440e-4f;
    Vector p = broadcast(1.982617104658857e-4f);
    p = p * r + 1.3945996761322021e-3f;
    p = p * r + 8.333430625498295e-3f;
    p = p * r + 4.1666269302368164e-2f;
    p = p * r + 1.666666567325592e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    // in two steps: 2^n alone may leave the range of floats where e^x does not
    Integers half = whole >> 1;
    return p * of_bits((half + 127) << 23) * of_bits((whole - half + 127) << 23);
}

template <int M, int N, bool TAIL>
struct Sums {
    Vector full[M][N ? N : 1];
    Half tail[TAIL ? M : 1];
};

// One block of sums, held in registers. `begin(row, column)` and `end(row, column, sum)` give and take its vectors;
// both are called for vectors and half vectors.
template <int M, int N, bool TAIL, class Begin, class End>
INLINE void block(const float* a, Int a_row, Int a_depth, const float* b, Int b_depth, Int depth, Int row, Int column,
                  const Begin& begin, const End& end) {
    Sums<M, N, TAIL> sums;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) begin(row + m, column + n * LANES, sums.full[m][n]);
        if (TAIL) begin(row + m, column + N * LANES, sums.tail[m]);
    }
    for (Int k = 0; k < depth; ++k) {
        Vector right[N ? N : 1];
        Half right_tail{};
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) right[n] = load(b + n * LANES);
        if (TAIL) right_tail = load_half(b + N * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const float left = a[m * a_row];
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums.full[m][n] += left * right[n];
            if (TAIL) sums.tail[m] += left * right_tail;
        }
        a += a_depth;
        b += b_depth;
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) end(row + m, column + n * LANES, sums.full[m][n]);
        if (TAIL) end(row + m, column + N * LANES, sums.tail[m]);
    }
}

// A panel of N vectors (and a half one), all rows. UNIT: rows of A lie side by side.
template <int N, bool TAIL, bool UNIT, class Begin, class End>
__attribute__((noinline)) void panel(const float* a, Int a_row, Int a_depth, const float* b, Int b_depth, Int rows,
                                     Int depth, Int column, const Begin& begin, const End& end) {
    const Int stride = UNIT ? 1 : a_row;
    Int row = 0;
    for (; row + BLOCK_ROWS <= rows; row += BLOCK_ROWS)
        block<BLOCK_ROWS, N, TAIL>(a + row * stride, stride, a_depth, b + column, b_depth, depth, row, column, begin,
                                   end);
    const Int over = rows % BLOCK_ROWS;
    if (over >= 4) {
        block<4, N, TAIL>(a + row * stride, stride, a_depth, b + column, b_depth, depth, row, column, begin, end);
        row += 4;
    }
    for (Int i = 0; i < over % 4; ++i, ++row)
        block<1, N, TAIL>(a + row * stride, stride, a_depth, b + column, b_depth, depth, row, column, begin, end);
}

template <bool UNIT, class Begin, class End>
INLINE void product(const float* a, Int a_row, Int a_depth, const float* b, Int b_depth, Int rows, Int columns,
                    Int depth, const Begin& begin, const End& end) {
    const bool tail = columns % LANES;
    Int vectors = columns / LANES, at = 0;
    // What is left for the last panel with a tail; panels of one vector read too much per sum.
    const Int over = vectors % BLOCK_VECTORS;
    const Int last = !tail ? 0 : over || vectors == 0 ? over : vectors == BLOCK_VECTORS ? 1 : 2;
    vectors -= last;
    while (vectors > 0) {
        const Int n = vectors == BLOCK_VECTORS + 1 ? 2 : least(vectors, BLOCK_VECTORS);
        if (n == 1)
            panel<1, false, UNIT>(a, a_row, a_depth, b, b_depth, rows, depth, at, begin, end);
        else if (n == 2)
            panel<2, false, UNIT>(a, a_row, a_depth, b, b_depth, rows, depth, at, begin, end);
        else
            panel<BLOCK_VECTORS, false, UNIT>(a, a_row, a_depth, b, b_depth, rows, depth, at, begin, end);
        at += n * LANES;
        vectors -= n;
    }
    if constexpr (LANES > PAD) {
        if (!tail) return;
        if (last == 0)
            panel<0, true, UNIT>(a, a_row, a_depth, b, b_depth, rows, depth, at, begin, end);
        else if (last == 1)
            panel<1, true, UNIT>(a, a_row, a_depth, b, b_depth, rows, depth, at, begin, end);
        else
            panel<2, true, UNIT>(a, a_row, a_depth, b, b_depth, rows, depth, at, begin, end);
    }
}

INLINE void get(const float* p, Vector& v) { v = load(p); }
INLINE void get(const float* p, Half& v) { v = load_half(p); }
INLINE void put(float* p, Vector v) { store(p, v); }
INLINE void put(float* p, Half v) { store_half(p, v); }
// NaN stays, as in PyTorch.
INLINE Vector relu(Vector v) { return v <= 0.0f ? Vector{} : v; }
INLINE Half relu(Half v) { return v <= 0.0f ? Half{} : v; }
INLINE Vector where_active(Vector hidden, Vector v) { return hidden <= 0.0f ? Vector{} : v; }
INLINE Half where_active(Half hidden, Half v) { return hidden <= 0.0f ? Half{} : v; }

struct Zero {
    template <class V>
    __attribute__((always_inline)) void operator()(Int, Int, V& v) const { v = V{}; }
};

struct Matrix {
    float* data;
    Int stride;
    template <class V>
    __attribute__((always_inline)) void operator()(Int row, Int column, V& v) const {
        get(data + row * stride + column, v);
    }
};

struct Into {
    float* data;
    Int stride;
    template <class V>
    __attribute__((always_inline)) void operator()(Int row, Int column, const V& v) const {
        put(data + row * stride + column, v);
    }
};

// Every row starts with the same numbers.
struct SameRow {
    const float* data;
    template <class V>
    __attribute__((always_inline)) void operator()(Int, Int column, V& v) const { get(data + column, v); }
};

// Every column starts with its row's number.
struct SameColumn {
    const float* data;
    __attribute__((always_inline)) void operator()(Int row, Int, Vector& v) const { v = broadcast(data[row]); }
    __attribute__((always_inline)) void operator()(Int row, Int, Half& v) const { v = data[row] - Half{}; }
};

struct IntoRelu {
    float* data;
    Int stride;
    template <class V>
    __attribute__((always_inline)) void operator()(Int row, Int column, const V& v) const {
        put(data + row * stride + column, relu(v));
    }
};

// Over the hidden activations themselves, which nothing reads after it.
struct IntoActive {
    float* data;
    Int stride;
    template <class V>
    __attribute__((always_inline)) void operator()(Int row, Int column, const V& v) const {
        V hidden;
        get(data + row * stride + column, hidden);
        put(data + row * stride + column, where_active(hidden, v));
    }
};

}  // namespace
