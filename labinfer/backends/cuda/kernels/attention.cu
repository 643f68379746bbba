// Attention of each query to its sequence's cached keys, in float32: for decode, and for any shape and cache format.
// A block takes one query token, up to HEADS of the query heads that share a key head, and one of `splits` parts of the
// context; a key's row is read by LANES lanes, eight numbers each. Online softmax (Milakov & Gimelshein,
// arXiv:1805.02867), in base 2. Several parts are joined in the memory of a cluster of CLUSTER blocks, or, without
// clusters, by `merge` from what they leave in `partials` (Flash-Decoding). SOFTCAP bounds scores.
// TURN: queries come unturned, and the token's own key and value, not cached yet, are turned and written here; each
// sequence has one token then.
#define WARPS 4
#define GROUPS (32 / LANES)  // keys that a warp takes at once
#ifdef CLUSTER  // few blocks; where none need share a multiprocessor, all their keys are to be under way at once
#define UNROLL (SPARSE ? 4 : 2)
#define BLOCKS (SPARSE ? 1 : 2)
#define OWN ((HEADS * VALUE_DIM + CLUSTER - 1) / CLUSTER)  // results that each block of a cluster finishes
#else  // many: as many on a multiprocessor as have registers without spilling
#define UNROLL 2
#if CACHE == 0 || TURN == 2 || __CUDA_ARCH__ != 900
#define BLOCKS 3
#else
#define BLOCKS 4
#endif
#endif
struct Parameters {
    const float *q;
    Out *y;
    float *partials;
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
// Eight numbers of a row and the eight that they turn with; rows are aligned, and of a multiple of eight numbers.
struct Pairs {
    float own[8], other[8];
};
DEV void load_floats(float (&r)[8], const float *p) {
    float4 a = get((const float4 *)p), b = get((const float4 *)p + 1);
    r[0] = a.x, r[1] = a.y, r[2] = a.z, r[3] = a.w, r[4] = b.x, r[5] = b.y, r[6] = b.z, r[7] = b.w;
}
DEV void load_pairs(Pairs &r, const float *row, int d, int other) {
    load_floats(r.own, row + min(d, HEAD_DIM - 8));
    load_floats(r.other, row + min(other, HEAD_DIM - 8));
}
DEV float turned(const Pairs &r, const Eighth &e, int i) { return r.own[i] * e.cosine[i] + r.other[i] * e.sine[i]; }

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
    __shared__ __align__(16) float out[WARPS][HEADS][8 * LANES];
    __shared__ float2 ends[WARPS][HEADS];  // greatest score and sum of weights
#ifdef CLUSTER
    __shared__ float4 gathered[CLUSTER][OWN];  // result, greatest score, sum of weights
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
    Pairs own;
    float own_v[8];
    auto load_fresh = [&] {
        load_pairs(own, fresh.k + (size_t)token * fresh.k_row + kv_head * HEAD_DIM, d, e.other);
        load_floats(own_v, fresh.v + (size_t)token * fresh.v_row + kv_head * VALUE_DIM + min(d, VALUE_DIM - 8));
    };
#ifdef CLUSTER  // has registers to spare
    if (has_fresh) load_fresh();
#endif
    #pragma unroll
    for (int h = 0; h < HEADS; h++) {
        Pairs pairs;
        load_pairs(pairs, queries + min(h, p.group - head0 - 1) * HEAD_DIM, d, e.other);
        #pragma unroll
        for (int i = 0; i < 8; i++) q[h][i] = d < HEAD_DIM ? turned(pairs, e, i) * p.scale : 0.f;
    }
    if (has_fresh) {  // the token's own key and value
#ifndef CLUSTER
        load_fresh();
#endif
        bool write = head0 == 0 && lane < LANES;
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
            q[h][i] = d + i < HEAD_DIM ? get(queries + min(h, p.group - head0 - 1) * HEAD_DIM + d + i) * p.scale : 0.f;
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
        if (lane == 0) ends[warp][h] = make_float2(top, sum);
        if (lane >= LANES) continue;
        float4 *to = (float4 *)&out[warp][h][d];
        to[0] = make_float4(mine[0], mine[1], mine[2], mine[3]), to[1] = make_float4(mine[4], mine[5], mine[6], mine[7]);
    }
    __syncthreads();
#ifdef CLUSTER
    cluster_wait();  // the others have begun
#endif
    #pragma unroll 1
    for (int n = threadIdx.x; n < HEADS * VALUE_DIM; n += WARPS * 32) {  // the warps, joined
        int h = n / VALUE_DIM, i = n % VALUE_DIM, head = kv_head * p.group + head0 + h;
        if (head0 + h >= p.group) break;
        float top = -INFINITY, sum = 0.f, v = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, ends[w][h].x);
        #pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float by = weight_of(ends[w][h].x, top);
            sum += by * ends[w][h].y, v += by * out[w][h][i];
        }
#ifdef CLUSTER
        store_remote(&gathered[split][n % OWN], n / OWN, make_float4(v, top, sum, 0.f));
#else
        size_t row = (size_t)token * p.group * p.kv_heads + head;
        if (p.splits == 1) {
            p.y[(size_t)token * p.y_row + head * VALUE_DIM + i] = out_of(v / sum);
            continue;
        }
        float *to = p.partials + (row * p.splits + split) * (VALUE_DIM + 2);
        to[i] = v;
        if (i == 0) to[VALUE_DIM] = top, to[VALUE_DIM + 1] = sum;
#endif
    }
#ifdef CLUSTER
    cluster_arrive();
    cluster_wait();
    #pragma unroll 1
    for (int n = threadIdx.x; n < OWN; n += WARPS * 32) {  // the cluster's blocks, joined
        int all = split * OWN + n, h = all / VALUE_DIM;
        if (h >= HEADS || head0 + h >= p.group) break;
        float top = -INFINITY, sum = 0.f, v = 0.f;
        #pragma unroll
        for (int r = 0; r < CLUSTER; r++) top = fmaxf(top, gathered[r][n].y);
        #pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            float4 part = gathered[r][n];
            float by = weight_of(part.y, top);
            sum += by * part.z, v += by * part.x;
        }
        p.y[(size_t)token * p.y_row + (kv_head * p.group + head0 + h) * VALUE_DIM + all % VALUE_DIM] = out_of(v / sum);
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
        p.y[(size_t)token * p.y_row + head * VALUE_DIM + d] = out_of(v / sum);
    }
}
#endif
