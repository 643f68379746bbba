// Attention of each query to its sequence's cached keys, in float32: for decode, and for any shape and cache format.
// A block takes one query token, up to HEADS of the query heads that share a key head, and one of `splits` parts of the
// context; a key's row is read by LANES lanes, eight numbers each. Online softmax (Milakov & Gimelshein,
// arXiv:1805.02867), in base 2. Several parts are joined in the memory of a cluster of CLUSTER blocks, or, without
// clusters, by `merge` from what they leave in `partials` (Flash-Decoding). SOFTCAP bounds scores.
// TURN: queries come unturned, and the token's own key and value, not cached yet, are turned and written here; each
// sequence has one token then.
#define WARPS 4
#define GROUPS (32 / LANES)  // keys that a warp takes at once
#define UNROLL 2
#if CACHE == 0 || __CUDA_ARCH__ != 900  // blocks on a multiprocessor, as many as have registers without spilling
#define BLOCKS 3
#else
#define BLOCKS 4
#endif
struct Parameters {
    const float *q;
    float *y, *partials;
    Cached *k, *v;
    const int *positions, *query_start, *block_table;
    int q_row, y_row, table_row, sequences, group, kv_heads, block_size, window, splits;
    float scale, softcap;
    u32 reciprocal;  // 2^32 / block_size, rounded up: division by it is too long to stand in a loop
};

#ifdef TURN
struct Fresh {  // the step's keys and values
    const float *k, *v;
    int k_row, v_row;
    Turn turn;
};
#define FRESH , const __grid_constant__ Fresh fresh
#else
#define FRESH
#endif

// Running maximum, sum of weights, weighted sum of values.
struct State {
    float max, sum, out[8];
};
DEV void join(State &a, float max, float sum, const float (&out)[8]) {
    float top = fmaxf(a.max, max), mine = weight_of(a.max, top), other = weight_of(max, top);
    a.sum = a.sum * mine + sum * other;
    #pragma unroll
    for (int i = 0; i < 8; i++) a.out[i] = a.out[i] * mine + out[i] * other;
    a.max = top;
}

DEV float score_of(const Parameters &p, const float (&q)[8], const Eight &k) {
    float s = 0.f;
    #pragma unroll
    for (int i = 0; i < 8; i++) s += q[i] * at(k, i);
    #pragma unroll
    for (int o = LANES / 2; o; o >>= 1) s += __shfl_xor_sync(FULL, s, o);
#ifdef SOFTCAP
    s = tanhf(s / p.softcap) * p.softcap;
#endif
    return s * 1.44269504f;
}

// This lane's eight numbers of the queries, turned and scaled.
DEV void load_queries(float (&q)[HEADS][8], const Parameters &p, const float *from, int heads, int d
#ifdef TURN
                      , const Eighth &e
#endif
) {
    #pragma unroll
    for (int h = 0; h < HEADS; h++) {
        const float *head = from + min(h, heads - 1) * HEAD_DIM;
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            q[h][i] = d + i < HEAD_DIM ? get(head + d + i) * p.scale : 0.f;
#ifdef TURN
            if (d < HEAD_DIM) q[h][i] = q[h][i] * e.cosine[i] + get(head + e.other + i) * p.scale * e.sine[i];
#endif
        }
    }
}

#ifdef TURN
// The token's own key and value, as the cache will hold them; `write` puts them there.
DEV void bring_fresh(const Parameters &p, const Fresh &fresh, const Eighth &e, int token, int kv_head, int d, size_t row,
                     bool write, Eight &k, Eight &v) {
    const float *k_from = fresh.k + (size_t)token * fresh.k_row + kv_head * HEAD_DIM;
    const float *v_from = fresh.v + (size_t)token * fresh.v_row + kv_head * VALUE_DIM;
    Cached *k_to = (Cached *)&k, *v_to = (Cached *)&v;
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        k_to[i] = cached(d < HEAD_DIM ? get(k_from + d + i) * e.cosine[i] + get(k_from + e.other + i) * e.sine[i] : 0.f);
        v_to[i] = cached(d < VALUE_DIM ? get(v_from + d + i) : 0.f);
    }
    #pragma unroll
    for (int i = 0; i < (int)(sizeof(k) / 16); i++) {
        if (write && d < HEAD_DIM) ((uint4 *)(p.k + row * HEAD_DIM + d))[i] = k.v[i];
        if (write && d < VALUE_DIM) ((uint4 *)(p.v + row * VALUE_DIM + d))[i] = v.v[i];
    }
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) attention(const __grid_constant__ Parameters p FRESH) {
    __shared__ float shared[WARPS][HEADS][LANES][10];
#ifdef CLUSTER
    __shared__ float gathered[CLUSTER][(HEADS + CLUSTER - 1) / CLUSTER][VALUE_DIM + 2];
    cluster_arrive();
#endif
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = 8 * (lane % LANES);
    int chunks = (p.group + HEADS - 1) / HEADS, kv_head = blockIdx.x / chunks, head0 = blockIdx.x % chunks * HEADS;
    int token = blockIdx.y, split = blockIdx.z;
    pdl_trigger();
#ifndef TURN
    pdl_wait();
#endif
    int position = get(p.positions + token), sequence = sequence_of(p.query_start, p.sequences, token);
    int first = p.window ? max(0, position - p.window + 1) : 0, count = position + 1 - first;
    int each = (count + p.splits - 1) / p.splits, start = first + split * each, end = min(start + each, position + 1);
    const int *table = p.block_table + (size_t)sequence * p.table_row;
    auto row_of = [&](int key) {
        u32 block = p.block_size == 1 ? key : __umulhi(key, p.reciprocal);
        return (size_t)((get(table + block) - block) * p.block_size + key) * p.kv_heads + kv_head;
    };
    Eight k[UNROLL], v[UNROLL];
    auto load_keys = [&](int key0, int end) {
        size_t rows[UNROLL];
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int key = key0 + lane / LANES + u * WARPS * GROUPS;
            rows[u] = key < end ? row_of(key) : 0;
        }
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            bool inside = key0 + lane / LANES + u * WARPS * GROUPS < end;
            k[u] = load_eight<HEAD_DIM>(p.k + rows[u] * HEAD_DIM + d, inside ? HEAD_DIM - d : 0);
            v[u] = load_eight<VALUE_DIM>(p.v + rows[u] * VALUE_DIM + d, inside ? VALUE_DIM - d : 0);
        }
    };
    int key0 = start + warp * GROUPS;
#ifdef TURN  // what earlier steps left does not wait for the kernel before: a tape's first kernel has waited for them
    bool has_fresh = end == position + 1 && start < end && warp == 0;
    size_t fresh_row = has_fresh ? row_of(position) : 0;
    Eighth e = eighth_of(fresh.turn, token, position, d);
    end = min(end, position);
    load_keys(key0, end);
    pdl_wait();
#else
    load_keys(key0, end);
#endif
    const float *queries = p.q + (size_t)token * p.q_row + (kv_head * p.group + head0) * HEAD_DIM;
    float q[HEADS][8];
    State state[HEADS];
    #pragma unroll
    for (int h = 0; h < HEADS; h++) state[h] = {-INFINITY, 0.f, {}};
#ifdef TURN
    load_queries(q, p, queries, p.group - head0, d, e);
    if (has_fresh) {
        Eight own_k, own_v;
        bring_fresh(p, fresh, e, token, kv_head, d, fresh_row, head0 == 0 && lane < LANES, own_k, own_v);
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score = score_of(p, q[h], own_k);
            if (lane >= LANES) continue;  // the others have other keys
            state[h].max = score, state[h].sum = 1.f;
            #pragma unroll
            for (int i = 0; i < 8; i++) state[h].out[i] = at(own_v, i);
        }
    }
#else
    load_queries(q, p, queries, p.group - head0, d);
#endif
    #pragma unroll 1
    for (; key0 < end; key0 += WARPS * GROUPS * UNROLL) {
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score[UNROLL], top = state[h].max;
            #pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                score[u] = score_of(p, q[h], k[u]);
                if (key0 + lane / LANES + u * WARPS * GROUPS >= end) score[u] = -INFINITY;
                top = fmaxf(top, score[u]);
            }
            float old = weight_of(state[h].max, top);
            state[h].max = top;
            state[h].sum *= old;
            #pragma unroll
            for (int i = 0; i < 8; i++) state[h].out[i] *= old;
            #pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                float weight = weight_of(score[u], top);
                state[h].sum += weight;
                #pragma unroll
                for (int i = 0; i < 8; i++) state[h].out[i] += weight * at(v[u], i);
            }
        }
        load_keys(key0 + WARPS * GROUPS * UNROLL, end);
    }
    #pragma unroll
    for (int h = 0; h < HEADS; h++) {
        #pragma unroll
        for (int o = LANES; o < 32; o <<= 1) {
            float out[8], max = __shfl_xor_sync(FULL, state[h].max, o), sum = __shfl_xor_sync(FULL, state[h].sum, o);
            #pragma unroll
            for (int i = 0; i < 8; i++) out[i] = __shfl_xor_sync(FULL, state[h].out[i], o);
            join(state[h], max, sum, out);
        }
        if (lane < LANES) {
            float *to = shared[warp][h][lane];
            to[0] = state[h].max, to[1] = state[h].sum;
            #pragma unroll
            for (int i = 0; i < 8; i++) to[2 + i] = state[h].out[i];
        }
    }
    __syncthreads();
#ifdef CLUSTER
    cluster_wait();  // the others have begun
#endif
    #pragma unroll 1
    for (int e = threadIdx.x; e < HEADS * LANES; e += WARPS * 32) {  // the warps' states, joined
        int h = e / LANES, d = 8 * (e % LANES), head = kv_head * p.group + head0 + h;
        if (head0 + h >= p.group) continue;
        State all = {-INFINITY, 0.f, {}};
        #pragma unroll 1
        for (int w = 0; w < WARPS; w++) {
            const float *from = shared[w][h][e % LANES];
            float out[8];
            #pragma unroll
            for (int i = 0; i < 8; i++) out[i] = from[2 + i];
            join(all, from[0], from[1], out);
        }
#ifdef CLUSTER
        float *to = gathered[split][h / CLUSTER];  // of the block that finishes this head
        #pragma unroll
        for (int i = 0; i < 8; i++)
            if (d + i < VALUE_DIM) store_remote(to + d + i, h % CLUSTER, all.out[i]);
        if (d == 0) store_remote(to + VALUE_DIM, h % CLUSTER, all.max), store_remote(to + VALUE_DIM + 1, h % CLUSTER, all.sum);
#else
        size_t row = (size_t)token * p.group * p.kv_heads + head;
        float *to = p.splits > 1 ? p.partials + (row * p.splits + split) * (VALUE_DIM + 2)
                                 : p.y + (size_t)token * p.y_row + head * VALUE_DIM;
        float scale = p.splits > 1 ? 1.f : 1.f / all.sum;
        #pragma unroll
        for (int i = 0; i < 8; i++)
            if (d + i < VALUE_DIM) to[d + i] = all.out[i] * scale;
        if (p.splits > 1 && d == 0) to[VALUE_DIM] = all.max, to[VALUE_DIM + 1] = all.sum;
#endif
    }
#ifdef CLUSTER
    cluster_arrive();
    cluster_wait();
    #pragma unroll 1
    for (int h = split; h < HEADS && head0 + h < p.group; h += CLUSTER)
        #pragma unroll 1
        for (int i = threadIdx.x; i < VALUE_DIM; i += WARPS * 32) {
            float top = -INFINITY, sum = 0.f, out = 0.f;
            for (int r = 0; r < CLUSTER; r++) top = fmaxf(top, gathered[r][h / CLUSTER][VALUE_DIM]);
            for (int r = 0; r < CLUSTER; r++) {
                const float *from = gathered[r][h / CLUSTER];
                float scale = weight_of(from[VALUE_DIM], top);
                sum += scale * from[VALUE_DIM + 1];
                out += scale * from[i];
            }
            p.y[(size_t)token * p.y_row + (kv_head * p.group + head0 + h) * VALUE_DIM + i] = out / sum;
        }
#endif
}

#ifndef CLUSTER
// One block for each head (x) of a token (y).
extern "C" __global__ void merge(const __grid_constant__ Parameters p) {
    int token = blockIdx.y, head = blockIdx.x;
    begin();
    const float *from = p.partials + ((size_t)token * gridDim.x + head) * p.splits * (VALUE_DIM + 2);
    float top = -INFINITY, sum = 0.f;
    for (int s = 0; s < p.splits; s++) top = fmaxf(top, get(from + s * (VALUE_DIM + 2) + VALUE_DIM));
    for (int s = 0; s < p.splits; s++) {
        const float *end = from + s * (VALUE_DIM + 2) + VALUE_DIM;
        sum += weight_of(get(end), top) * get(end + 1);
    }
    for (int d = threadIdx.x; d < VALUE_DIM; d += blockDim.x) {
        float v = 0.f;
        for (int s = 0; s < p.splits; s++) {
            const float *part = from + s * (VALUE_DIM + 2);
            v += weight_of(get(part + VALUE_DIM), top) * get(part + d);
        }
        p.y[(size_t)token * p.y_row + head * VALUE_DIM + d] = v / sum;
    }
}
#endif
