// A token for each row of logits, chosen as the host's sampler chooses it (labinfer/runtime/sampling), without sorting:
// `adjust` changes logits, `extremes` finds the greatest and the least, `spread` sums the weights of ever less likely
// tokens in bins, and `pick` walks the bins and puts in order only those where the walk ends.
// A token's weight is exp((logit - greatest) / temperature) as a whole number of 2^-44, so that sums of weights do not
// depend on their order, and differ from the host's float64 by less than a draw ever sees.
#define BINS 2048
#define LISTED 1024  // tokens that are put in order at once, one for each thread of `pick`
#define UNIT 17592186044416.0  // 2^44
#define REACH 32.f  // e^-32 is nothing: less than half a unit
#define NOT_A_NUMBER -1
#define ALL_BANNED -2
struct Rule {  // labinfer.backends.sampling.RULE
    double temperature, top_p, floor;  // floor: what a logit may be below the greatest one, by min_p
    u64 seed;
    int index, number, top_k, source;  // source: where the sequence's last token stands if the host does not know it, or -1
    float repetition, frequency, presence;
    int unused;
};
DEV bool is_greedy(const Rule &r) { return r.temperature == 0. || r.top_k == 1; }
DEV bool is_finite(float v) { return fabsf(v) < INFINITY; }

// Numbers in the order of floats; NaN is above all, and -0 is 0.
DEV u32 rank_of(float v) {
    u32 bits = __float_as_uint(v + 0.f);
    return v != v ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEV float value_of(u64 key) {
    u32 rank = key >> 32;
    return __uint_as_float(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}
// Tokens in the order of the walk, the greatest key first: by logit, equal ones by their ids.
DEV u64 key_of(float v, int token) { return (u64)rank_of(v) << 32 | ~(u32)token; }
DEV int token_of(u64 key) { return ~(u32)key; }

DEV u64 shuffled(u64 v, int offset) { return __shfl_xor_sync(FULL, v, offset); }
DEV u64 load_u64(const u64 *p) { uint2 v = get((const uint2 *)p); return (u64)v.y << 32 | v.x; }

// f(logit, token) for every `blocks`-th part of a row.
template <class F> DEV void each(const float *row, int n, int block, int blocks, F f) {
    int start = block * blockDim.x + threadIdx.x, step = blocks * blockDim.x, whole = (u64)row % 16 == 0 ? n / 4 : 0;
    #pragma unroll 1
    for (int i = start; i < whole; i += 4 * step) {
        float4 v[4];
        #pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j * step < whole) v[j] = get((const float4 *)row + i + j * step);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            int token = 4 * (i + j * step);
            if (token >= 4 * whole) break;
            f(v[j].x, token), f(v[j].y, token + 1), f(v[j].z, token + 2), f(v[j].w, token + 3);
        }
    }
    #pragma unroll 1
    for (int i = 4 * whole + start; i < n; i += step) f(get(row + i), i);
}

// Bias (which bans, as minus infinity) and then penalties, one block a row. `spans` [rows, 3]: where among `tokens` and
// `numbers` a row's biased tokens begin, where those that it has had, with how often, and where they end.
DEV float penalized(const Rule &r, float v, int count) {
    if (r.repetition != 1.f) v = v > 0.f ? __fdiv_rn(v, r.repetition) : __fmul_rn(v, r.repetition);
    return __fsub_rn(__fsub_rn(v, __fmul_rn(r.frequency, (float)count)), count > 0 ? r.presence : 0.f);
}
extern "C" __global__ void __launch_bounds__(256) adjust(
    float *logits, int row, const Rule *rules, const int *spans, const int *tokens, const int *numbers, const int *made) {
    __shared__ int was_there;
    begin();
    Rule r = rules[blockIdx.x];
    const int *span = spans + 3 * blockIdx.x;
    int start = get(span), middle = get(span + 1), end = get(span + 2);
    bool penalizes = r.repetition != 1.f || r.frequency != 0.f || r.presence != 0.f;
    int fresh = penalizes && r.source >= 0 ? get(made + r.source) : -1;
    logits += (size_t)blockIdx.x * row;
    was_there = 0;
    for (int i = start + threadIdx.x; i < middle; i += blockDim.x) {
        int token = get(tokens + i);
        logits[token] = get(logits + token) + __int_as_float(get(numbers + i));
    }
    __syncthreads();
    for (int i = middle + threadIdx.x; i < end; i += blockDim.x) {
        int token = get(tokens + i), count = get(numbers + i);
        if (token == fresh) count++, was_there = 1;
        logits[token] = penalized(r, get(logits + token), count);
    }
    __syncthreads();
    if (threadIdx.x == 0 && fresh >= 0 && !was_there) logits[fresh] = penalized(r, get(logits + fresh), 1);
}

// The greater key and the lesser rank, of two, and of a warp's lanes.
DEV void join(u64 &key, u32 &rank, u64 other_key, u32 other_rank) {
    if (other_key > key) key = other_key;
    rank = min(rank, other_rank);
}
DEV void join_lanes(u64 &key, u32 &rank) {
    #pragma unroll
    for (int o = 16; o; o >>= 1) join(key, rank, shuffled(key, o), __shfl_xor_sync(FULL, rank, o));
}

// The greatest key, and the rank of the least logit above minus infinity, of a part (y) of a row (x).
extern "C" __global__ void __launch_bounds__(256) extremes(const float *logits, int row, int n, u64 *best, u32 *least) {
    __shared__ u64 keys[8];
    __shared__ u32 ranks[8];
    begin();
    u64 key = 0;
    u32 rank = 0xffffffffu;
    each(logits + (size_t)blockIdx.x * row, n, blockIdx.y, gridDim.y, [&](float v, int token) {
        u64 other = key_of(v, token);
        if (other > key) key = other;
        if (v != -INFINITY) rank = min(rank, (u32)(other >> 32));
    });
    join_lanes(key, rank);
    if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = key, ranks[threadIdx.x / 32] = rank;
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < 8; w++) join(key, rank, keys[w], ranks[w]);
    best[blockIdx.x * gridDim.y + blockIdx.y] = key;
    least[blockIdx.x * gridDim.y + blockIdx.y] = rank;
}

// What a row's tokens are sorted into: all that a logit's bin and weight depend on.
struct Scale {
    u64 best;  // the greatest key
    float top, by;
    double lowest, inverse;
    DEV bool counts(float v) const { return v != -INFINITY && (double)v >= lowest; }
    DEV int bin(float v) const { return min(BINS - 1, (int)((top - v) * by)); }
    DEV u64 weight(float v) const { return __double2ull_rn(exp(((double)v - (double)top) * inverse) * UNIT); }
};
DEV Scale scale_of(const Rule &r, const u64 *best, const u32 *least, int parts) {
    u64 key = 0;
    u32 rank = 0xffffffffu;
    for (int i = threadIdx.x % 32; i < parts; i += 32) join(key, rank, load_u64(best + i), get((const int *)least + i));
    join_lanes(key, rank);
    Scale s;
    s.best = key, s.top = value_of(key);
    s.by = BINS / fminf(s.top - value_of((u64)rank << 32), REACH * (float)r.temperature);
    if (!is_finite(s.by)) s.by = 0.f;
    s.lowest = (double)s.top + fmax(r.floor, -REACH * r.temperature), s.inverse = 1. / r.temperature;  // less weighs nothing
    return s;
}

// Adds each bin's weights and tokens of a part (y) of a row (x) to `sums` and `counts` [rows, BINS], which are zero.
extern "C" __global__ void __launch_bounds__(512) spread(
    const float *logits, int row, int n, const Rule *rules, const u64 *best, const u32 *least, u64 *sums, u32 *counts) {
    __shared__ u32 low[BINS], high[BINS], count[BINS];  // weights in two halves: shared memory adds 32 bits at once
    begin();
    Rule r = rules[blockIdx.x];
    if (is_greedy(r)) return;
    Scale s = scale_of(r, best + blockIdx.x * gridDim.y, least + blockIdx.x * gridDim.y, gridDim.y);
    if (!is_finite(s.top)) return;
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) low[i] = high[i] = count[i] = 0;
    __syncthreads();
    each(logits + (size_t)blockIdx.x * row, n, blockIdx.y, gridDim.y, [&](float v, int) {
        if (!s.counts(v)) return;
        int bin = s.bin(v);
        u64 weight = s.weight(v);
        u32 was = atomicAdd(&low[bin], (u32)weight);
        u32 more = (u32)(weight >> 32) + (was + (u32)weight < was);
        if (more) atomicAdd(&high[bin], more);
        atomicAdd(&count[bin], 1u);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += blockDim.x)
        if (count[i]) {
            atomicAdd(sums + (size_t)blockIdx.x * BINS + i, (u64)high[i] << 32 | low[i]);
            atomicAdd(counts + (size_t)blockIdx.x * BINS + i, count[i]);
        }
}

// The number in [0, 1) for a token of an answer: Philox-4x32-10, see labinfer/runtime/sampling/random_numbers.py.
DEV double uniform(const Rule &r) {
    u32 a = r.number, b = 0, c = r.index, d = 0, left = r.seed, right = r.seed >> 32;
    #pragma unroll
    for (int i = 0; i < 10; i++) {
        u64 first = (u64)a * 0xD2511F53u, second = (u64)c * 0xCD9E8D57u;
        a = (u32)(second >> 32) ^ b ^ left, b = (u32)second;
        c = (u32)(first >> 32) ^ d ^ right, d = (u32)first;
        left += 0x9E3779B9u, right += 0xBB67AE85u;
    }
    return (double)((u64)a << 21 | b >> 11) * 1.1102230246251565e-16;  // 2^-53
}

// The running sum over the block of 1024 threads, with its own number; `scratch` has 32.
template <class T> DEV T running_sum(T v, T *scratch) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        T other = __shfl_up_sync(FULL, v, o);
        if (lane >= o) v += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = v;
    __syncthreads();
    T before = 0;
    for (int w = 0; w < warp; w++) before += scratch[w];
    return before + v;
}
// The first of n rising numbers that is at least `wanted`, or n.
template <class T> DEV int first_of(const T *rising, int n, T wanted) {
    int low = 0, high = n;
    while (low < high) {
        int middle = (low + high) / 2;
        if (rising[middle] >= wanted) high = middle;
        else low = middle + 1;
    }
    return low;
}

struct End {  // of a walk: the last token's key, and the weights up to it
    u64 key, sum;
};
// The walk over one row's tokens, by a block of LISTED threads.
struct Walk {
    const float *row;
    int n;
    Scale scale;
    u64 sums[BINS];  // running, over the bins
    u32 counts[BINS];
    u64 keys[LISTED], listed[LISTED];  // tokens of bins `from` to `to` in order, and the running sum of their weights
    u64 scratch[32];
    u32 places;
    int from, to;

    DEV u64 sum_before(int bin) const { return bin ? sums[bin - 1] : 0; }
    DEV u32 count_before(int bin) const { return bin ? counts[bin - 1] : 0; }

    // Put the bins around `bin` in order; false if it has too many tokens.
    DEV bool list(int bin) {
        if (from <= bin && bin <= to) return true;
        bool near = counts[bin] <= LISTED;  // all tokens up to it
        int first = near ? 0 : bin, last = near ? first_of(counts, BINS, (u32)LISTED + 1) - 1 : bin;
        u32 count = counts[last] - count_before(first);
        if (count > LISTED) return false;
        __syncthreads();
        keys[threadIdx.x] = 0;
        if (threadIdx.x == 0) places = 0, from = first, to = last;
        __syncthreads();
        each(row, n, 0, 1, [&](float v, int token) {
            if (!scale.counts(v)) return;
            int where = scale.bin(v);
            if (where >= first && where <= last) keys[atomicAdd(&places, 1u)] = key_of(v, token);
        });
        __syncthreads();
        sort(count);
        u64 weight = threadIdx.x < count ? scale.weight(value_of(keys[threadIdx.x])) : 0;
        listed[threadIdx.x] = running_sum(weight, scratch);
        __syncthreads();
        return true;
    }
    // Bitonic, the greatest first; what is behind the `count` keys is zero.
    DEV void sort(u32 count) {
        for (u32 size = 2; size < 2 * count; size *= 2)
            for (u32 apart = size / 2; apart; apart /= 2) {
                u32 other = threadIdx.x ^ apart;
                if (other > threadIdx.x) {
                    u64 a = keys[threadIdx.x], b = keys[other];
                    if ((a < b) == !(threadIdx.x & size)) keys[threadIdx.x] = b, keys[other] = a;
                }
                __syncthreads();
            }
    }
    // Where the weights of the walk, or its tokens, first are as many as `wanted`, which all of them together are.
    DEV End until(u64 wanted, bool by_count) {
        int bin = by_count ? first_of(counts, BINS, (u32)wanted) : first_of(sums, BINS, wanted);
        u64 before = sum_before(bin);
        if (by_count && sums[bin] == before) return {0, before};
        if (!list(bin)) return search(bin, wanted, by_count);
        u64 base = sum_before(from), count = counts[to] - count_before(from);
        int place = by_count ? (int)(wanted - count_before(from)) - 1 : first_of(listed, (int)count, wanted - base);
        return {keys[place], base + listed[place]};
    }
    // The same in a bin of any number of tokens: bit by bit, the greatest key up to which they are enough.
    DEV End search(int bin, u64 wanted, bool by_count) {
        u64 base = by_count ? count_before(bin) : sum_before(bin), key = 0;
        for (int bit = 63; bit >= 0; bit--) {
            u64 tried = key | 1ull << bit;
            if (base + amount(bin, tried, by_count) >= wanted) key = tried;
        }
        return {key, sum_before(bin) + amount(bin, key, false)};
    }
    DEV u64 amount(int bin, u64 least, bool by_count) {
        u64 found = 0;
        each(row, n, 0, 1, [&](float v, int token) {
            if (scale.counts(v) && scale.bin(v) == bin && key_of(v, token) >= least) found += by_count ? 1 : scale.weight(v);
        });
        u64 sum = running_sum(found, scratch);
        __syncthreads();
        if (threadIdx.x == LISTED - 1) scratch[0] = sum;
        __syncthreads();
        return scratch[0];
    }
};

DEV u64 whole(double v, u64 least, u64 most) { return min(max(__double2ull_rz(v), least), most); }

DEV int drawn(const Rule &r, Walk &walk) {
    u64 total = walk.sums[BINS - 1];
    if (r.top_k > 0 && (u32)r.top_k < walk.counts[BINS - 1]) total = walk.until(r.top_k, true).sum;
    if (r.top_p < 1.) total = walk.until(whole(ceil(r.top_p * (double)total), 1, total), false).sum;
    return token_of(walk.until(whole(uniform(r) * (double)total, 0, total - 1) + 1, false).key);
}

// Each row's token, one block a row: to `made`, or a code where there is none. Leaves sums and counts at zero.
extern "C" __global__ void __launch_bounds__(LISTED) pick(
    const float *logits, int row, int n, const Rule *rules, int parts, const u64 *best, const u32 *least, u64 *sums,
    u32 *counts, int *made) {
    __shared__ Walk walk;
    begin();
    Rule r = rules[blockIdx.x];
    Scale s = scale_of(r, best + blockIdx.x * parts, least + blockIdx.x * parts, parts);
    int token = token_of(s.best);
    if (!is_finite(s.top)) {
        token = s.top == -INFINITY ? ALL_BANNED : NOT_A_NUMBER;
    } else if (!is_greedy(r)) {
        u64 *sum = sums + (size_t)blockIdx.x * BINS + 2 * threadIdx.x;
        u32 *count = counts + (size_t)blockIdx.x * BINS + 2 * threadIdx.x;
        u64 weight = load_u64(sum), more = load_u64(sum + 1);
        uint2 number = get((const uint2 *)count);
        sum[0] = sum[1] = 0, count[0] = count[1] = 0;
        u64 running = running_sum(weight + more, walk.scratch);
        walk.sums[2 * threadIdx.x] = running - more, walk.sums[2 * threadIdx.x + 1] = running;
        running = running_sum((u64)number.x + number.y, walk.scratch);
        walk.counts[2 * threadIdx.x] = running - number.y, walk.counts[2 * threadIdx.x + 1] = running;
        if (threadIdx.x == 0) {
            walk.row = logits + (size_t)blockIdx.x * row, walk.n = n, walk.scale = s;
            walk.from = 1, walk.to = 0;
        }
        __syncthreads();
        token = drawn(r, walk);
    }
    if (threadIdx.x == 0) made[blockIdx.x] = token;
}

// Tokens that the host did not know: where an id is negative, -1 - its place in `made`.
extern "C" __global__ void __launch_bounds__(256) feed(int *token_ids, int n, const int *made) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    begin();
    if (i >= n) return;
    int id = get(token_ids + i);
    if (id < 0) token_ids[i] = max(0, get(made - 1 - id));  // a row without a token is computed for nothing
}
