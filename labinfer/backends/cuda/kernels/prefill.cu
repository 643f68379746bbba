// Attention of many tokens of a sequence on tensor cores, with a 16-bit cache (FlashAttention-2, Dao, arXiv:2307.08691).
// A block takes ROWS tokens of one sequence and one head: each warp 16 of them. Keys and values come KEYS at a time
// through shared memory, the next ones while these are used. Scores are in base 2; SOFTCAP bounds them. MIXED: sequences
// of one token are left to `decode.cu`.
#define THREADS (2 * ROWS)
#define KEPT (HEAD_DIM == 128)  // queries stay in registers, of which there are enough
#define WIDE (HEAD_DIM + 8)  // 16-bit numbers from row to row: eight rows then lie in different banks
#define VALUE_WIDE (VALUE_DIM + 8)
struct Parameters {
    const float *q;
    Out *y;
    const u16 *k, *v;
    const int *positions, *query_start, *block_table;
    int q_row, y_row, table_row, sequences, group, kv_heads, block_size, window;
    float scale, softcap;
    u32 reciprocal;  // as in attention.cuh
};
struct Shared {
    u16 q[ROWS][WIDE], k[2][KEYS][WIDE], v[2][KEYS][VALUE_WIDE];
};

DEV void ldmatrix_transposed(u32 (&r)[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

// Which sequence, and which of its tokens, a tile of queries is, counted from the end: the last of a long prompt has the
// most keys, and blocks without a tile come last. A warp looks at 32 sequences at once.
struct Tile {
    int sequence, first, end;
};
DEV Tile find_tile(const int *query_start, int sequences, int tile) {
    int lane = threadIdx.x % 32;
    for (int base = (sequences - 1) / 32 * 32; base >= 0; base -= 32) {
        int s = base + 31 - lane, begin = s < sequences ? get(query_start + s) : 0;
        int end = s < sequences ? get(query_start + s + 1) : 0, count = (end - begin + ROWS - 1) / ROWS;
#ifdef MIXED
        if (end - begin == 1) count = 0;
#endif
        int sum = count;
        #pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            int other = __shfl_up_sync(FULL, sum, o);
            if (lane >= o) sum += other;
        }
        u32 found = __ballot_sync(FULL, tile < sum);
        if (found) {
            int who = __ffs(found) - 1, before = __shfl_sync(FULL, sum - count, who);
            begin = __shfl_sync(FULL, begin, who), end = __shfl_sync(FULL, end, who), count = __shfl_sync(FULL, count, who);
            return {base + 31 - who, begin + (count - 1 - (tile - before)) * ROWS, end};
        }
        tile -= __shfl_sync(FULL, sum, 31);
    }
    return {-1, 0, 0};
}

DEV void load_keys(Shared &s, int slot, const Parameters &p, const int *table, int kv_head, int start, int end) {
    #pragma unroll
    for (int i = threadIdx.x; i < KEYS * 8; i += THREADS) {  // eight threads bring a key
        int row = i / 8, key = start + row;
        bool inside = key < end;
        size_t at = 0;
        if (inside) {
            u32 block = p.block_size == 1 ? key : __umulhi(key, p.reciprocal);
            at = (size_t)((get(table + block) - block) * p.block_size + key) * p.kv_heads + kv_head;
        }
        #pragma unroll
        for (int d = i % 8 * 8; d < HEAD_DIM; d += 64) copy16(&s.k[slot][row][d], p.k + at * HEAD_DIM + d, inside);
        #pragma unroll
        for (int d = i % 8 * 8; d < VALUE_DIM; d += 64) copy16(&s.v[slot][row][d], p.v + at * VALUE_DIM + d, inside);
    }
    copies_commit();
}

// A warp's 16 queries, as `mma` takes them.
struct Queries {
    u32 a[HEAD_DIM / 16][4];
};
DEV void load_query(u32 (&a)[4], const Shared &s, int d) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    ldmatrix(a, &s.q[warp * 16 + lane % 16][d + lane / 16 * 8]);
}

// Scores of 16 queries with KEYS keys: n-th tile has keys 8 n + 2 t, + 1 for queries g (0, 1) and g + 8 (2, 3).
DEV void scores_of(float (&c)[KEYS / 8][4], const Shared &s, int slot, const Queries &kept) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
    #pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
        u32 a[4], b[4];
        if (!KEPT) load_query(a, s, d);
        else
            #pragma unroll
            for (int i = 0; i < 4; i++) a[i] = kept.a[d / 16][i];
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            ldmatrix(b, &s.k[slot][8 * n + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]);
            mma(c[n], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma(c[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// What a score is worth: bounded, and hidden (minus infinity) where its query does not see its key.
DEV void mask(float (&c)[KEYS / 8][4], const Parameters &p, int start, int mine, bool edge) {
    int t = threadIdx.x % 4;
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            int key = start + 8 * n + 2 * t + j % 2, query = mine + j / 2 * 8;
#ifdef SOFTCAP
            c[n][j] = tanhf(c[n][j] / p.softcap) * p.softcap * 1.44269504f;
#endif
            if (edge && (key > query || (p.window && key <= query - p.window))) c[n][j] = -INFINITY;
        }
}

// A warp's running maximum, sum of weights and weighted sum of values, for queries g and g + 8 of each lane.
struct State {
    float out[VALUE_DIM / 8][4], top[2], sum[2];
};
DEV void attend(
    State &state, const Shared &s, int slot, const Queries &queries, const Parameters &p, int start, int mine, bool edge) {
    int lane = threadIdx.x % 32;
    float c[KEYS / 8][4], high[2] = {state.top[0], state.top[1]};
    scores_of(c, s, slot, queries);
    mask(c, p, start, mine, edge);
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        #pragma unroll
        for (int j = 0; j < 4; j++) high[j / 2] = fmaxf(high[j / 2], c[n][j]);
    float old[2];
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        high[r] = fmaxf(high[r], __shfl_xor_sync(FULL, high[r], 1));
        high[r] = fmaxf(high[r], __shfl_xor_sync(FULL, high[r], 2));
        old[r] = weight_of(state.top[r], high[r]);
        state.top[r] = high[r];
        state.sum[r] *= old[r];
        if (high[r] == -INFINITY) high[r] = 0.f;  // no key is seen yet: scores are infinite, weights 0
    }
    #pragma unroll
    for (int n = 0; n < VALUE_DIM / 8; n++)
        #pragma unroll
        for (int j = 0; j < 4; j++) state.out[n][j] *= old[j / 2];
    #pragma unroll
    for (int k = 0; k < KEYS; k += 16) {
        float w[2][4];
        #pragma unroll
        for (int n = 0; n < 2; n++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                w[n][j] = two_to(c[k / 8 + n][j] - high[j / 2]);
                state.sum[j / 2] += w[n][j];
            }
        u32 a[4] = {two(w[0][0], w[0][1]), two(w[0][2], w[0][3]), two(w[1][0], w[1][1]), two(w[1][2], w[1][3])};
        #pragma unroll
        for (int n = 0; n < VALUE_DIM / 8; n += 2) {
            u32 b[4];
            ldmatrix_transposed(b, &s.v[slot][k + lane % 16][8 * n + lane / 16 * 8]);
            mma(state.out[n], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma(state.out[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) prefill(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) u8 memory[];
    Shared &s = *(Shared *)memory;
    int head = blockIdx.x, kv_head = head / p.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    begin();
    Tile tile = find_tile(p.query_start, p.sequences, blockIdx.y);
    if (tile.sequence < 0) return;
    int count = min(ROWS, tile.end - tile.first), position0 = get(p.positions + tile.first), last = position0 + count;
    int from = p.window ? max(0, position0 - p.window + 1) / KEYS * KEYS : 0;
    const int *table = p.block_table + (size_t)tile.sequence * p.table_row;
    load_keys(s, 0, p, table, kv_head, from, last);
#ifdef SOFTCAP
    float scale = p.scale;
#else
    float scale = p.scale * 1.44269504f;
#endif
    #pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM / 2; i += THREADS) {
        int row = i / (HEAD_DIM / 2), d = i % (HEAD_DIM / 2) * 2;
        const float *q = p.q + (size_t)(tile.first + row) * p.q_row + head * HEAD_DIM + d;
        *(u32 *)&s.q[row][d] = row < count ? two(get(q) * scale, get(q + 1) * scale) : 0;
    }
    __syncthreads();
    Queries queries;
    if (KEPT)
        #pragma unroll
        for (int d = 0; d < HEAD_DIM; d += 16) load_query(queries.a[d / 16], s, d);
    State state = {{}, {-INFINITY, -INFINITY}, {}};
    int mine = position0 + warp * 16 + g, furthest = warp * 16 < count ? mine - g + 15 : -1;  // of the warp's queries
    #pragma unroll 1
    for (int start = from, slot = 0; start < last; start += KEYS, slot ^= 1) {
        bool more = start + KEYS < last;
        if (more) load_keys(s, slot ^ 1, p, table, kv_head, start + KEYS, last);
        if (more) copies_wait<1>();
        else copies_wait<0>();
        __syncthreads();
        bool edge = start + KEYS > position0 || p.window;  // some of these keys some of the queries do not see
        if (start <= furthest) attend(state, s, slot, queries, p, start, mine, edge);
        __syncthreads();
    }
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = state.sum[r];
        sum += __shfl_xor_sync(FULL, sum, 1);
        sum += __shfl_xor_sync(FULL, sum, 2);
        int row = warp * 16 + g + 8 * r;
        if (row >= count) continue;
        Out *y = p.y + (size_t)(tile.first + row) * p.y_row + head * VALUE_DIM + 2 * t;
        #pragma unroll
        for (int n = 0; n < VALUE_DIM / 8; n++) store_two(y + 8 * n, state.out[n][2 * r] / sum, state.out[n][2 * r + 1] / sum);
    }
}
