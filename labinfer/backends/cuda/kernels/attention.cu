// Attention of each query to its sequence's cached keys, in float32: for decode, and for any shape and cache format.
// A block takes one query token, up to HEADS of the query heads that share a key head, a warp each, and one of `splits`
// parts of the context; a key's row is read by LANES lanes, eight numbers each, and by the other warps from L1. Online
// softmax (Milakov & Gimelshein, arXiv:1805.02867), in base 2. Several parts are joined in the memory of a cluster of
// CLUSTER blocks, or, without clusters, by `merge` from what they leave in `partials` (Flash-Decoding). SOFTCAP bounds
// scores. TURN: queries come unturned, and the token's own key and value, not cached yet, are turned and written here;
// each sequence has one token then.
#define GROUPS (32 / LANES)  // keys that a warp takes at once
#define UNROLL (CACHE == 0 ? 4 : 8)
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

// Eight numbers of a head at p, from d on; with TURN they are turned.
DEV void load_head(float (&v)[8], const float *p, int d
#ifdef TURN
                   , const Eighth &e
#endif
) {
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = d + i < HEAD_DIM ? get(p + d + i) : 0.f;
#ifdef TURN
    if (d >= HEAD_DIM) return;
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = v[i] * e.cosine[i] + get(p + e.other + i) * e.sine[i];
#endif
}

#ifdef TURN
// The token's own key and value, as the cache will hold them; `write` puts them there.
DEV void bring_fresh(const Parameters &p, const Fresh &fresh, const Eighth &e, int token, int kv_head, int d, size_t row,
                     bool write, Eight &k, Eight &v) {
    const float *v_from = fresh.v + (size_t)token * fresh.v_row + kv_head * VALUE_DIM;
    float turned[8];
    load_head(turned, fresh.k + (size_t)token * fresh.k_row + kv_head * HEAD_DIM, d, e);
    Cached *k_to = (Cached *)&k, *v_to = (Cached *)&v;
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        k_to[i] = cached(turned[i]);
        v_to[i] = cached(d < VALUE_DIM ? get(v_from + d + i) : 0.f);
    }
    #pragma unroll
    for (int i = 0; i < (int)(sizeof(k) / 16); i++) {
        if (write && d < HEAD_DIM) ((uint4 *)(p.k + row * HEAD_DIM + d))[i] = k.v[i];
        if (write && d < VALUE_DIM) ((uint4 *)(p.v + row * VALUE_DIM + d))[i] = v.v[i];
    }
}
#endif

extern "C" __global__ void __launch_bounds__(HEADS * 32) attention(const __grid_constant__ Parameters p FRESH) {
#ifdef CLUSTER
    __shared__ float gathered[CLUSTER][(HEADS + CLUSTER - 1) / CLUSTER][VALUE_DIM + 2];
    cluster_arrive();
#endif
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = 8 * (lane % LANES);
    int chunks = (p.group + HEADS - 1) / HEADS, kv_head = blockIdx.x / chunks, head0 = blockIdx.x % chunks * HEADS;
    int token = blockIdx.y, split = blockIdx.z, head = kv_head * p.group + min(head0 + warp, p.group - 1);
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
            int key = key0 + lane / LANES + u * GROUPS;
            rows[u] = key < end ? row_of(key) : 0;
        }
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            bool inside = key0 + lane / LANES + u * GROUPS < end;
            k[u] = load_eight<HEAD_DIM>(p.k + rows[u] * HEAD_DIM + d, inside ? HEAD_DIM - d : 0);
            v[u] = load_eight<VALUE_DIM>(p.v + rows[u] * VALUE_DIM + d, inside ? VALUE_DIM - d : 0);
        }
    };
    float q[8];
    State state = {-INFINITY, 0.f, {}};
#ifdef TURN  // what earlier steps left does not wait for the kernel before: a tape's first kernel has waited for them
    bool has_fresh = end == position + 1 && start < end;
    size_t fresh_row = has_fresh ? row_of(position) : 0;
    Eighth e = eighth_of(fresh.turn, token, position, d);
    end = min(end, position);
    load_keys(start, end);
    pdl_wait();
    load_head(q, p.q + (size_t)token * p.q_row + head * HEAD_DIM, d, e);
#else
    load_keys(start, end);
    load_head(q, p.q + (size_t)token * p.q_row + head * HEAD_DIM, d);
#endif
    #pragma unroll
    for (int i = 0; i < 8; i++) q[i] *= p.scale;
#ifdef TURN
    if (has_fresh) {
        Eight own_k, own_v;
        bring_fresh(p, fresh, e, token, kv_head, d, fresh_row, head0 + warp == 0 && lane < LANES, own_k, own_v);
        float score = score_of(p, q, own_k);
        if (lane < LANES) {  // the other lanes have other keys
            state.max = score, state.sum = 1.f;
            #pragma unroll
            for (int i = 0; i < 8; i++) state.out[i] = at(own_v, i);
        }
    }
#endif
    #pragma unroll 1
    for (int key0 = start; key0 < end; key0 += GROUPS * UNROLL) {
        float score[UNROLL], top = state.max;
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            score[u] = score_of(p, q, k[u]);
            if (key0 + lane / LANES + u * GROUPS >= end) score[u] = -INFINITY;
            top = fmaxf(top, score[u]);
        }
        float old = weight_of(state.max, top);
        state.max = top;
        state.sum *= old;
        #pragma unroll
        for (int i = 0; i < 8; i++) state.out[i] *= old;
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float weight = weight_of(score[u], top);
            state.sum += weight;
            #pragma unroll
            for (int i = 0; i < 8; i++) state.out[i] += weight * at(v[u], i);
        }
        load_keys(key0 + GROUPS * UNROLL, end);
    }
    #pragma unroll
    for (int o = LANES; o < 32; o <<= 1) {
        float out[8], max = __shfl_xor_sync(FULL, state.max, o), sum = __shfl_xor_sync(FULL, state.sum, o);
        #pragma unroll
        for (int i = 0; i < 8; i++) out[i] = __shfl_xor_sync(FULL, state.out[i], o);
        join(state, max, sum, out);
    }
    bool mine = lane < LANES && head0 + warp < p.group;
#ifdef CLUSTER
    cluster_wait();  // the others have begun
    float *to = gathered[split][warp / CLUSTER];  // in the block that finishes this head
    #pragma unroll
    for (int i = 0; i < 8; i++)
        if (mine && d + i < VALUE_DIM) store_remote(to + d + i, warp % CLUSTER, state.out[i]);
    if (mine && d == 0) store_remote(to + VALUE_DIM, warp % CLUSTER, state.max);
    if (mine && d == 0) store_remote(to + VALUE_DIM + 1, warp % CLUSTER, state.sum);
    cluster_arrive();
    cluster_wait();
    #pragma unroll 1
    for (int i = threadIdx.x; i < (HEADS + CLUSTER - 1) / CLUSTER * VALUE_DIM; i += HEADS * 32) {
        int slot = i / VALUE_DIM, other = slot * CLUSTER + split;  // a head that this block finishes
        if (other >= HEADS || head0 + other >= p.group) break;
        float top = -INFINITY, sum = 0.f, out = 0.f;
        for (int r = 0; r < CLUSTER; r++) top = fmaxf(top, gathered[r][slot][VALUE_DIM]);
        for (int r = 0; r < CLUSTER; r++) {
            float scale = weight_of(gathered[r][slot][VALUE_DIM], top);
            sum += scale * gathered[r][slot][VALUE_DIM + 1];
            out += scale * gathered[r][slot][i % VALUE_DIM];
        }
        p.y[(size_t)token * p.y_row + (kv_head * p.group + head0 + other) * VALUE_DIM + i % VALUE_DIM] = out / sum;
    }
#else
    if (!mine) return;
    size_t row = (size_t)token * p.group * p.kv_heads + head;
    float *to = p.splits > 1 ? p.partials + (row * p.splits + split) * (VALUE_DIM + 2)
                             : p.y + (size_t)token * p.y_row + head * VALUE_DIM;
    float scale = p.splits > 1 ? 1.f : 1.f / state.sum;
    #pragma unroll
    for (int i = 0; i < 8; i++)
        if (d + i < VALUE_DIM) to[d + i] = state.out[i] * scale;
    if (p.splits > 1 && d == 0) to[VALUE_DIM] = state.max, to[VALUE_DIM + 1] = state.sum;
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
