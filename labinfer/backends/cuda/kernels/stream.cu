// Products for a few tokens (at most TOKENS <= 8) with 16-bit weights, on sm_90: tiles of 16 rows x up to CHUNK columns
// come to shared memory by bulk copies that are issued before the wait for the kernel before, while that still runs;
// with several blocks on a multiprocessor, one's tile comes while another's is multiplied. Columns are a multiple of
// 64, rows of 16 (8 for GLU). CLUSTER blocks share a tile, each taking every CLUSTER-th chunk of its columns.
//
// Lane 4 g + t feeds 16 bytes of rows g, g + 8 and of x straight to two mma: any order of the columns is right that is
// the same on both sides. Rows begin in the same bank, so odd rows read their second 64 bytes first; up to 4 tokens,
// column 2 m of the product has x in the even rows' order and column 2 m + 1 in the odd rows'.
#define CHUNK 2048
#define PAIRED (TOKENS <= 4)

struct Shared {
    u64 barrier;
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
// The first warp asks for a tile: four copies of four rows where rows lie together, else one for each row.
DEV void load_tile(u16 *ws, Shared &s, const Parts &parts, int tile, int columns, int start) {
    int lane = threadIdx.x, width = min(CHUNK, columns - start);
    if (lane >= 32) return;
    if (lane == 0) barrier_expect(&s.barrier, 16 * width * 2);
    __syncwarp();
    int part = part_of(parts, tile), together = width == columns ? 4 : 1, row = lane * together;
    if (row >= 16) return;
#ifdef GLU
    const u16 *from = (const u16 *)parts.p[row / 8].w + (size_t)(tile * 8 + row % 8) * columns;
#else
    const u16 *from = (const u16 *)parts.p[part].w + (size_t)(tile * 16 + row) * columns;
#endif
    bulk_copy(ws + row * width, from + start, together * width * 2, &s.barrier);
}

#define STEPS (CHUNK / 64 / WARPS)  // of 64 columns, that each warp brings and multiplies: every WARPS-th
struct Gain {
    float2 v[STEPS];
};
DEV Gain load_gain(const float *weight, float offset, int start, int width) {
    Gain gain;
    #pragma unroll
    for (int i = 0; i < STEPS; i++) {
        int at = (threadIdx.x / 32 + WARPS * i) * 64 + threadIdx.x % 32 * 2;
        gain.v[i] = weight && at < width ? *(const float2 *)(weight + start + at) : make_float2(1.f - offset, 1.f - offset);
        gain.v[i].x += offset, gain.v[i].y += offset;
    }
    return gain;
}
// Rows of x from column `start` on to shared memory; all loads are under way before the first is used.
DEV void stage(u16 *xs, Shared &s, const float *x, int x_row, int tokens, int start, int width, const Gain &gain, bool first) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float2 v[TOKENS][STEPS];
    #pragma unroll
    for (int m = 0; m < TOKENS; m++)
        #pragma unroll
        for (int i = 0; i < STEPS; i++) {
            int at = (warp + WARPS * i) * 64 + 2 * lane;
            bool inside = m < tokens && at < width;
            v[m][i] = inside ? get((const float2 *)(x + (size_t)m * x_row + start + at)) : make_float2(0.f, 0.f);
        }
    #pragma unroll
    for (int m = 0; m < TOKENS; m++) {
        float squares = 0.f;
        #pragma unroll
        for (int i = 0; i < STEPS; i++) {
            float2 e = v[m][i];
#ifdef NORM
            squares += e.x * e.x + e.y * e.y;
            e.x *= gain.v[i].x, e.y *= gain.v[i].y;
#endif
            *(u32 *)(xs + m * (CHUNK + 32) + (warp + WARPS * i) * 64 + 2 * lane) = two(e.x, e.y);
        }
#ifdef NORM
        squares = warp_sum(squares);
        if (lane == 0 && first) s.squares[warp][m] = (start ? s.squares[warp][m] : 0.f) + squares;
#endif
    }
    __syncwarp();
}

DEV void multiply(float (&d)[4][4], const u16 *ws, const u16 *xs, int width) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, odd = 32 * (g & 1);
    int m = PAIRED ? g / 2 : g, x0 = PAIRED ? odd : 0;
    bool on = m < TOKENS;
    const u16 *w = ws + g * width + 8 * t, *x = xs + (on ? m : 0) * (CHUNK + 32) + 8 * t;
    #pragma unroll 2
    for (int k = warp * 64; k < width; k += WARPS * 64) {
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

extern "C" __global__ void __launch_bounds__(WARPS * 32, TOKENS <= 2 && CLUSTER == 1 ? 3 : 2) stream(
    const float *x, int x_row, int tokens, int columns, const float *weight, float eps, float offset,
    const float *residual, int residual_row, int function, int tiles, const __grid_constant__ Parts parts) {
    extern __shared__ __align__(128) u8 memory[];
    u16 *ws = (u16 *)memory, *xs = ws + 16 * min(CHUNK, columns);
    __shared__ Shared s;
    int rank = blockIdx.x % CLUSTER, tile = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER, phase = 0;
    int chunks = (columns + CHUNK - 1) / CHUNK, first = tile, staged = -1;
    if (threadIdx.x == 0) barrier_init(&s.barrier);
#if CLUSTER > 1
    cluster_arrive();  // its memory may be written to
#endif
    load_tile(ws, s, parts, tile, columns, rank * CHUNK);  // weights do not wait for the kernel before
    Gain gain = load_gain(weight, offset, rank * CHUNK, min(CHUNK, columns - rank * CHUNK));
    __syncthreads();
    pdl_trigger();
    pdl_wait();
    for (; tile < tiles; tile += stride) {
        float d[4][4] = {}, residue = 0.f;
#ifdef ADD
        if (rank == 0) residue = residual_at(parts, tile, tokens, residual, residual_row);
#endif
        for (int chunk = rank; chunk < chunks; chunk += CLUSTER) {
            int start = chunk * CHUNK, width = min(CHUNK, columns - start);
#ifdef NORM
            if (staged >= 0 && staged != chunk) gain = load_gain(weight, offset, start, width);
#endif
            if (staged != chunk) stage(xs, s, x, x_row, tokens, start, width, gain, tile == first);
            staged = chunk;
            barrier_wait(&s.barrier, phase);
            multiply(d, ws, xs, width);
            phase ^= 1;
            bool more = chunk + CLUSTER < chunks;
            if (!more) reduce(s, d);
            else __syncthreads();
            if (more) load_tile(ws, s, parts, tile, columns, start + CLUSTER * CHUNK);
            else if (tile + stride < tiles) load_tile(ws, s, parts, tile + stride, columns, rank * CHUNK);
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
