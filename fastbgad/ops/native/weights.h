// From the tensors of a layer to the form that the products read, and from sums of gradients to theirs.

#pragma once

#include <cmath>

#include "layout.h"

namespace {

// g > 0 from its parameter, and its derivative.
void affine_scale(Int kind, double x, float& g, float& dg) {
    if (kind == 0) {
        g = static_cast<float>(0.1 * (x > 40 ? x : 2 * std::log1p(std::exp(0.5 * x))));
        dg = static_cast<float>(0.1 / (1 + std::exp(-0.5 * x)));
    } else if (kind == 1) {
        const double sigmoid = 1 / (1 + std::exp(2 - x));
        g = static_cast<float>(10 * sigmoid);
        dg = static_cast<float>(10 * sigmoid * (1 - sigmoid));
    } else
        g = dg = static_cast<float>(std::exp(x));
}

// The layer's weights with their constants folded in, and the tables of the positional condition.
void fold_layer(const Job& j, const Sizes& z, const Layer& of, const Weights& w) {
    const Int inputs = z.c1 + j.condition;
    for (Int i = 0; i < inputs; ++i) {
        for (Int h = 0; h < z.h; ++h) w.w1[i * z.hp + h] = of.w1[h * inputs + i];
        for (Int h = z.h; h < z.hp; ++h) w.w1[i * z.hp + h] = 0;
    }
    for (Int h = 0; h < z.h; ++h)
        for (Int c = 0; c < z.c1p; ++c) w.w1x_t[h * z.c1p + c] = c < z.c1 ? of.w1[h * inputs + c] : 0.0f;
    for (Int c = 0; c < z.ap; ++c) {
        const float scale = static_cast<float>(c < z.c2 ? j.log_scale : 0.1);
        w.b2[c] = c < z.a ? scale * of.b2[c] : 0.0f;
        for (Int h = 0; h < z.hp; ++h) {
            const float value = c < z.a && h < z.h ? scale * of.w2[c * z.h + h] : 0.0f;
            w.w2_t[h * z.ap + c] = value;
            if (c < z.a) w.w2[c * z.hp + h] = value;
        }
    }
    for (Int h = 0; h < z.hp; ++h) w.b1[h] = h < z.h ? of.b1[h] : 0.0f;
    if (j.width) {
        const Int half = j.condition / 2;
        const float* columns = w.w1 + z.c1 * z.hp;
        product<false>(j.column_code, z.half, 1, columns, z.hp, j.width, z.hp, half, SameRow{w.b1}, Into{w.bias, z.hp});
        product<false>(j.line_code, z.half, 1, columns + half * z.hp, z.hp, j.height, z.hp, half, Zero{},
                       Into{w.bias + j.width * z.hp, z.hp});
    }
    double log_g = 0;
    for (Int c = 0; c < z.c; ++c) {
        affine_scale(j.affine, of.global_scale[c], w.g[c], w.dg[c]);
        log_g += std::log(static_cast<double>(w.g[c]));
    }
    *w.log_g = static_cast<float>(log_g);
    for (Int c = 0; c < z.c; ++c) {
        const float* row = of.w_perm + c * z.c;
        if (j.hard) {
            Int most = 0;
            for (Int i = 1; i < z.c; ++i)
                if (row[i] > row[most]) most = i;
            w.from[c] = static_cast<int32_t>(most), w.to[most] = static_cast<int32_t>(c);
            w.offset[c] = of.global_offset[most];
            continue;
        }
        float sum = 0;
        for (Int i = 0; i < z.c; ++i) {
            w.w_out[c * z.c + i] = row[i] * w.g[i];
            sum += row[i] * of.global_offset[i];
        }
        w.offset[c] = sum;
    }
}

INLINE float total(const float* vector) {
    float sum = 0;
    for (Int i = 0; i < LANES; ++i) sum += vector[i];
    return sum;
}

// From the sums of all parts to the gradients of a layer's own tensors.
void unfold_layer(const Part& p, Int layer, const Layer& to) {
    const Job& j = p.job;
    const Sizes& z = p.z;
    const Weights w = p.weights(layer);
    const Gradients all = p.gradients(0, layer);
    for (Int part = 1; part < j.parts; ++part) {
        const float* other = p.gradients(part, layer).w1x;
        for (Int i = 0; i < p.gradients_size; ++i) all.w1x[i] += other[i];
    }
    const Int inputs = z.c1 + j.condition, half = j.condition / 2;
    for (Int h = 0; h < z.h; ++h)
        for (Int c = 0; c < z.c1; ++c) to.w1[h * inputs + c] = all.w1x[c * z.hp + h];
    // A = code_w W1w^T + b1 and B = code_h W1h^T
    float piece[ROWS * PIECE];
    for (Int side = 0; j.width && side < 2; ++side) {
        const float* code = side ? j.line_code : j.column_code;
        const float* table = side ? all.bias + j.width * z.hp : all.bias;
        for (Int h = 0; h < z.h; h += ROWS)
            for (Int from = 0; from < half; from += PIECE) {
                const Int rows = least(ROWS, z.h - h), columns = least(PIECE, half - from);
                product<true>(table + h, 1, z.hp, code + from, z.half, rows, padded(columns),
                              side ? j.height : j.width, Zero{}, Into{piece, PIECE});
                for (Int r = 0; r < rows; ++r)
                    std::memcpy(to.w1 + (h + r) * inputs + z.c1 + side * half + from, piece + r * PIECE,
                                columns * sizeof(float));
            }
    }
    for (Int h = 0; h < z.h; ++h) {
        float sum = 0;
        for (Int place = 0; place < (j.width ? j.width : 1); ++place) sum += all.bias[place * z.hp + h];
        to.b1[h] = sum;
    }
    for (Int c = 0; c < z.a; ++c) {
        const float scale = static_cast<float>(c < z.c2 ? j.log_scale : 0.1);
        to.b2[c] = scale * total(all.b2 + c * LANES);
        for (Int h = 0; h < z.h; ++h) to.w2[c * z.h + h] = scale * all.w2[c * z.hp + h];
    }
    // v = g y + offset and dv = dy / g, so dg = sum(dv y) and doffset = sum(dv); log_det adds sum(log g) per row
    for (Int c = 0; c < z.c; ++c) {
        to.global_scale[c] = (total(all.y_dot + c * LANES) + *all.d_det) / w.g[c] * w.dg[c];
        to.global_offset[c] = total(all.y_sum + c * LANES) / w.g[c];
    }
}

}  // namespace
