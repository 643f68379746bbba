// Attention of each query to its sequence's cached keys, in float32, for any shape and cache format: a key's row is read
// by LANES lanes, eight numbers each. See `attention.cuh`.
#define GROUPS (32 / LANES)  // keys that a warp takes at once
#ifdef CLUSTER  // few blocks; where none need share a multiprocessor, all their keys are to be under way at once
#define UNROLL (SPARSE ? 4 : 2)
#define BLOCKS (SPARSE ? 1 : 2)
#else  // many: as many on a multiprocessor as have registers without spilling
#define UNROLL 2
#if CACHE == 0 || TURN == 2 || __CUDA_ARCH__ != 900
#define BLOCKS 3
#else
#define BLOCKS 4
#endif
#endif
// Running maximum, sum of weights, weighted sum of values.
struct State {
    float max, sum, out[8];
};
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

#ifdef TURN
// Eight numbers as the cache holds them, zero unless `inside`, written there too where `to` is given.
template <class Number> DEV Eight bring(bool inside, Cached *to, Number number) {
    Eight r;
    Cached *cells = (Cached *)&r;
    #pragma unroll
    for (int i = 0; i < 8; i++) cells[i] = cached(inside ? number(i) : 0.f);
    #pragma unroll
    for (int i = 0; i < (int)(sizeof(r) / 16); i++)
        if (to && inside) ((uint4 *)to)[i] = r.v[i];
    return r;
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) attention(const __grid_constant__ Parameters p FRESH) {
    __shared__ __align__(16) Ends shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = 8 * (lane % LANES);
    pdl_trigger();
#ifndef TURN
    pdl_wait();
#endif
    if (left_to_prefill(p)) return;
#ifdef CLUSTER
    cluster_arrive();
#endif
    Item item = item_of(p);
    Eight k[UNROLL], v[UNROLL];
    auto load_keys = [&](int key0, int end) {
        size_t rows[UNROLL];
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int key = key0 + lane / LANES + u * WARPS * GROUPS;
            rows[u] = key < end ? row_of(p, item, key) : 0;
        }
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            bool inside = key0 + lane / LANES + u * WARPS * GROUPS < end;
            k[u] = load_eight<HEAD_DIM>(p.k + rows[u] * HEAD_DIM + d, inside ? HEAD_DIM - d : 0);
            v[u] = load_eight<VALUE_DIM>(p.v + rows[u] * VALUE_DIM + d, inside ? VALUE_DIM - d : 0);
        }
    };
    int key0 = item.start + warp * GROUPS, end = item.end;
#ifdef TURN  // what earlier steps left does not wait for the kernel before: a tape's first kernel has waited for them
    bool has_fresh = end == item.position + 1 && item.start < end && warp == 0;
    size_t fresh_row = has_fresh ? row_of(p, item, item.position) : 0;
    Eighth e = eighth_of(fresh.turn, item.token, item.position, d);
    end = min(end, item.position);
    load_keys(key0, end);
    pdl_wait();
#else
    load_keys(key0, end);
#endif
    const float *queries = p.q + (size_t)item.token * p.q_row + (item.kv_head * p.group + item.head0) * HEAD_DIM;
    float q[HEADS][8];
    State state[HEADS];
    #pragma unroll
    for (int h = 0; h < HEADS; h++) state[h] = {-INFINITY, 0.f, {}};
#ifdef TURN
    Pairs own;
    float own_v[8];
    auto load_fresh = [&] {
        load_pairs(own, fresh.k + (size_t)item.token * fresh.k_row + item.kv_head * HEAD_DIM, d, e.other);
        load_floats(own_v, fresh.v + (size_t)item.token * fresh.v_row + item.kv_head * VALUE_DIM + min(d, VALUE_DIM - 8));
    };
#ifdef CLUSTER  // has registers to spare
    if (has_fresh) load_fresh();
#endif
    #pragma unroll
    for (int h = 0; h < HEADS; h++) {
        Pairs pairs;
        load_pairs(pairs, queries + min(h, p.group - item.head0 - 1) * HEAD_DIM, d, e.other);
        #pragma unroll
        for (int i = 0; i < 8; i++) q[h][i] = d < HEAD_DIM ? turned(pairs, e, i) * p.scale : 0.f;
    }
    if (has_fresh) {  // the token's own key and value
#ifndef CLUSTER
        load_fresh();
#endif
        bool write = item.head0 == 0 && lane < LANES;
        Cached *k_to = write ? p.k + fresh_row * HEAD_DIM + d : nullptr, *v_to = write ? p.v + fresh_row * VALUE_DIM + d : nullptr;
        Eight own_key = bring(d < HEAD_DIM, k_to, [&](int i) { return turned(own, e, i); });
        Eight own_value = bring(d < VALUE_DIM, v_to, [&](int i) { return own_v[i]; });
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score = score_of(p, q[h], own_key);
            if (lane >= LANES) continue;  // the others have other keys
            state[h].max = score, state[h].sum = 1.f;
            #pragma unroll
            for (int i = 0; i < 8; i++) state[h].out[i] = at(own_value, i);
        }
    }
#else
    #pragma unroll
    for (int h = 0; h < HEADS; h++)
        #pragma unroll
        for (int i = 0; i < 8; i++)
            q[h][i] = d + i < HEAD_DIM ? get(queries + min(h, p.group - item.head0 - 1) * HEAD_DIM + d + i) * p.scale : 0.f;
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
    for (int h = 0; h < HEADS; h++) {  // a warp's groups of lanes, joined
        float top = state[h].max, sum = state[h].sum, mine[8];
        #pragma unroll
        for (int o = LANES; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, o));
        float by = weight_of(state[h].max, top);
        sum *= by;
        #pragma unroll
        for (int i = 0; i < 8; i++) mine[i] = state[h].out[i] * by;
        #pragma unroll
        for (int o = LANES; o < 32; o <<= 1) {
            sum += __shfl_xor_sync(FULL, sum, o);
            #pragma unroll
            for (int i = 0; i < 8; i++) mine[i] += __shfl_xor_sync(FULL, mine[i], o);
        }
        if (lane == 0) shared.ends[warp][h] = make_float2(top, sum);
        if (lane >= LANES || d >= PADDED) continue;
        float4 *to = (float4 *)&shared.out[warp][h][d];
        to[0] = make_float4(mine[0], mine[1], mine[2], mine[3]), to[1] = make_float4(mine[4], mine[5], mine[6], mine[7]);
    }
    join(p, shared, item);
}
