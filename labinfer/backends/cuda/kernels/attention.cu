// Attention of each query to its sequence's cached keys, in float32: for decode, and for any shape and cache format.
// A block takes one query token, up to HEADS of the query heads that share a key head, and one of `splits` parts of the
// context; a key's row is read by LANES lanes, eight numbers each. Online softmax (Milakov & Gimelshein,
// arXiv:1805.02867). Several parts are joined in the memory of a cluster of CLUSTER blocks, or, without clusters, by
// `merge` from what they leave in `partials` (Flash-Decoding).
// TURN: queries come unturned, and the token's own key and value, not cached yet, are turned and written here; each
// sequence has one token then.
#define WARPS 4
#define GROUPS (32 / LANES)  // keys that a warp takes at once
#define UNROLL 2
struct Parameters {
    const float *q;
    float *y, *partials;
    Cached *k, *v;
    const int *positions, *query_start, *block_table;
    int q_row, y_row, table_row, sequences, group, kv_heads, block_size, window, splits;
    float scale, softcap;
};

#ifdef TURN
struct Fresh {  // the step's keys and values
    const float *k, *v;
    int k_row, v_row;
    Turn q_turn, k_turn;
};
#define FRESH , Fresh fresh
#else
#define FRESH
#endif

// Running maximum, sum of weights, weighted sum of values, in base 2.
struct State {
    float max, sum, out[8];
};
DEV void join(State &a, float max, float sum, const float (&out)[8]) {
    float top = fmaxf(a.max, max), mine = a.max == top ? 1.f : exp2f(a.max - top), other = max == top ? 1.f : exp2f(max - top);
    a.sum = a.sum * mine + sum * other;
    #pragma unroll
    for (int i = 0; i < 8; i++) a.out[i] = a.out[i] * mine + out[i] * other;
    a.max = top;
}

#ifdef TURN
// The token's own key and value, eight numbers of them, as the cache will hold them; `write` puts them there.
DEV void bring_fresh(const Parameters &p, const Fresh &fresh, int token, int position, int kv_head, bool write, size_t row,
                     float (&k)[8], float (&v)[8]) {
    const float *k_from = fresh.k + (size_t)token * fresh.k_row + kv_head * HEAD_DIM;
    const float *v_from = fresh.v + (size_t)token * fresh.v_row + kv_head * VALUE_DIM;
    int d = 8 * (threadIdx.x % LANES);
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        if (d + i < HEAD_DIM) {
            Feature f = feature_of(fresh.k_turn, token, position, d + i);
            Cached made = cached(get(k_from + d + i) * f.cosine + get(k_from + f.other) * f.sine);
            k[i] = value(made);
            if (write) p.k[row * HEAD_DIM + d + i] = made;
        }
        if (d + i < VALUE_DIM) {
            Cached made = cached(get(v_from + d + i));
            v[i] = value(made);
            if (write) p.v[row * VALUE_DIM + d + i] = made;
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32) attention(Parameters p FRESH) {
    __shared__ float shared[WARPS][HEADS][LANES][10];
#ifdef CLUSTER
    __shared__ float gathered[CLUSTER][(HEADS + CLUSTER - 1) / CLUSTER][VALUE_DIM + 2];
    cluster_arrive();
#endif
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES, d = 8 * part;
    int chunks = (p.group + HEADS - 1) / HEADS, kv_head = blockIdx.x / chunks, head0 = blockIdx.x % chunks * HEADS;
    int token = blockIdx.y, split = blockIdx.z;
    begin();
    int position = get(p.positions + token), sequence = sequence_of(p.query_start, p.sequences, token);
    int first = p.window ? max(0, position - p.window + 1) : 0, count = position + 1 - first;
    int each = (count + p.splits - 1) / p.splits, start = first + split * each, end = min(start + each, position + 1);
    const int *table = p.block_table + (size_t)sequence * p.table_row;
    float q[HEADS][8];
    State state[HEADS];
#ifdef TURN
    Feature features[8];
    #pragma unroll
    for (int i = 0; i < 8; i++)
        if (d + i < HEAD_DIM) features[i] = feature_of(fresh.q_turn, token, position, d + i);
#endif
    #pragma unroll
    for (int h = 0; h < HEADS; h++) {
        const float *from = p.q + (size_t)token * p.q_row + (kv_head * p.group + min(head0 + h, p.group - 1)) * HEAD_DIM;
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            q[h][i] = d + i < HEAD_DIM ? get(from + d + i) * p.scale : 0.f;
#ifdef TURN
            if (d + i < HEAD_DIM) q[h][i] = q[h][i] * features[i].cosine + get(from + features[i].other) * p.scale * features[i].sine;
#endif
            state[h].out[i] = 0.f;
        }
        state[h].max = -INFINITY, state[h].sum = 0.f;
    }
    for (int at = start + (warp * GROUPS + lane / LANES); at - lane / LANES < end; at += WARPS * GROUPS * UNROLL) {
        float k[UNROLL][8], v[UNROLL][8], score[UNROLL];
        size_t rows[UNROLL];
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int key = at + u * WARPS * GROUPS, slot = 0;
            if (key < end) slot = get(table + key / p.block_size) * p.block_size + key % p.block_size;
            rows[u] = (size_t)slot * p.kv_heads + kv_head;
        }
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int key = at + u * WARPS * GROUPS;
#ifdef TURN
            bool inside = key < min(end, position);
#else
            bool inside = key < end;
#endif
            eight<HEAD_DIM % 8 == 0>(p.k + rows[u] * HEAD_DIM + d, inside ? HEAD_DIM - d : 0, k[u]);
            eight<VALUE_DIM % 8 == 0>(p.v + rows[u] * VALUE_DIM + d, inside ? VALUE_DIM - d : 0, v[u]);
        }
#ifdef TURN
        #pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (at + u * WARPS * GROUPS == position) bring_fresh(p, fresh, token, position, kv_head, head0 == 0, rows[u], k[u], v[u]);
#endif
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float top = state[h].max;
            #pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                float s = 0.f;
                #pragma unroll
                for (int i = 0; i < 8; i++) s += q[h][i] * k[u][i];
                #pragma unroll
                for (int o = LANES / 2; o; o >>= 1) s += __shfl_xor_sync(FULL, s, o);
                if (p.softcap) s = tanhf(s / p.softcap) * p.softcap;
                score[u] = at + u * WARPS * GROUPS < end ? s * 1.44269504f : -INFINITY;
                top = fmaxf(top, score[u]);
            }
            float old = state[h].max == top ? 1.f : exp2f(state[h].max - top);
            state[h].max = top;
            state[h].sum *= old;
            #pragma unroll
            for (int i = 0; i < 8; i++) state[h].out[i] *= old;
            #pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                float weight = score[u] == -INFINITY ? 0.f : exp2f(score[u] - top);
                state[h].sum += weight;
                #pragma unroll
                for (int i = 0; i < 8; i++) state[h].out[i] += weight * v[u][i];
            }
        }
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
    for (int e = threadIdx.x; e < HEADS * LANES; e += WARPS * 32) {
        int h = e / LANES, lane8 = 8 * (e % LANES), head = kv_head * p.group + head0 + h;
        if (head0 + h >= p.group) continue;
        State all = {-INFINITY, 0.f, {}};
        for (int w = 0; w < WARPS; w++) {
            const float *from = shared[w][h][e % LANES];
            float out[8];
            #pragma unroll
            for (int i = 0; i < 8; i++) out[i] = from[2 + i];
            join(all, from[0], from[1], out);
        }
#ifdef CLUSTER
        #pragma unroll
        for (int i = 0; i < 8; i++)
            if (lane8 + i < VALUE_DIM) store_remote(&gathered[split][h / CLUSTER][lane8 + i], h % CLUSTER, all.out[i]);
        if (lane8 == 0) store_remote(&gathered[split][h / CLUSTER][VALUE_DIM], h % CLUSTER, all.max);
        if (lane8 == 0) store_remote(&gathered[split][h / CLUSTER][VALUE_DIM + 1], h % CLUSTER, all.sum);
    }
    cluster_arrive();
    cluster_wait();
    for (int h = split; h < HEADS && head0 + h < p.group; h += CLUSTER)
        for (int i = threadIdx.x; i < VALUE_DIM; i += WARPS * 32) {
            float top = -INFINITY, sum = 0.f, out = 0.f;
            for (int r = 0; r < CLUSTER; r++) top = fmaxf(top, gathered[r][h / CLUSTER][VALUE_DIM]);
            for (int r = 0; r < CLUSTER; r++) {
                const float *from = gathered[r][h / CLUSTER];
                float scale = exp2f(from[VALUE_DIM] - top);
                sum += scale * from[VALUE_DIM + 1];
                out += scale * from[i];
            }
            p.y[(size_t)token * p.y_row + (kv_head * p.group + head0 + h) * VALUE_DIM + i] = out / sum;
        }
}
#else
        size_t row = (size_t)token * p.group * p.kv_heads + head;
        float *to = p.splits > 1 ? p.partials + (row * p.splits + split) * (VALUE_DIM + 2)
                                 : p.y + (size_t)token * p.y_row + head * VALUE_DIM;
        float scale = p.splits > 1 ? 1.f : 1.f / all.sum;
        #pragma unroll
        for (int i = 0; i < 8; i++)
            if (lane8 + i < VALUE_DIM) to[lane8 + i] = all.out[i] * scale;
        if (p.splits > 1 && lane8 == 0) to[VALUE_DIM] = all.max, to[VALUE_DIM + 1] = all.sum;
    }
}

// One block for each head (x) of a token (y).
extern "C" __global__ void merge(Parameters p) {
    int token = blockIdx.y, head = blockIdx.x;
    begin();
    const float *from = p.partials + ((size_t)token * gridDim.x + head) * p.splits * (VALUE_DIM + 2);
    float top = -INFINITY, sum = 0.f;
    for (int s = 0; s < p.splits; s++) top = fmaxf(top, get(from + s * (VALUE_DIM + 2) + VALUE_DIM));
    for (int s = 0; s < p.splits; s++) {
        const float *end = from + s * (VALUE_DIM + 2) + VALUE_DIM;
        sum += exp2f(get(end) - top) * get(end + 1);
    }
    for (int d = threadIdx.x; d < VALUE_DIM; d += blockDim.x) {
        float v = 0.f;
        for (int s = 0; s < p.splits; s++)
            v += exp2f(get(from + s * (VALUE_DIM + 2) + VALUE_DIM) - top) * get(from + s * (VALUE_DIM + 2) + d);
        p.y[(size_t)token * p.y_row + head * VALUE_DIM + d] = v / sum;
    }
}
#endif
