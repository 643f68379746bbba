// Products for a few tokens (at most TOKENS <= 8), on sm_90: tiles of 16 rows x up to CHUNK columns come to shared memory
// by bulk copies that are issued before the wait for the kernel before, while that still runs; with several blocks on a
// multiprocessor, and SLOTS tiles under way for each, one's tile comes while another's is multiplied. Columns of 16 bits
// are a multiple of 64, rows of 16 (8 for GLU). CLUSTER blocks share a tile, each taking every CLUSTER-th chunk of its columns.
// BLOCKS of them are to fit on a multiprocessor. Weights are 16 bits wide, or, with FORMAT, in a block format; see `staged.cuh`.
//
// In 16 bits, lane 4 g + t feeds 16 bytes of rows g, g + 8 and of x straight to two mma: any order of the columns is
// right that is the same on both sides. Rows begin in the same bank, so odd rows read their second 64 bytes first; up to
// 4 tokens, column 2 m of the product has x in the even rows' order and column 2 m + 1 in the odd rows'.
//
// ROWS: the tokens are rows of x that `selected` numbers, which was written before the first kernel of the step.
#ifdef ROWS
#define SELECTED , const int *selected
#else
#define SELECTED
#endif
#ifndef FORMAT
#define PAIRED (TOKENS <= 4)
#define TOGETHER false
#define PLANES {512}
#define EIGHT_BLOCKS 512
DEV int blocks_of(int columns) { return columns / 32; }
typedef float Sums[4][4];
struct Kept {};
#endif

#ifdef FORMAT  // tiles that are finished together
#define GROUP (CLUSTER > 1 || TOKENS > 2 ? 1 : 4 / TOKENS)
#else
#define GROUP 1
#endif
#define BUFFERS (CLUSTER > 1 ? 1 : 2)  // while one group is finished, the next is begun
struct Shared {
    u64 barrier[SLOTS];
    float squares[WARPS][TOKENS];
    float red[BUFFERS * GROUP][CLUSTER * WARPS][16][TOKENS];
    Kept kept;
};

DEV void barrier_init(u64 *b) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(b)) : "memory");
}
DEV void barrier_expect(u64 *b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
DEV void barrier_wait(u64 *b, int phase) {
    asm volatile("{\n.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}"
                 ::"r"(shared_address(b)), "r"(phase) : "memory");
}
DEV void bulk_copy(void *to, const void *from, int bytes, u64 *b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)) : "memory");
}
// Bytes of a slot: a tile, at an address that bulk copies are fast to.
DEV int slot_bytes(int columns) { return (blocks_of(min(CHUNK, columns)) * 2 * EIGHT_BLOCKS + 127) / 128 * 128; }
// The first warp asks for a tile, plane by plane: eight rows at once where they lie together, else each row.
DEV void load_tile(u8 *ws, u64 *barrier, const Parts &parts, int tile, int columns, int start) {
    const int planes[] = PLANES;
    int lane = threadIdx.x, all = blocks_of(columns), blocks = blocks_of(min(CHUNK, columns - start));
    if (lane == 0) barrier_expect(barrier, 2 * blocks * EIGHT_BLOCKS);
    __syncwarp();
    int part = part_of(parts, tile), together = TOGETHER || blocks == all ? 8 : 1, row = lane * together;
    if (row >= 16) return;
#ifdef GLU
    part = row / 8;
    size_t first = tile * 8 + row % 8;
#else
    size_t first = tile * 16 + row;
#endif
    const u8 *from = parts.p[part].w;
    #pragma unroll
    for (int i = 0; i < (int)(sizeof(planes) / sizeof(int)); i++) {
        size_t eight = (size_t)all * planes[i];  // bytes of eight rows
        int bytes = blocks * planes[i] / 8;
        bulk_copy(ws + row * bytes, from + first * eight / 8 + start / 32 * planes[i] / 8 * together, bytes * together, barrier);
        from += parts.p[part].rows / 8 * eight, ws += 16 * bytes;
    }
}

#define STEPS (CHUNK / 128 / WARPS)  // of 128 columns, that each warp brings and multiplies: every WARPS-th
#ifdef FORMAT  // tokens whose numbers are brought at once, as registers allow
#define AT_ONCE (TOKENS > 4 ? 4 : TOKENS)
#else
#define AT_ONCE TOKENS
#endif
struct Gain {
    float4 v[STEPS];
};
DEV Gain load_gain(const float *weight, float offset, int start, int width) {
    Gain gain;
    #pragma unroll
    for (int i = 0; i < STEPS; i++) {
        int at = (threadIdx.x / 32 + WARPS * i) * 128 + threadIdx.x % 32 * 4;
        float none = 1.f - offset;
        float4 v = weight && at < width ? *(const float4 *)(weight + start + at) : make_float4(none, none, none, none);
        gain.v[i] = make_float4(v.x + offset, v.y + offset, v.z + offset, v.w + offset);
    }
    return gain;
}
#ifndef FORMAT
template <int N> DEV void keep(u16 *xs, Kept &, int m, int column, const float (&v)[N]) {
    *(uint2 *)(xs + m * (CHUNK + 32) + column) = make_uint2(two(v[0], v[1]), two(v[2], v[3]));
}
#endif
// Rows of x from column `start` on to shared memory; all loads are under way before the first is used.
#ifdef NARROW_INPUT  // they are as they are multiplied: a lane brings eight columns
typedef u16 In;
DEV void stage(
    u16 *xs, Shared &s, const u16 *x, const int (&rows)[TOKENS], int x_row, int tokens, int start, int width, const Gain &, bool) {
    int lane = threadIdx.x % 32, eighth = lane % 16, part = (threadIdx.x / 32 + lane / 16 * WARPS) * 128;
    uint4 v[TOKENS];
    #pragma unroll
    for (int m = 0; m < TOKENS; m++) {
        bool inside = m < tokens && part + 8 * eighth < width;
        v[m] = inside ? get((const uint4 *)(x + (size_t)rows[m] * x_row + start + part + 8 * eighth)) : make_uint4(0, 0, 0, 0);
    }
    #pragma unroll
    for (int m = 0; m < TOKENS; m++) {
#ifdef FORMAT
        u32 words[4] = {v[m].x, v[m].y, v[m].z, v[m].w};
        float wide[8];
        #pragma unroll
        for (int i = 0; i < 8; i++) wide[i] = from_f16((u16)(words[i / 2] >> i % 2 * 16));
        keep(xs, s.kept, m, part + 8 * eighth, wide);
#else
        *(uint4 *)(xs + m * (CHUNK + 32) + part + 8 * eighth) = v[m];
#endif
    }
    __syncwarp();
}
#else
typedef float In;
DEV void stage(
    u16 *xs, Shared &s, const float *x, const int (&rows)[TOKENS], int x_row, int tokens, int start, int width,
    const Gain &gain, bool first) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4 v[AT_ONCE][STEPS];
    float squares[TOKENS] = {};
    #pragma unroll
    for (int m = 0; m < TOKENS; m++) {
        if (m % AT_ONCE == 0)
            #pragma unroll
            for (int i = 0; i < AT_ONCE * STEPS; i++) {
                int token = m + i / STEPS, at = (warp + WARPS * (i % STEPS)) * 128 + 4 * lane;
                bool inside = token < tokens && at < width;
                v[i / STEPS][i % STEPS] = inside ? get((const float4 *)(x + (size_t)rows[token] * x_row + start + at)) : make_float4(0.f, 0.f, 0.f, 0.f);
            }
        #pragma unroll
        for (int i = 0; i < STEPS; i++) {
            float4 e = v[m % AT_ONCE][i], by = gain.v[i];
#ifdef NORM
            squares[m] += e.x * e.x + e.y * e.y + e.z * e.z + e.w * e.w;
            e = make_float4(e.x * by.x, e.y * by.y, e.z * by.z, e.w * by.w);
#endif
            keep(xs, s.kept, m, (warp + WARPS * i) * 128 + 4 * lane, {e.x, e.y, e.z, e.w});
        }
    }
#ifdef NORM
    #pragma unroll
    for (int m = 0; m < TOKENS; m++) squares[m] = warp_sum(squares[m]);
    if (lane == 0 && first)
        #pragma unroll
        for (int m = 0; m < TOKENS; m++) s.squares[warp][m] = (start ? s.squares[warp][m] : 0.f) + squares[m];
#endif
    __syncwarp();
}
#endif

#ifndef FORMAT
DEV void multiply(Sums &d, const Kept &, const u8 *ws, const u16 *xs, int width) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, odd = 32 * (g & 1);
    int m = PAIRED ? g / 2 : g, x0 = PAIRED ? odd : 0;
    bool on = m < TOKENS;
    const u16 *w = (const u16 *)ws + g * width + 8 * t, *x = xs + (on ? m : 0) * (CHUNK + 32) + 8 * t;
    #pragma unroll 2
    for (int i = 0; i < 2 * STEPS; i++) {
        int k = (warp + i / 2 * WARPS) * 128 + i % 2 * 64;
        if (k >= width) break;
        uint4 v0 = make_uint4(0, 0, 0, 0), v1 = v0;
        if (on) v0 = *(const uint4 *)(x + k + x0), v1 = *(const uint4 *)(x + k + 32 - x0);
        uint4 a0 = *(const uint4 *)(w + k + odd), a1 = *(const uint4 *)(w + k + 32 - odd);
        uint4 b0 = *(const uint4 *)(w + k + odd + 8 * width), b1 = *(const uint4 *)(w + k + 32 - odd + 8 * width);
        if (!PAIRED && odd) {
            uint4 z = a0;
            a0 = a1, a1 = z, z = b0, b0 = b1, b1 = z;
        }
        mma(d[0], a0.x, b0.x, a0.y, b0.y, v0.x, v0.y);
        mma(d[1], a0.z, b0.z, a0.w, b0.w, v0.z, v0.w);
        mma(d[2], a1.x, b1.x, a1.y, b1.y, v1.x, v1.y);
        mma(d[3], a1.z, b1.z, a1.w, b1.w, v1.z, v1.w);
    }
}
#endif

// A warp's sum of one row and token, for the k-th tile of a group, to shared memory: of a cluster, to its first block's.
DEV void put(Shared &s, int k, int row, int m, float v) {
    int warp = threadIdx.x / 32;
#if CLUSTER > 1
    store_remote(&s.red[k][blockIdx.x % CLUSTER * WARPS + warp][row][m], 0, v);
#else
    s.red[k][warp][row][m] = v;
#endif
}
DEV void put_sums(Shared &s, int k, const Sums &d) {
#if CLUSTER > 1
    cluster_wait();  // the first block has begun
#endif
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#if FORMAT && BYTES
    #pragma unroll
    for (int i = 0; i < 2 * TOKENS; i++) {
        float sum = d[i / 2][i % 2];
        sum += __shfl_xor_sync(FULL, sum, 1);
        sum += __shfl_xor_sync(FULL, sum, 2);
        if (t == 0) put(s, k, g + i % 2 * 8, i / 2, sum);
    }
#else
    float e[4];
    #pragma unroll
    for (int j = 0; j < 4; j++) e[j] = (d[0][j] + d[1][j]) + (d[2][j] + d[3][j]);
    if (PAIRED) {
        if (t < TOKENS) put(s, k, g, t, g & 1 ? e[1] : e[0]), put(s, k, g + 8, t, g & 1 ? e[3] : e[2]);
    } else {
        #pragma unroll
        for (int j = 0; j < 4; j++)
            if (2 * t + j % 2 < TOKENS) put(s, k, g + j / 2 * 8, 2 * t + j % 2, e[j]);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) stream(
    const In *x, int x_row, int tokens, int columns, const float *weight, float eps, float offset,
    const float *residual, int residual_row, int function, int tiles, const __grid_constant__ Parts parts SELECTED) {
    extern __shared__ __align__(128) u8 memory[];
    u16 *xs = (u16 *)(memory + SLOTS * slot_bytes(columns));
    __shared__ Shared s;
    int rank = blockIdx.x % CLUSTER, first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    int chunks = (columns + CHUNK - 1) / CHUNK, each = (chunks - rank + CLUSTER - 1) / CLUSTER, staged = -1, at = 0;
    int pieces = (tiles - first + stride - 1) / stride * each;  // of weights, that are the block's
    auto load = [&](int n) {
        if (threadIdx.x >= 32) return;
        int tile = first + n / each * stride, start = (rank + n % each * CLUSTER) * CHUNK;
        load_tile(memory + n % SLOTS * slot_bytes(columns), &s.barrier[n % SLOTS], parts, tile, columns, start);
    };
    if (threadIdx.x == 0)
        for (int i = 0; i < SLOTS; i++) barrier_init(&s.barrier[i]);
#ifdef FORMAT
    if (threadIdx.x < 2) s.kept.zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
#endif
#if CLUSTER > 1
    cluster_arrive();  // its memory may be written to
#endif
    for (int n = 0; n < min(SLOTS, pieces); n++) load(n);  // weights do not wait for the kernel before
    Gain gain = load_gain(weight, offset, rank * CHUNK, min(CHUNK, columns - rank * CHUNK));
    int rows[TOKENS];
    #pragma unroll
    for (int m = 0; m < TOKENS; m++) {
        rows[m] = m;
#ifdef ROWS
        rows[m] = m < tokens ? get(selected + m) : 0;
#endif
    }
    __syncthreads();
    pdl_trigger();
    pdl_wait();
    int own = threadIdx.x / (16 * TOKENS), item = threadIdx.x % (16 * TOKENS);  // what the thread finishes of a group
    for (int group = first, place = 0; group < tiles; group += GROUP * stride, place = (place + GROUP) % (BUFFERS * GROUP)) {
        int finished = group + own * stride;
        bool finishes = own < GROUP && finished < tiles && rank == 0;
        float residue = 0.f;
#ifdef ADD
        if (finishes) residue = residual_at(parts, finished, item, tokens, residual, residual_row);
#endif
        for (int k = 0; k < GROUP && group + k * stride < tiles; k++) {
            Sums d = {};
            for (int chunk = rank; chunk < chunks; chunk += CLUSTER, at++) {
                int start = chunk * CHUNK, width = min(CHUNK, columns - start);
#ifdef NORM
                if (staged >= 0 && staged != chunk) gain = load_gain(weight, offset, start, width);
#endif
                if (staged != chunk) stage(xs, s, x, rows, x_row, tokens, start, width, gain, at == chunk);
                staged = chunk;
                barrier_wait(&s.barrier[at % SLOTS], at / SLOTS % 2);
                multiply(d, s.kept, memory + at % SLOTS * slot_bytes(columns), xs, width);
                if (chunk + CLUSTER >= chunks) put_sums(s, place + k, d);
                if (at + SLOTS >= pieces) continue;
                __syncthreads();
                load(at + SLOTS);
            }
        }
#if CLUSTER > 1
        cluster_arrive();
        cluster_wait();
#else
        if (at - 1 + SLOTS >= pieces) __syncthreads();
#endif
        auto sum = [&](int row, int m) {
            float v = 0.f;
            #pragma unroll
            for (int w = 0; w < CLUSTER * WARPS; w++) v += s.red[place + own][w][row][m];
#ifdef NORM
            float squares = 0.f;
            #pragma unroll
            for (int w = 0; w < WARPS; w++) squares += s.squares[w][m];
            v *= rsqrtf(squares / columns + eps);
#endif
            return v;
        };
        if (finishes) finish(parts, finished, item, tokens, residue, function, sum);
    }
}
