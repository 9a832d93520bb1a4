// What a call consists of, and where everything lies in memory.
//
// States of a tile are channels first, [C][ROWS]: elementwise work needs no padding, sums over channels are vertical,
// and an operand that is broadcast may have any strides. Hidden activations are rows first, [ROWS][H], so that the
// tables of the positional condition are read, and their gradients added, row by row. Rows beyond the last one repeat
// it and get no gradient.

#pragma once

#include "products.h"

constexpr Int ROWS = 64;   // of a tile, a multiple of LANES and of BLOCK_ROWS
constexpr Int PIECE = 96;  // hidden channels at a time
constexpr Int CHUNK = 16;  // tiles that go through a layer before the next one, so that its weights are read once

// Tensors of one layer, in the order of CouplingWeights.
struct Layer {
    float *w1, *b1, *w2, *b2, *global_scale, *global_offset, *w_perm;
};

extern "C" {
// Of one call; the same in ops/flow/compiled.py. What may be null is marked so.
struct Job {
    Int channels, passive, hidden, layers;
    Int condition, width, height;  // channels of the positional condition and the size of the map, or 0
    Int hard;                      // W_perm is a permutation
    Int affine;                    // 0 SOFTPLUS, 1 SIGMOID, 2 EXP
    Int rows;                      // N
    Int kept;                      // whether a backward follows
    Int parts;                     // the rows are split into
    Int next;                      // part to be taken
    Int failed;                    // a position lies outside of the map
    double clamp, log_scale;       // the latter is what a_s is multiplied by
    const Layer* weights;
    const Layer* gradients;
    const float *column_code, *line_code;  // [width, padded(condition / 2)] and [height, ..]
    float* packed;
    const float* x;
    const Int* selected;  // rows of x, or null
    const Int* index;     // positions, or null
    float *kept_states, *memory, *lp, *log_det;
    float* z;                             // or null
    const float *d_lp, *d_log_det, *d_z;  // or null
    float* sums;
    float* d_x;  // or null
};
}

namespace {

// The rows of the tables A above B that the rows of a tile read.
struct Places {
    int32_t column[ROWS], line[ROWS];
};

// What follows from the shape: C, C1, C2, H, 2 C2, and what of it is padded.
struct Sizes {
    Int c, c1, c2, h, hp, c1p, a, ap, half, places;

    explicit Sizes(const Job& j)
        : c(j.channels), c1(j.passive), c2(c - c1), h(j.hidden), hp(padded(h)), c1p(padded(c1)), a(2 * c2),
          ap(padded(a)), half(padded(j.condition / 2)), places(j.width ? j.width + j.height : 1) {}
};

// Consecutive pieces of memory, each a whole number of cache lines; without memory it only counts.
struct Taker {
    float* memory;
    Int size = 0;

    explicit Taker(float* p) : memory(p) {}
    float* operator()(Int n) {
        float* here = memory ? memory + size : nullptr;
        size += (n + 15) / 16 * 16;
        return here;
    }
};

// The weights of one layer as the products read them.
struct Weights {
    float *w1, *w1x_t;      // [C1 + P][H] and, of the first C1, [H][C1]
    float *w2, *w2_t, *b2;  // [2 C2][H], [H][2 C2], [2 C2]; scaled so that sigmoid and shift read them directly
    float *b1, *bias;       // [H]; A [width][H] above B [height][H], or b1
    float *w_out, *offset;  // [C][C], W_perm diag(g); [C], W_perm offset
    float *g, *dg, *log_g;  // [C], and its derivative; sum(log g)
    int32_t *from, *to;     // [C], of a hard permutation: output i is y's channel from[i], and back
    Int size;

    Weights(float* p, const Job& j, const Sizes& z) {
        Taker take(p);
        w1 = take((z.c1 + j.condition) * z.hp), w1x_t = take(z.h * z.c1p);
        w2 = take(z.a * z.hp), w2_t = take(z.hp * z.ap), b2 = take(z.ap);
        b1 = take(z.hp), bias = j.width ? take(z.places * z.hp) : b1;
        w_out = take(z.c * z.c), offset = take(z.c), g = take(z.c), dg = take(z.c), log_g = take(1);
        from = reinterpret_cast<int32_t*>(take(z.c)), to = reinterpret_cast<int32_t*>(take(z.c));
        size = take.size;
    }
};

// The sums of one layer's gradients, of one part of the rows. Those of single numbers are vectors.
struct Gradients {
    float *w1x, *w2, *bias, *b2, *y_sum, *y_dot, *d_det;
    Int size;

    Gradients(float* p, const Sizes& z) {
        Taker take(p);
        w1x = take(z.c1 * z.hp), w2 = take(z.a * z.hp), bias = take(z.places * z.hp), b2 = take(z.a * LANES);
        y_sum = take(z.c * LANES), y_dot = take(z.c * LANES), d_det = take(1), size = take.size;
    }
};

// What is kept of one layer of one tile. x1 and y2 lie side by side: together they are y.
struct State {
    float *x1, *y2, *x2, *scale, *factor;

    State(float* p, const Sizes& z) {
        x1 = p, y2 = x1 + z.c1 * ROWS, x2 = y2 + z.c2 * ROWS, scale = x2 + z.c2 * ROWS, factor = scale + z.c2 * ROWS;
    }
};

// The memory of one part for a tile and for a chunk of tiles.
struct Work {
    float *hidden, *a, *da, *dy, *det, *d_out;
    Places* places;
    Int size;

    Work(float* p, const Sizes& z) {
        Taker take(p);
        hidden = take(ROWS * (PIECE + 2 * LANES)), a = take(ROWS * (z.ap > z.c1p ? z.ap : z.c1p));
        da = take(ROWS * z.a), dy = take(ROWS * z.c), det = take(CHUNK * ROWS), d_out = take(CHUNK * ROWS * z.c);
        places = reinterpret_cast<Places*>(take(CHUNK * 2 * ROWS)), size = take.size;
    }
};

// The memory of a call, and the rows of one part of it: tiles first to last.
struct Part {
    const Job& job;
    const Sizes z;
    const Int weights_size, gradients_size, state_size, tile_size, memory_size;

    explicit Part(const Job& j)
        : job(j), z(j), weights_size(Weights(nullptr, j, z).size), gradients_size(Gradients(nullptr, z).size),
          state_size((z.c + 3 * z.c2) * ROWS), tile_size(j.kept ? j.layers * state_size + z.c * ROWS : 2 * state_size),
          memory_size(Work(nullptr, z).size) {}

    Int tiles() const { return (job.rows + ROWS - 1) / ROWS; }
    Int first(Int part) const { return tiles() * part / job.parts; }
    Weights weights(Int layer) const { return Weights(job.packed + layer * weights_size, job, z); }
    Gradients gradients(Int part, Int layer) const {
        return Gradients(job.sums + (part * job.layers + layer) * gradients_size, z);
    }
    // Without a backward every chunk of a part is carried in the same memory, from one state to the other and back.
    float* state(Int part, Int start, Int tile, Int layer) const {
        if (job.kept) return job.kept_states + (start + tile) * tile_size + layer * state_size;
        return job.kept_states + (part * CHUNK + tile) * tile_size + layer % 2 * state_size;
    }
    Work work(Int part) const { return Work(job.memory + part * memory_size, z); }
    Int rows(Int tile) const { return least(ROWS, job.rows - tile * ROWS); }
};

}  // namespace
