// The flow on a CPU, forward and backward: called by ops/flow/compiled.py.
//
// A tile of rows goes through a coupling layer in the cache: its hidden activations (ten times as large as all that is
// kept) are never written to memory. Of each layer and row only x, y2, exp(s) and ds/da are kept, 2.5 C numbers.
//
// Every task is run by several threads at once, each of which takes parts until none is left; which thread takes which
// part changes no bit.

#include <cmath>

#include "layer.h"
#include "weights.h"

namespace {

INLINE Int taken(Job& job) { return __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED); }

INLINE Int source_row(const Job& j, Int row) {
    row = least(row, j.rows - 1);
    return j.selected ? j.selected[row] : row;
}

// Where a tile's rows lie on the map; false if one lies outside of it.
INLINE bool find_places(const Job& j, Int row, Places& places) {
    const Int area = j.width * j.height;
    for (Int r = 0; r < ROWS; ++r) {
        const Int at = j.index ? j.index[least(row + r, j.rows - 1)] : source_row(j, row + r) % area;
        if (at < 0 || at >= area) return false;
        places.column[r] = static_cast<int32_t>(at % j.width);
        places.line[r] = static_cast<int32_t>(j.width + at / j.width);
    }
    return true;
}

bool forward_part(const Part& p, Int part) {
    const Job& j = p.job;
    const Sizes& z = p.z;
    const Work work = p.work(part);
    const Int last = p.first(part + 1);
    const float constant = static_cast<float>(-0.5 * std::log(2 * 3.14159265358979323846));
    for (Int start = p.first(part); start < last; start += CHUNK) {
        const Int tiles = least(CHUNK, last - start);
        for (Int t = 0; t < tiles; ++t) {
            const Int row = (start + t) * ROWS;
            if (j.width && !find_places(j, row, work.places[t])) return false;
            const State at(p.state(part, start, t, 0), z);
            for (Int r = 0; r < ROWS; ++r) {
                const float* from = j.x + source_row(j, row + r) * z.c;
                for (Int c = 0; c < z.c1; ++c) at.x1[c * ROWS + r] = from[c];
                for (Int c = 0; c < z.c2; ++c) at.x2[c * ROWS + r] = from[z.c1 + c];
            }
        }
        std::memset(work.det, 0, tiles * ROWS * sizeof(float));
        float log_g = 0;
        for (Int layer = 0; layer < j.layers; ++layer) {
            const Weights w = p.weights(layer);
            log_g += *w.log_g;
            for (Int t = 0; t < tiles; ++t) {
                const State at(p.state(part, start, t, layer), z);
                // behind the last layer lies z, in one piece
                float* next = p.state(part, start, t, layer + 1);
                float* next2 = layer + 1 == j.layers ? next + z.c1 * ROWS : State(next, z).x2;
                forward_layer(j, z, w, at, next, next2, j.width ? work.places + t : nullptr, work, work.det + t * ROWS);
            }
        }
        for (Int t = 0; t < tiles; ++t) {
            const float* out = p.state(part, start, t, j.layers);
            const Int row = (start + t) * ROWS, rows = p.rows(start + t);
            float norm[ROWS] = {};
            for (Int c = 0; c < z.c; ++c)
                for (Int r = 0; r < ROWS; ++r) norm[r] += out[c * ROWS + r] * out[c * ROWS + r];
            for (Int r = 0; r < rows; ++r) {
                const float det = work.det[t * ROWS + r] + log_g;
                j.log_det[row + r] = det;
                j.lp[row + r] = (det - 0.5f * norm[r]) / z.c + constant;
                if (j.z)
                    for (Int c = 0; c < z.c; ++c) j.z[(row + r) * z.c + c] = out[c * ROWS + r];
            }
        }
    }
    return true;
}

void backward_part(const Part& p, Int part) {
    const Job& j = p.job;
    const Sizes& z = p.z;
    const Work work = p.work(part);
    const Int last = p.first(part + 1);
    const float share = 1.0f / z.c;
    std::memset(j.sums + part * j.layers * p.gradients_size, 0, j.layers * p.gradients_size * sizeof(float));
    double d_det_sum = 0;
    for (Int start = p.first(part); start < last; start += CHUNK) {
        const Int tiles = least(CHUNK, last - start);
        for (Int t = 0; t < tiles; ++t) {
            const Int row = (start + t) * ROWS, rows = p.rows(start + t);
            float *d_out = work.d_out + t * ROWS * z.c, *d_det = work.det + t * ROWS;
            const float* out = p.state(part, start, t, j.layers);
            float of_lp[ROWS];
            for (Int r = 0; r < ROWS; ++r) {
                of_lp[r] = j.d_lp && r < rows ? j.d_lp[row + r] * share : 0.0f;
                d_det[r] = of_lp[r] + (j.d_log_det && r < rows ? j.d_log_det[row + r] : 0.0f);
                d_det_sum += d_det[r];
            }
            // lp = (const - 1/2 |z|^2 + log_det) / C
            for (Int c = 0; c < z.c; ++c)
                for (Int r = 0; r < ROWS; ++r) {
                    float d = j.d_z && r < rows ? j.d_z[(row + r) * z.c + c] : 0.0f;
                    if (j.d_lp) d -= out[c * ROWS + r] * of_lp[r];
                    d_out[c * ROWS + r] = d;
                }
            if (j.width) find_places(j, row, work.places[t]);
        }
        for (Int layer = j.layers; layer-- > 0;) {
            const Weights w = p.weights(layer);
            const Gradients to = p.gradients(part, layer);
            for (Int t = 0; t < tiles; ++t) {
                const State at(p.state(part, start, t, layer), z);
                backward_layer(j, z, w, to, at, j.width ? work.places + t : nullptr, work, work.det + t * ROWS,
                               work.d_out + t * ROWS * z.c, p.rows(start + t));
            }
        }
        if (j.d_x)
            for (Int t = 0; t < tiles; ++t) {
                const float* d_out = work.d_out + t * ROWS * z.c;
                float* d_x = j.d_x + (start + t) * ROWS * z.c;
                for (Int r = 0; r < p.rows(start + t); ++r)
                    for (Int c = 0; c < z.c; ++c) d_x[r * z.c + c] = d_out[c * ROWS + r];
            }
    }
    for (Int layer = 0; layer < j.layers; ++layer)
        *p.gradients(part, layer).d_det = static_cast<float>(d_det_sum);
}

}  // namespace

extern "C" {

// Numbers (of float32) that the caller provides: of packed weights per layer, of gradients per layer and part, of
// states (per tile with a backward, else per part), and of memory per part. The last is the rows of a tile.
void flow_sizes(const Job* job, Int* sizes) {
    const Part p(*job);
    sizes[0] = p.weights_size, sizes[1] = p.gradients_size, sizes[3] = p.memory_size, sizes[4] = ROWS;
    sizes[2] = job->kept ? p.tile_size : CHUNK * p.tile_size;
}

// Weights into the form that the other tasks read.
void flow_fold(void* argument) {
    Job& job = *static_cast<Job*>(argument);
    const Part p(job);
    for (Int layer; (layer = taken(job)) < job.layers;) fold_layer(job, p.z, job.weights[layer], p.weights(layer));
}

void flow_forward(void* argument) {
    Job& job = *static_cast<Job*>(argument);
    const Part p(job);
    for (Int part; (part = taken(job)) < job.parts;)
        if (!forward_part(p, part)) __atomic_store_n(&job.failed, 1, __ATOMIC_RELAXED);
}

void flow_backward(void* argument) {
    Job& job = *static_cast<Job*>(argument);
    const Part p(job);
    for (Int part; (part = taken(job)) < job.parts;) backward_part(p, part);
}

// The sums that flow_backward has left into the gradients of the weights.
void flow_unfold(void* argument) {
    Job& job = *static_cast<Job*>(argument);
    const Part p(job);
    for (Int layer; (layer = taken(job)) < job.layers;) unfold_layer(p, layer, job.gradients[layer]);
}

}  // extern "C"
