// Attention of each query to its sequence's cached keys on tensor cores, with a 16-bit cache and heads of 64 or 128:
// `attention.cu` does the same for the rest. Each warp takes KEYS keys at a time, which come to its own part of shared
// memory while those before are used. The rows of a product are heads; queries,
// in 16 bits, have what that leaves out in rows 8 to 15, so that scores are as from float32. See `attention.cuh`.
#define KEYS 16
#define SLOTS 2  // measured: with more, blocks start later and fewer have room
#define BLOCKS (HEAD_DIM + VALUE_DIM <= 128 ? 4 : 3)
#define UNITS (HEAD_DIM / 8)  // of eight numbers, 16 bytes, of a head
#define VALUE_UNITS (VALUE_DIM / 8)
struct Slot {  // eight lanes that read at once read different banks: units are permuted within a row
    uint4 k[KEYS][UNITS], v[KEYS][VALUE_UNITS];
};
DEV int key_unit(int row, int unit) { return unit ^ row % 2 * 4; }
DEV int value_unit(int row, int unit) { return unit ^ row / 2 % 4 * 2; }
struct State {  // of head g: greatest score; for it, of numbers 16 t + j (0) and 16 t + 8 + j (1), + 64 i, the weighted sum
    float max, sum, out[VALUE_DIM / 64][8][2];
};
struct Shared {
    __align__(16) u16 q[2][HEADS][HEAD_DIM + 32];  // queries, and what their 16 bits leave out
    __align__(16) u16 k[HEAD_DIM], v[VALUE_DIM];  // the token's own
    Ends ends;
};

// As `mma`, with nothing in rows 8 to 15.
DEV void mma_upper(float &d0, float &d1, u32 a0, u32 a2, u32 b0, u32 b1) {
    float none0, none1;
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%8,%5,%8}, {%6,%7}, {%0,%1,%9,%9};"
        : "+f"(d0), "+f"(d1), "=f"(none0), "=f"(none1) : "r"(a0), "r"(a2), "r"(b0), "r"(b1), "r"(0), "f"(0.f));
}
DEV u32 word(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Asks for KEYS keys and values, whose rows in the cache the first lanes have: 0 for those beyond the `count` that exist.
DEV void ask(Slot &slot, const Parameters &p, u32 rows, int count) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < KEYS * UNITS / 32; i++) {
        int row = (lane + 32 * i) / UNITS, unit = lane % UNITS;
        copy16(&slot.k[row][key_unit(row, unit)], (const uint4 *)p.k + (size_t)__shfl_sync(FULL, rows, row) * UNITS + unit, row < count);
    }
    #pragma unroll
    for (int i = 0; i < KEYS * VALUE_UNITS / 32; i++) {
        int row = (lane + 32 * i) / VALUE_UNITS, unit = lane % VALUE_UNITS;
        copy16(&slot.v[row][value_unit(row, unit)], (const uint4 *)p.v + (size_t)__shfl_sync(FULL, rows, row) * VALUE_UNITS + unit, row < count);
    }
}

// The weights, in 16 bits, of keys 2 t, 2 t + 1 (x) and 2 t + 8, 2 t + 9 (y) of a slot for head g; `count` keys exist.
DEV uint2 weigh(State &state, const Parameters &p, const Shared &s, const Slot &slot, int count) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float d[KEYS / 8][4] = {}, score[KEYS / 8][2], top = state.max;
    #pragma unroll 2  // more takes registers that another block needs
    for (int j = 0; j < HEAD_DIM / 32; j++) {  // lane 4 g + t has numbers 8 t + 32 j and the seven after them
        uint4 q = make_uint4(0, 0, 0, 0), rest = q;
        if (g < HEADS) q = *(const uint4 *)&s.q[0][g][8 * t + 32 * j], rest = *(const uint4 *)&s.q[1][g][8 * t + 32 * j];
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            uint4 k = slot.k[8 * n + g][key_unit(g, t + 4 * j)];
            mma(d[n], q.x, rest.x, q.y, rest.y, k.x, k.y);
            mma(d[n], q.z, rest.z, q.w, rest.w, k.z, k.w);
        }
    }
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            float s = d[n][i] + d[n][i + 2];
#ifdef SOFTCAP
            s = tanhf(s / p.softcap) * p.softcap * 1.44269504f;
#endif
            score[n][i] = 8 * n + 2 * t + i < count ? s : -INFINITY;
            top = fmaxf(top, score[n][i]);
        }
    top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
    top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
    float old = weight_of(state.max, top);
    state.max = top;
    state.sum *= old;
    #pragma unroll
    for (int i = 0; i < VALUE_DIM / 8; i++)
        #pragma unroll
        for (int c = 0; c < 2; c++) state.out[i / 8][i % 8][c] *= old;
    return make_uint2(
        two(weight_of(score[0][0], top), weight_of(score[0][1], top)), two(weight_of(score[1][0], top), weight_of(score[1][1], top)));
}
DEV void add_values(State &state, uint2 weights, const Slot &slot) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    u32 ones = two(1.f, 1.f);
    float same = 0.f;
    mma_upper(state.sum, same, weights.x, weights.y, ones, ones);
    #pragma unroll
    for (int i = 0; i < VALUE_DIM / 64; i++) {
        uint4 v[4];  // numbers 8 g + 64 i and the seven after them
        #pragma unroll
        for (int n = 0; n < 4; n++) {
            int row = 2 * t + n % 2 + n / 2 * 8;
            v[n] = slot.v[row][value_unit(row, g + 8 * i)];
        }
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 half = j % 2 ? 0x7632 : 0x5410;
            u32 low = __byte_perm(word(v[0], j / 2), word(v[1], j / 2), half);
            u32 high = __byte_perm(word(v[2], j / 2), word(v[3], j / 2), half);
            mma_upper(state.out[i][j][0], state.out[i][j][1], weights.x, weights.y, low, high);
        }
    }
}

// A block's queries to shared memory; `load` brings a thread's eight numbers of a head.
template <class Load> DEV void stage_queries(Shared &s, const Parameters &p, const Item &item, int d, Load load) {
    const float *queries = p.q + (size_t)item.token * p.q_row + (item.kv_head * p.group + item.head0) * HEAD_DIM;
    float scale = p.scale;
#ifndef SOFTCAP
    scale *= 1.44269504f;
#endif
    #pragma unroll
    for (int h = threadIdx.x / UNITS; h < HEADS; h += WARPS * 32 / UNITS) {
        float q[8];
        load(q, queries + min(h, p.group - item.head0 - 1) * HEAD_DIM);
        #pragma unroll
        for (int i = 0; i < 8; i += 2) {
            float a = q[i] * scale, b = q[i + 1] * scale;
            u32 near = two(a, b);
            *(u32 *)&s.q[0][h][d + i] = near;
            *(u32 *)&s.q[1][h][d + i] = two(a - one(near & 0xffff), b - one(near >> 16));
        }
    }
}
#ifdef NORMS
// Norms a head, of which UNITS neighbouring lanes have eight numbers each, and those they turn with.
DEV void norm_head(Pairs &r, const float *gain, const Norms &norms, int d, int other) {
    u32 lanes = ((1u << UNITS) - 1) << threadIdx.x % 32 / UNITS * UNITS;
    float squares = 0.f;
    #pragma unroll
    for (int i = 0; i < 8; i++) squares += r.own[i] * r.own[i];
    #pragma unroll
    for (int o = UNITS / 2; o; o >>= 1) squares += __shfl_xor_sync(lanes, squares, o);
    float scale = rsqrtf(squares / HEAD_DIM + norms.eps);
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        r.own[i] *= scale * (gain ? gain[d + i] + norms.offset : 1.f);
        r.other[i] *= scale * (gain ? gain[other + i] + norms.offset : 1.f);
    }
}
#define GAIN(name) norms.name
#else
#define GAIN(name) nullptr
#endif
DEV void keep(u16 *shared, u16 *cache, const float (&v)[8]) {
    uint4 r = make_uint4(two(v[0], v[1]), two(v[2], v[3]), two(v[4], v[5]), two(v[6], v[7]));
    *(uint4 *)shared = r;
    if (cache) *(uint4 *)cache = r;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) decode(const __grid_constant__ Parameters p FRESH) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ Shared s;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, d = threadIdx.x % UNITS * 8;
    pdl_trigger();
#ifndef TURN
    pdl_wait();
#endif
    if (left_to_prefill(p)) return;
#ifdef CLUSTER
    cluster_arrive();
#endif
    Item item = item_of(p);
    int key0 = item.start + warp * KEYS, end = item.end;
    Slot *slots = (Slot *)memory + warp * SLOTS;
#ifdef TURN  // what earlier steps left does not wait for the kernel before: a tape's first kernel has waited for them
    bool has_fresh = end == item.position + 1 && item.start < end;
    u32 fresh_row = has_fresh ? row_of(p, item, item.position) : 0;
    end -= has_fresh;
    Eighth e = eighth_of(fresh.turn, item.token, item.position, d);
#endif
    auto rows_of = [&](int key0) { return key0 + lane % KEYS < end ? (u32)row_of(p, item, key0 + lane % KEYS) : 0; };
    #pragma unroll 1
    for (int i = 0; i < SLOTS; i++) {
        int start = key0 + i * WARPS * KEYS;
        ask(slots[i], p, rows_of(start), end - start);
        copies_commit();
    }
    u32 rows = rows_of(key0 + SLOTS * WARPS * KEYS);
#ifdef TURN
    pdl_wait();
    auto loader = [&](const float *gain) {
        return [&, gain](float (&r)[8], const float *row) {
            Pairs pairs;
            load_pairs(pairs, row, d, e.other);
#ifdef NORMS
            norm_head(pairs, gain, norms, d, e.other);
#endif
            #pragma unroll
            for (int i = 0; i < 8; i++) r[i] = turned(pairs, e, i);
        };
    };
    auto load = loader(GAIN(q_gain));
    int unit = WARPS * 32 - 1 - threadIdx.x;  // the last threads take the token's own value and key
    if (has_fresh && unit < UNITS) {
        float own[8];
        loader(GAIN(k_gain))(own, fresh.k + (size_t)item.token * fresh.k_row + item.kv_head * HEAD_DIM);
        keep(s.k + d, item.head0 ? nullptr : p.k + (size_t)fresh_row * HEAD_DIM + d, own);
    } else if (has_fresh && unit < UNITS + VALUE_DIM / 8) {
        float own[8];
        int at = (unit - UNITS) * 8;
        load_floats(own, fresh.v + (size_t)item.token * fresh.v_row + item.kv_head * VALUE_DIM + at);
        keep(s.v + at, item.head0 ? nullptr : p.v + (size_t)fresh_row * VALUE_DIM + at, own);
    }
#else
    auto load = [&](float (&r)[8], const float *row) {
        #pragma unroll
        for (int i = 0; i < 8; i++) r[i] = get(row + d + i);
    };
#endif
    stage_queries(s, p, item, d, load);
    __syncthreads();
    State state = {-INFINITY};
    int at = 0;
    #pragma unroll 1
    for (; key0 < end; key0 += WARPS * KEYS, at = at + 1 < SLOTS ? at + 1 : 0) {
        copies_wait<SLOTS - 1>();
        __syncwarp();
        uint2 weights = weigh(state, p, s, slots[at], end - key0);
        add_values(state, weights, slots[at]);
        __syncwarp();
        int next = key0 + SLOTS * WARPS * KEYS;
        ask(slots[at], p, rows, end - next);
        copies_commit();
        rows = rows_of(next + WARPS * KEYS);
    }
#ifdef TURN
    if (has_fresh && warp == (end - item.start + KEYS - 1) / KEYS % WARPS) {  // the warp with the fewest keys
        copies_wait<0>();
        __syncwarp();
        if (lane < UNITS) slots->k[0][key_unit(0, lane)] = ((const uint4 *)s.k)[lane];
        if (lane < VALUE_UNITS) slots->v[0][value_unit(0, lane)] = ((const uint4 *)s.v)[lane];
        __syncwarp();
        add_values(state, weigh(state, p, s, *slots, 1), *slots);
    }
#endif
    if (g < HEADS) {
        if (t == 0) s.ends.ends[warp][g] = make_float2(state.max, state.sum);
        #pragma unroll
        for (int i = 0; i < VALUE_DIM / 64; i++)
            #pragma unroll
            for (int c = 0; c < 2; c++) {
                float4 *to = (float4 *)&s.ends.out[warp][g][64 * i + 16 * t + 8 * c];
                const float(&o)[8][2] = state.out[i];
                to[0] = make_float4(o[0][c], o[1][c], o[2][c], o[3][c]), to[1] = make_float4(o[4][c], o[5][c], o[6][c], o[7][c]);
            }
    }
    join(p, s.ends, item);
}
