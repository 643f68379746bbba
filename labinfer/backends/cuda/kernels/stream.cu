// Products for a few tokens (at most TOKENS <= 8), on sm_90: tiles of 16 rows x up to CHUNK columns come to shared memory
// by bulk copies that are issued before the wait for the kernel before, while that still runs; with several blocks on a
// multiprocessor, and SLOTS tiles under way for each, one's tile comes while another's is multiplied. Columns are a
// multiple of 64, rows of 16 (8 for GLU). CLUSTER blocks share a tile, each taking every CLUSTER-th chunk of its columns.
// BLOCKS of them are to fit on a multiprocessor. Weights are 16 bits wide, or, with FORMAT, in a block format: as in
// `formats.cuh`, with the tile's rows for all rows.
//
// In 16 bits, lane 4 g + t feeds 16 bytes of rows g, g + 8 and of x straight to two mma: any order of the columns is
// right that is the same on both sides. Rows begin in the same bank, so odd rows read their second 64 bytes first; up to
// 4 tokens, column 2 m of the product has x in the even rows' order and column 2 m + 1 in the odd rows'.
// In a block format that lane unpacks block 4 s + t of both rows, and x lies in the order in which lanes read it.
//
// ROWS: the tokens are rows of x that `selected` numbers, which was written before the first kernel of the step.
#define CHUNK 2048
#ifdef ROWS
#define SELECTED , const int *selected
#else
#define SELECTED
#endif
#ifdef FORMAT
#define SLOTS 2
#define PAIRED false
#else
#define SLOTS 1
#define PAIRED (TOKENS <= 4)
#define PLANES {512}
#define EIGHT_BLOCKS 512
#endif

struct Shared {
    u64 barrier[SLOTS];
    float squares[WARPS][TOKENS];
    float red[WARPS][16][TOKENS];
    float part[CLUSTER][16][TOKENS];
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
DEV int slot_bytes(int columns) { return (min(CHUNK, columns) / 32 * 2 * EIGHT_BLOCKS + 127) / 128 * 128; }
// The first warp asks for a tile, plane by plane: eight rows at once where rows lie together, else each row.
DEV void load_tile(u8 *ws, u64 *barrier, const Parts &parts, int tile, int columns, int start) {
    const int planes[] = PLANES;
    int lane = threadIdx.x, blocks = min(CHUNK, columns - start) / 32;
    if (lane >= 32) return;
    if (lane == 0) barrier_expect(barrier, 2 * blocks * EIGHT_BLOCKS);
    __syncwarp();
    int part = part_of(parts, tile), together = 32 * blocks == columns ? 8 : 1, row = lane * together;
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
        size_t pitch = (size_t)columns / 32 * planes[i] / 8;
        int bytes = blocks * planes[i] / 8;
        bulk_copy(ws + row * bytes, from + first * pitch + start / 32 * planes[i] / 8, together * bytes, barrier);
        from += parts.p[part].rows * pitch, ws += 16 * bytes;
    }
}

#define STEPS (CHUNK / 128 / WARPS)  // of 128 columns, that each warp brings and multiplies: every WARPS-th
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
// Where a lane's four of 128 columns go.
DEV int place_of(int lane) {
#ifdef FORMAT  // lane t then finds its j-th eight columns, of four, at 4 j + t: the lanes of a read lie together
    return (lane / 2 % 4 * 4 + lane / 8) * 8 + lane % 2 * 4;
#else
    return 4 * lane;
#endif
}
DEV uint2 pairs_of(const float4 &v) {
#ifdef FORMAT
    return quad(v.x, v.y, v.z, v.w);
#else
    return make_uint2(two(v.x, v.y), two(v.z, v.w));
#endif
}
// Rows of x from column `start` on to shared memory; all loads are under way before the first is used.
#ifdef NARROW_INPUT  // they are as they are multiplied: a lane brings eight columns
typedef u16 In;
DEV void stage(
    u16 *xs, Shared &, const u16 *x, const int (&rows)[TOKENS], int x_row, int tokens, int start, int width, const Gain &, bool) {
    int lane = threadIdx.x % 32, eighth = lane % 16, part = (threadIdx.x / 32 + lane / 16 * WARPS) * 128;
    uint4 v[TOKENS];
    #pragma unroll
    for (int m = 0; m < TOKENS; m++) {
        bool inside = m < tokens && part + 8 * eighth < width;
        v[m] = inside ? get((const uint4 *)(x + (size_t)rows[m] * x_row + start + part + 8 * eighth)) : make_uint4(0, 0, 0, 0);
    }
    #pragma unroll
    for (int m = 0; m < TOKENS; m++) *(uint4 *)(xs + m * (CHUNK + 32) + part + place_of(2 * eighth)) = v[m];
    __syncwarp();
}
#else
typedef float In;
DEV void stage(
    u16 *xs, Shared &s, const float *x, const int (&rows)[TOKENS], int x_row, int tokens, int start, int width,
    const Gain &gain, bool first) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4 v[TOKENS][STEPS];
    #pragma unroll
    for (int m = 0; m < TOKENS; m++)
        #pragma unroll
        for (int i = 0; i < STEPS; i++) {
            int at = (warp + WARPS * i) * 128 + 4 * lane;
            bool inside = m < tokens && at < width;
            v[m][i] = inside ? get((const float4 *)(x + (size_t)rows[m] * x_row + start + at)) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
    #pragma unroll
    for (int m = 0; m < TOKENS; m++) {
        float squares = 0.f;
        #pragma unroll
        for (int i = 0; i < STEPS; i++) {
            float4 e = v[m][i], by = gain.v[i];
#ifdef NORM
            squares += e.x * e.x + e.y * e.y + e.z * e.z + e.w * e.w;
            e = make_float4(e.x * by.x, e.y * by.y, e.z * by.z, e.w * by.w);
#endif
            *(uint2 *)(xs + m * (CHUNK + 32) + (warp + WARPS * i) * 128 + place_of(lane)) = pairs_of(e);
        }
#ifdef NORM
        squares = warp_sum(squares);
        if (lane == 0 && first) s.squares[warp][m] = (start ? s.squares[warp][m] : 0.f) + squares;
#endif
    }
    __syncwarp();
}
#endif

#ifdef FORMAT
DEV void multiply(float (&d)[4][4], const u8 *ws, const u16 *xs, int width) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Matrix w = matrix(ws, 16, width);
    const uint4 *x = (const uint4 *)(xs + (g < TOKENS ? g : 0) * (CHUNK + 32)) + t;
    #pragma unroll 1
    for (int step = threadIdx.x / 32; step * 128 < width; step += WARPS) {
        int block = min(4 * step + t, w.blocks - 1);  // beyond the end x is zero
        u32 a[16], b[16];
        unpack(load_block(w, g, block), a);
        unpack(load_block(w, g + 8, block), b);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 v = g < TOKENS ? x[16 * step + 4 * j] : make_uint4(0, 0, 0, 0);
            mma(d[j], a[4 * j], b[4 * j], a[4 * j + 1], b[4 * j + 1], v.x, v.y);
            mma(d[j], a[4 * j + 2], b[4 * j + 2], a[4 * j + 3], b[4 * j + 3], v.z, v.w);
        }
    }
}
#else
DEV void multiply(float (&d)[4][4], const u8 *ws, const u16 *xs, int width) {
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

// The warps' sums to shared memory.
DEV void reduce(Shared &s, const float (&d)[4][4]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float e[4];
    #pragma unroll
    for (int j = 0; j < 4; j++) e[j] = (d[0][j] + d[1][j]) + (d[2][j] + d[3][j]);
    if (PAIRED) {
        if (t < TOKENS) s.red[warp][g][t] = g & 1 ? e[1] : e[0], s.red[warp][g + 8][t] = g & 1 ? e[3] : e[2];
    } else {
        #pragma unroll
        for (int j = 0; j < 4; j++)
            if (2 * t + j % 2 < TOKENS) s.red[warp][g + j / 2 * 8][2 * t + j % 2] = e[j];
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) stream(
    const In *x, int x_row, int tokens, int columns, const float *weight, float eps, float offset,
    const float *residual, int residual_row, int function, int tiles, const __grid_constant__ Parts parts SELECTED) {
    extern __shared__ __align__(128) u8 memory[];
    u16 *xs = (u16 *)(memory + SLOTS * slot_bytes(columns));
    __shared__ Shared s;
    int rank = blockIdx.x % CLUSTER, first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    int chunks = (columns + CHUNK - 1) / CHUNK, each = (chunks - rank + CLUSTER - 1) / CLUSTER, staged = -1, at = 0;
    auto load = [&](int n) {  // the block's n-th piece of weights
        int tile = first + n / each * stride, start = (rank + n % each * CLUSTER) * CHUNK;
        if (tile < tiles) load_tile(memory + n % SLOTS * slot_bytes(columns), &s.barrier[n % SLOTS], parts, tile, columns, start);
    };
    if (threadIdx.x == 0)
        for (int i = 0; i < SLOTS; i++) barrier_init(&s.barrier[i]);
#if CLUSTER > 1
    cluster_arrive();  // its memory may be written to
#endif
    for (int n = 0; n < SLOTS; n++) load(n);  // weights do not wait for the kernel before
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
    for (int tile = first; tile < tiles; tile += stride) {
        float d[4][4] = {}, residue = 0.f;
#ifdef ADD
        if (rank == 0) residue = residual_at(parts, tile, tokens, residual, residual_row);
#endif
        for (int chunk = rank; chunk < chunks; chunk += CLUSTER, at++) {
            int start = chunk * CHUNK, width = min(CHUNK, columns - start);
#ifdef NORM
            if (staged >= 0 && staged != chunk) gain = load_gain(weight, offset, start, width);
#endif
            if (staged != chunk) stage(xs, s, x, rows, x_row, tokens, start, width, gain, tile == first);
            staged = chunk;
            barrier_wait(&s.barrier[at % SLOTS], at / SLOTS % 2);
            multiply(d, memory + at % SLOTS * slot_bytes(columns), xs, width);
            if (chunk + CLUSTER >= chunks) reduce(s, d);
            else __syncthreads();
            load(at + SLOTS);
        }
        auto sum = [&](int row, int m) {
            float v = 0.f;
            #pragma unroll
            for (int w = 0; w < WARPS; w++) v += s.red[w][row][m];
            for (int r = 1; r < CLUSTER && rank == 0; r++) v += s.part[r - 1][row][m];
#ifdef NORM
            float squares = 0.f;
            #pragma unroll
            for (int w = 0; w < WARPS; w++) squares += s.squares[w][m];
            v *= rsqrtf(squares / columns + eps);
#endif
            return v;
        };
#if CLUSTER > 1  // a cluster has one tile; the other blocks' sums go to its first block, which finishes it
        cluster_wait();
        if (rank > 0)
            for (int i = threadIdx.x; i < 16 * TOKENS; i += WARPS * 32)
                store_remote(&s.part[rank - 1][i / TOKENS][i % TOKENS], 0, sum(i / TOKENS, i % TOKENS));
        cluster_arrive();
        cluster_wait();
        if (rank == 0)
#endif
            finish(parts, tile, tokens, residue, function, sum);
        if (tile + stride < tiles) __syncthreads();
    }
}
