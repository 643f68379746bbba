// What the kernels of a query's attention to its cached keys share. A block takes one query token (blockIdx.y), up to
// HEADS of the query heads that share a key head (x), and one of `splits` parts of the context (z), which its warps
// divide. Online softmax (Milakov & Gimelshein, arXiv:1805.02867), in base 2. Several parts are joined in the memory of a
// cluster of CLUSTER blocks, or, without clusters, by `merge` from what they leave in `partials` (Flash-Decoding).
// SOFTCAP bounds scores. TURN: queries come unturned, and the token's own key and value, not cached yet, are turned and
// written there; each sequence has one token then. MIXED: y is the sequence, which is left to `prefill.cu` unless it has
// one token.
#define WARPS 4
#define PADDED ((VALUE_DIM + 7) / 8 * 8)
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
#define FRESH , const __grid_constant__ Fresh fresh NORMED
#else
#define FRESH
#endif

// A block's part of the work: keys from `start` to `end` of the `sequence` of `token`, for heads from `head0` of a group.
struct Item {
    int token, sequence, position, kv_head, head0, start, end;
    const int *table;
};
// Whether `prefill.cu` takes the sequence that block y is for.
DEV bool left_to_prefill(const Parameters &p) {
#ifdef MIXED
    return get(p.query_start + blockIdx.y + 1) - get(p.query_start + blockIdx.y) != 1;
#else
    return false;
#endif
}
DEV Item item_of(const Parameters &p) {
    Item r;
    int chunks = (p.group + HEADS - 1) / HEADS;
    r.kv_head = blockIdx.x / chunks, r.head0 = blockIdx.x % chunks * HEADS;
#ifdef MIXED
    r.sequence = blockIdx.y, r.token = get(p.query_start + r.sequence);
#else
    r.token = blockIdx.y, r.sequence = sequence_of(p.query_start, p.sequences, r.token);
#endif
    r.position = get(p.positions + r.token);
    int first = p.window ? max(0, r.position - p.window + 1) : 0, count = r.position + 1 - first;
    int each = (count + p.splits - 1) / p.splits;
    r.start = first + (int)blockIdx.z * each, r.end = min(r.start + each, r.position + 1);
    r.table = p.block_table + (size_t)r.sequence * p.table_row;
    return r;
}
// Where a key lies in the cache, in rows of a head.
DEV size_t row_of(const Parameters &p, const Item &item, int key) {
    u32 block = p.block_size == 1 ? key : __umulhi(key, p.reciprocal);
    return (size_t)((get(item.table + block) - block) * p.block_size + key) * p.kv_heads + item.kv_head;
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
#endif

// What each warp has of its keys: weighted sums of values, greatest scores and sums of weights.
#define OWN ((HEADS * VALUE_DIM + CLUSTER - 1) / CLUSTER)  // results that each block of a cluster finishes
struct Ends {
    float out[WARPS][HEADS][PADDED];
    float2 ends[WARPS][HEADS];
#ifdef CLUSTER
    float4 gathered[CLUSTER][OWN];  // result, greatest score, sum of weights
#endif
};
// The warps' joined, and the cluster's, which has arrived once before.
DEV void join(const Parameters &p, Ends &s, const Item &item) {
    __syncthreads();
#ifdef CLUSTER
    cluster_wait();  // the others have begun
#endif
    #pragma unroll 1
    for (int n = threadIdx.x; n < HEADS * VALUE_DIM; n += WARPS * 32) {
        int h = n / VALUE_DIM, i = n % VALUE_DIM, head = item.kv_head * p.group + item.head0 + h;
        if (item.head0 + h >= p.group) break;
        float top = -INFINITY, sum = 0.f, v = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, s.ends[w][h].x);
        #pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float by = weight_of(s.ends[w][h].x, top);
            sum += by * s.ends[w][h].y, v += by * s.out[w][h][i];
        }
#ifdef CLUSTER
        store_remote(&s.gathered[blockIdx.z][n % OWN], n / OWN, make_float4(v, top, sum, 0.f));
#else
        size_t row = (size_t)blockIdx.y * p.group * p.kv_heads + head;
        if (p.splits == 1) {
            p.y[(size_t)item.token * p.y_row + head * VALUE_DIM + i] = out_of(v / sum);
            continue;
        }
        float *to = p.partials + (row * p.splits + blockIdx.z) * (VALUE_DIM + 2);
        to[i] = v;
        if (i == 0) to[VALUE_DIM] = top, to[VALUE_DIM + 1] = sum;
#endif
    }
#ifdef CLUSTER
    cluster_arrive();
    cluster_wait();
    #pragma unroll 1
    for (int n = threadIdx.x; n < OWN; n += WARPS * 32) {
        int all = blockIdx.z * OWN + n, h = all / VALUE_DIM;
        if (h >= HEADS || item.head0 + h >= p.group) break;
        float top = -INFINITY, sum = 0.f, v = 0.f;
        #pragma unroll
        for (int r = 0; r < CLUSTER; r++) top = fmaxf(top, s.gathered[r][n].y);
        #pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            float4 part = s.gathered[r][n];
            float by = weight_of(part.y, top);
            sum += by * part.z, v += by * part.x;
        }
        int head = item.kv_head * p.group + item.head0 + h;
        p.y[(size_t)item.token * p.y_row + head * VALUE_DIM + all % VALUE_DIM] = out_of(v / sum);
    }
#endif
}

#ifndef CLUSTER
// One block for each head (x) of a token, or sequence (y).
extern "C" __global__ void merge(const __grid_constant__ Parameters p) {
    int token = blockIdx.y, head = blockIdx.x;
    begin();
    if (left_to_prefill(p)) return;
#ifdef MIXED
    token = get(p.query_start + token);
#endif
    const float *from = p.partials + ((size_t)blockIdx.y * gridDim.x + head) * p.splits * (VALUE_DIM + 2);
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
