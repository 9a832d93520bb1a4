// One coupling layer of one tile, forward and backward. Equations: fastbgad/reference/flow.py.
//
// The hidden layer is worked on in pieces that fit the L1 cache, and computed again in the backward.

#pragma once

#include "layout.h"

namespace {

// Their hidden bias, A[w] + B[h].
struct PlaceBias {
    const float* tables;
    Int stride;
    const Places& of;
    template <class V>
    __attribute__((always_inline)) void operator()(Int row, Int column, V& v) const {
        V line;
        get(tables + of.column[row] * stride + column, v);
        get(tables + of.line[row] * stride + column, line);
        v += line;
    }
};

// to [columns][ROWS] = from [ROWS][columns]^T
INLINE void turn(const float* from, Int stride, float* to, Int columns) {
    for (Int c = 0; c < columns; ++c)
        for (Int r = 0; r < ROWS; ++r) to[c * ROWS + r] = from[r * stride + c];
}

INLINE Int pieces(const Sizes& z) { return (z.hp + PIECE - 1) / PIECE; }
// Pieces of whole vectors, as even as possible.
INLINE Int piece_start(const Sizes& z, Int index) {
    return index == pieces(z) ? z.hp : z.hp / LANES * index / pieces(z) * LANES;
}

// hidden [ROWS][count] = relu(x1 W1x + bias) of one piece of the hidden layer
INLINE void hidden_piece(const Sizes& z, const Weights& w, const float* x1, const Places* places, Int first,
                         Int count, float* hidden) {
    const IntoRelu end{hidden, count};
    if (places)
        product<true>(x1, 1, ROWS, w.w1 + first, z.hp, ROWS, count, z.c1,
                      PlaceBias{w.bias + first, z.hp, *places}, end);
    else
        product<true>(x1, 1, ROWS, w.w1 + first, z.hp, ROWS, count, z.c1, SameRow{w.bias + first}, end);
}

void forward_layer(const Job& j, const Sizes& z, const Weights& w, const State& at, float* next1, float* next2,
                   const Places* places, const Work& work, float* det) {
    for (Int i = 0; i < pieces(z); ++i) {
        const Int first = piece_start(z, i), count = piece_start(z, i + 1) - first;
        const Int units = least(count, z.h - first);  // those that are not padding
        hidden_piece(z, w, at.x1, places, first, count, work.hidden);
        const Into end{work.a, z.ap};
        if (i == 0)
            product<false>(work.hidden, count, 1, w.w2_t + first * z.ap, z.ap, ROWS, z.ap, units, SameRow{w.b2}, end);
        else
            product<false>(work.hidden, count, 1, w.w2_t + first * z.ap, z.ap, ROWS, z.ap, units,
                           Matrix{work.a, z.ap}, end);
    }
    turn(work.a, z.ap, work.da, z.a);
    const float clamp = static_cast<float>(j.clamp);
    for (Int c = 0; c < z.c2; ++c)
        for (Int r = 0; r < ROWS; r += LANES) {
            const Int here = c * ROWS + r;
            // s = clamp tanh(v / 2) = clamp (2 sigmoid(v) - 1)
            const Vector sigmoid = 1.0f / (1.0f + exponential(-load(work.da + here)));
            const Vector log_scale = sigmoid * (2 * clamp) - clamp, scale = exponential(log_scale);
            store(det + r, load(det + r) + log_scale);
            store(at.y2 + here, load(at.x2 + here) * scale + load(work.da + z.c2 * ROWS + here));
            if (j.kept) {
                store(at.scale + here, scale);
                store(at.factor + here, (1.0f - sigmoid) * sigmoid * (2 * clamp));
            }
        }
    if (j.hard) {
        for (Int c = 0; c < z.c; ++c) {
            const float* y = at.x1 + w.from[c] * ROWS;
            float* out = c < z.c1 ? next1 + c * ROWS : next2 + (c - z.c1) * ROWS;
            const float g = w.g[w.from[c]], offset = w.offset[c];
            for (Int r = 0; r < ROWS; r += LANES) store(out + r, load(y + r) * g + offset);
        }
        return;
    }
    product<false>(w.w_out, z.c, 1, at.x1, ROWS, z.c1, ROWS, z.c, SameColumn{w.offset}, Into{next1, ROWS});
    product<false>(w.w_out + z.c1 * z.c, z.c, 1, at.x1, ROWS, z.c2, ROWS, z.c, SameColumn{w.offset + z.c1},
                   Into{next2, ROWS});
}

INLINE void add_rows(float* to, const float* from, Int count) {
    Int n = 0;
    for (; n + LANES <= count; n += LANES) store(to + n, load(to + n) + load(from + n));
    if (n < count) store_half(to + n, load_half(to + n) + load_half(from + n));
}

// `d_out` [C][ROWS] becomes the gradient of the layer's input.
void backward_layer(const Job& j, const Sizes& z, const Weights& w, const Gradients& to, const State& at,
                    const Places* places, const Work& work, const float* d_det, float* d_out, Int rows) {
    float* dy = work.dy;
    if (j.hard)
        for (Int c = 0; c < z.c; ++c) {
            const float* from = d_out + w.to[c] * ROWS;
            for (Int r = 0; r < ROWS; r += LANES) store(dy + c * ROWS + r, load(from + r) * w.g[c]);
        }
    else
        product<true>(w.w_out, 1, z.c, d_out, ROWS, z.c, ROWS, z.c, Zero{}, Into{dy, ROWS});
    for (Int c = 0; c < z.c; ++c) {
        Vector sum = load(to.y_sum + c * LANES), dot = load(to.y_dot + c * LANES);
        for (Int r = 0; r < ROWS; r += LANES) {
            const Vector d = load(dy + c * ROWS + r);
            sum += d, dot += d * load(at.x1 + c * ROWS + r);
        }
        store(to.y_sum + c * LANES, sum), store(to.y_dot + c * LANES, dot);
    }
    float *da = work.da, *dy2 = dy + z.c1 * ROWS;
    for (Int c = 0; c < z.c2; ++c) {
        Vector sum_s = load(to.b2 + c * LANES), sum_t = load(to.b2 + (z.c2 + c) * LANES);
        for (Int r = 0; r < ROWS; r += LANES) {
            const Int here = c * ROWS + r;
            const Vector d = load(dy2 + here), dx2 = d * load(at.scale + here);
            const Vector ds = (load(d_det + r) + dx2 * load(at.x2 + here)) * load(at.factor + here);
            store(da + here, ds), store(da + z.c2 * ROWS + here, d), store(dy2 + here, dx2);
            sum_s += ds, sum_t += d;
        }
        store(to.b2 + c * LANES, sum_s), store(to.b2 + (z.c2 + c) * LANES, sum_t);
    }
    for (Int i = 0; i < pieces(z); ++i) {
        const Int first = piece_start(z, i), count = piece_start(z, i + 1) - first;
        const Int units = least(count, z.h - first);  // those that are not padding
        float* hidden = work.hidden;
        hidden_piece(z, w, at.x1, places, first, count, hidden);
        const Matrix w2_sum{to.w2 + first, z.hp}, w1_sum{to.w1x + first, z.hp};
        product<false>(da, ROWS, 1, hidden, count, z.a, count, rows, w2_sum, Into{to.w2 + first, z.hp});
        product<true>(da, 1, ROWS, w.w2 + first, z.hp, ROWS, count, z.a, Zero{}, IntoActive{hidden, count});
        product<false>(at.x1, ROWS, 1, hidden, count, z.c1, count, rows, w1_sum, Into{to.w1x + first, z.hp});
        const Into dx1{work.a, z.c1p};
        if (i == 0)
            product<false>(hidden, count, 1, w.w1x_t + first * z.c1p, z.c1p, ROWS, z.c1p, units, Zero{}, dx1);
        else
            product<false>(hidden, count, 1, w.w1x_t + first * z.c1p, z.c1p, ROWS, z.c1p, units,
                           Matrix{work.a, z.c1p}, dx1);
        if (places)
            for (Int r = 0; r < rows; ++r) {
                add_rows(to.bias + places->column[r] * z.hp + first, hidden + r * count, count);
                add_rows(to.bias + places->line[r] * z.hp + first, hidden + r * count, count);
            }
        else
            for (Int r = 0; r < rows; ++r) add_rows(to.bias + first, hidden + r * count, count);
    }
    for (Int c = 0; c < z.c1; ++c)
        for (Int r = 0; r < ROWS; ++r) d_out[c * ROWS + r] = dy[c * ROWS + r] + work.a[r * z.c1p + c];
    std::memcpy(d_out + z.c1 * ROWS, dy2, z.c2 * ROWS * sizeof(float));
}

}  // namespace
