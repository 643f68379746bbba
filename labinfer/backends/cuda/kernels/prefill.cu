// Attention of many tokens of a sequence on tensor cores, with a 16-bit cache (FlashAttention-2, Dao, arXiv:2307.08691).
// A block takes 64 tokens of one sequence and one head: each of 4 warps 16 of them. Keys and values come 64 at a time
// through shared memory, the next ones while these are used. Scores are in base 2; SOFTCAP bounds them.
#define ROWS 64
#define KEYS 64
#define WIDE (HEAD_DIM + 8)  // 16-bit numbers from row to row: eight rows then lie in different banks
#define VALUE_WIDE (VALUE_DIM + 8)
struct Parameters {
    const float *q;
    float *y;
    const u16 *k, *v;
    const int *positions, *query_start, *block_table;
    int q_row, y_row, table_row, sequences, group, kv_heads, block_size, window;
    float scale, softcap;
};
struct Shared {
    u16 q[ROWS][WIDE], k[2][KEYS][WIDE], v[2][KEYS][VALUE_WIDE];
};

DEV void copy16(void *to, const void *from, bool inside) {  // zeros where not inside
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
DEV void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
DEV void ldmatrix(u32 (&r)[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}
DEV void ldmatrix_transposed(u32 (&r)[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

// Which sequence, and which of its tokens, a tile of queries is: a warp looks at 32 sequences at once.
struct Tile {
    int sequence, first, end;
};
DEV Tile find_tile(const int *query_start, int sequences, int tile) {
    int lane = threadIdx.x % 32;
    for (int base = 0; base < sequences; base += 32) {
        int s = base + lane, begin = s < sequences ? get(query_start + s) : 0;
        int end = s < sequences ? get(query_start + s + 1) : 0, count = (end - begin + ROWS - 1) / ROWS, sum = count;
        #pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            int other = __shfl_up_sync(FULL, sum, o);
            if (lane >= o) sum += other;
        }
        u32 found = __ballot_sync(FULL, tile < sum);
        if (found) {
            int who = __ffs(found) - 1, before = __shfl_sync(FULL, sum - count, who);
            begin = __shfl_sync(FULL, begin, who), end = __shfl_sync(FULL, end, who);
            return {base + who, begin + (tile - before) * ROWS, end};
        }
        tile -= __shfl_sync(FULL, sum, 31);
    }
    return {-1, 0, 0};
}

DEV void load_keys(Shared &s, int slot, const Parameters &p, const int *table, int kv_head, int start, int end) {
    #pragma unroll
    for (int i = threadIdx.x; i < KEYS * 8; i += 128) {  // eight threads bring a key
        int row = i / 8, key = start + row;
        bool inside = key < end;
        size_t at = 0;
        if (inside) at = (size_t)(get(table + key / p.block_size) * p.block_size + key % p.block_size) * p.kv_heads + kv_head;
        #pragma unroll
        for (int d = i % 8 * 8; d < HEAD_DIM; d += 64) copy16(&s.k[slot][row][d], p.k + at * HEAD_DIM + d, inside);
        #pragma unroll
        for (int d = i % 8 * 8; d < VALUE_DIM; d += 64) copy16(&s.v[slot][row][d], p.v + at * VALUE_DIM + d, inside);
    }
    copies_commit();
}

// Scores of 16 queries with KEYS keys: n-th tile has keys 8 n + 2 t, + 1 for queries g (0, 1) and g + 8 (2, 3).
DEV void scores_of(float (&c)[KEYS / 8][4], const Shared &s, int slot) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
    #pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
        u32 a[4], b[4];
        ldmatrix(a, &s.q[warp * 16 + lane % 16][d + lane / 16 * 8]);
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            ldmatrix(b, &s.k[slot][8 * n + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]);
            mma(c[n], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma(c[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(128) prefill(Parameters p) {
    extern __shared__ __align__(16) u8 memory[];
    Shared &s = *(Shared *)memory;
    int head = blockIdx.y, kv_head = head / p.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    begin();
    Tile tile = find_tile(p.query_start, p.sequences, gridDim.x - 1 - blockIdx.x);  // the longest first
    if (tile.sequence < 0) return;
    int count = min(ROWS, tile.end - tile.first), position0 = get(p.positions + tile.first), last = position0 + count;
    int from = p.window ? max(0, position0 - p.window + 1) / KEYS * KEYS : 0;
    const int *table = p.block_table + (size_t)tile.sequence * p.table_row;
    load_keys(s, 0, p, table, kv_head, from, last);
    #pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM / 2; i += 128) {
        int row = i / (HEAD_DIM / 2), d = i % (HEAD_DIM / 2) * 2;
        const float *q = p.q + (size_t)(tile.first + row) * p.q_row + head * HEAD_DIM + d;
        *(u32 *)&s.q[row][d] = row < count ? two(get(q), get(q + 1)) : 0;
    }
    float out[VALUE_DIM / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    int mine = position0 + warp * 16 + g;  // and mine + 8
    #pragma unroll 1
    for (int start = from, slot = 0; start < last; start += KEYS, slot ^= 1) {
        bool more = start + KEYS < last;
        if (more) load_keys(s, slot ^ 1, p, table, kv_head, start + KEYS, last);
        if (more) copies_wait<1>();
        else copies_wait<0>();
        __syncthreads();
        float c[KEYS / 8][4], high[2] = {top[0], top[1]};
        scores_of(c, s, slot);
        bool edge = start + KEYS > position0 || p.window;  // some of these keys some of the queries do not see
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                int key = start + 8 * n + 2 * t + j % 2, query = mine + j / 2 * 8;
                float v = c[n][j] * p.scale;
#ifdef SOFTCAP
                v = tanhf(v / p.softcap) * p.softcap;
#endif
                c[n][j] = edge && (key > query || (p.window && key <= query - p.window)) ? -INFINITY : v * 1.44269504f;
                high[j / 2] = fmaxf(high[j / 2], c[n][j]);
            }
        float old[2];
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            high[r] = fmaxf(high[r], __shfl_xor_sync(FULL, high[r], 1));
            high[r] = fmaxf(high[r], __shfl_xor_sync(FULL, high[r], 2));
            old[r] = weight_of(top[r], high[r]);
            top[r] = high[r];
            sum[r] *= old[r];
        }
        #pragma unroll
        for (int n = 0; n < VALUE_DIM / 8; n++)
            #pragma unroll
            for (int j = 0; j < 4; j++) out[n][j] *= old[j / 2];
        #pragma unroll
        for (int k = 0; k < KEYS; k += 16) {
            float w[2][4];
            #pragma unroll
            for (int n = 0; n < 2; n++)
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    float v = c[k / 8 + n][j];
                    w[n][j] = weight_of(v, top[j / 2]);
                    sum[j / 2] += w[n][j];
                }
            u32 a[4] = {two(w[0][0], w[0][1]), two(w[0][2], w[0][3]), two(w[1][0], w[1][1]), two(w[1][2], w[1][3])};
            #pragma unroll
            for (int n = 0; n < VALUE_DIM / 8; n += 2) {
                u32 b[4];
                ldmatrix_transposed(b, &s.v[slot][k + lane % 16][8 * n + lane / 16 * 8]);
                mma(out[n], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma(out[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
        __syncthreads();
    }
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(FULL, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL, sum[r], 2);
        int row = warp * 16 + g + 8 * r;
        if (row >= count) continue;
        float *y = p.y + (size_t)(tile.first + row) * p.y_row + head * VALUE_DIM + 2 * t;
        #pragma unroll
        for (int n = 0; n < VALUE_DIM / 8; n++) y[8 * n] = out[n][2 * r] / sum[r], y[8 * n + 1] = out[n][2 * r + 1] / sum[r];
    }
}
