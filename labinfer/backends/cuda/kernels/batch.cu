// Products of a batch of tokens, more than `few.cu` and `stream.cu` take, with weights of 16 bits: a block makes ROWS
// rows of the weight x BATCH tokens. Weights and x, in 16 bits, come COLUMNS columns at a time through shared memory,
// STAGES - 1 times that ahead, and weights before the kernel before has ended. The blocks of a cluster share the columns
// and then the tokens, whose sums each reads from all. GLU: of every 16 rows, 8 are of `w` and 8 of `up`. Where its four
// warps can multiply together (sm_90a), they do so straight from shared memory.
#ifndef CLUSTER
#define CLUSTER 1
#endif
#define ROWS 64
#define COLUMNS 64
#define THREADS 128
#if BATCH == 64 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TOGETHER
#define ACROSS 1
#else
#define ACROSS (BATCH == 64 ? 2 : 1)  // warps side by side
#endif
#define SIXTEENS (ACROSS * ROWS / 64)  // of rows that a warp makes
#define EIGHTS (BATCH / ACROSS / 8)  // of tokens
#define WIDE (ROWS + 4)  // numbers from token to token of the sums: a warp then writes to different banks
struct Parameters {
    const u16 *x, *w, *up;
    const float *residual;
    Out *y;
    int tokens, rows, columns, residual_row, y_row, function;  // columns: of x and of the weights, from row to row
};
struct Stage {  // units of eight numbers, permuted within a row: eight rows then lie in different banks ("128B swizzle")
    uint4 w[ROWS][COLUMNS / 8], x[BATCH][COLUMNS / 8];
};
DEV int place(int row, int unit) { return unit ^ row % 8; }

// Where a thread's rows of weights begin: threadIdx.x / 8, and every 16th after it. Those beyond the end are the last one.
struct Rows {
    const u16 *from[ROWS / 16];
};
DEV Rows rows_of(const Parameters &p) {
    Rows r;
    #pragma unroll
    for (int i = 0; i < ROWS / 16; i++) {
        int row = threadIdx.x / 8 + 16 * i;
#ifdef GLU
        const u16 *w = row % 16 < 8 ? p.w : p.up;
        row = (blockIdx.y * ROWS + row / 16 * 16) / 2 + row % 8;
#else
        const u16 *w = p.w;
        row += blockIdx.y * ROWS;
#endif
        r.from[i] = w + (size_t)min(row, p.rows - 1) * p.columns + threadIdx.x % 8 * 8;
    }
    return r;
}
DEV void ask_weights(Stage &s, const Rows &rows, int start, int columns) {
    int row = threadIdx.x / 8, unit = threadIdx.x % 8;
    bool inside = start + 8 * unit < columns;
    #pragma unroll
    for (int i = 0; i < ROWS / 16; i++) copy16(&s.w[row + 16 * i][place(row, unit)], rows.from[i] + start, inside);
}
DEV void ask_x(Stage &s, const Parameters &p, int start) {
    int first = blockIdx.x * BATCH, unit = threadIdx.x % 8;
    #pragma unroll
    for (int i = 0; i < BATCH / 16; i++) {
        int row = threadIdx.x / 8 + 16 * i;
        bool inside = first + row < p.tokens && start + 8 * unit < p.columns;
        copy16(&s.x[row][place(row, unit)], p.x + (size_t)(first + row) * p.columns + start + 8 * unit, inside);
    }
}

typedef float Sums[SIXTEENS][EIGHTS][4];
#ifdef TOGETHER
static_assert(COLUMNS == 64 && sizeof(Stage) % 1024 == 0, "the order of rows in shared memory");
// What the warps together are told of rows in such an order, eight of them 1024 bytes apart from the next eight.
DEV u64 described(const void *p) { return (shared_address(p) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62; }
// d += a b for 64 rows, 64 tokens and 16 columns.
DEV void mma_together(float (&d)[8][4], u64 a, u64 b) {
#define FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
    asm volatile(
        "{.reg .pred more; setp.eq.b32 more, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." MMA_TYPE "." MMA_TYPE " "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
        " %32, %33, more, 1, 1, 0, 0;}"
        : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7) : "l"(a), "l"(b));
}
DEV void multiply(Sums &d, const Stage &s, int, int) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    u64 w = described(s.w), x = described(s.x);
    #pragma unroll
    for (int k = 0; k < COLUMNS / 8; k += 2) mma_together(d[0], w + k, x + k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// Copies of this thread that have arrived are seen by the warps together.
DEV void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
DEV void show_copies() {}
DEV void multiply(Sums &d, const Stage &s, int row0, int token0) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int k = 0; k < COLUMNS / 8; k += 2) {
        u32 a[SIXTEENS][4], b[4];
        #pragma unroll
        for (int i = 0; i < SIXTEENS; i++) ldmatrix(a[i], &s.w[row0 + 16 * i + lane % 16][place(lane, k + lane / 16)]);
        #pragma unroll
        for (int n = 0; n < EIGHTS; n += 2) {
            ldmatrix(b, &s.x[token0 + 8 * n + lane / 16 * 8 + lane % 8][place(lane, k + lane / 8 % 2)]);
            #pragma unroll
            for (int i = 0; i < SIXTEENS; i++) {
                mma(d[i][n], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                mma(d[i][n + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
            }
        }
    }
}
#endif

// Four sums of all blocks of the cluster.
DEV float4 sum_of(const float *own) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    #pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) {
#if CLUSTER > 1
        float4 v = load_remote((const float4 *)own, rank);
#else
        float4 v = *(const float4 *)own;
#endif
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}
// What becomes of the sums of a token, four at a time.
DEV void finish(const Parameters &p, const float *sums, int token, int four) {
#ifdef GLU
    int at = four / 2 * 16 + four % 2 * 4, row = blockIdx.y * ROWS / 2 + 4 * four;
#else
    int at = 4 * four, row = blockIdx.y * ROWS + at;
#endif
    int m = blockIdx.x * BATCH + token, left = p.rows - row;
    float4 v = sum_of(sums + token * WIDE + at);
#ifdef GLU
    float4 up = sum_of(sums + token * WIDE + at + 8);
    v.x = activate(p.function, v.x) * up.x, v.y = activate(p.function, v.y) * up.y;
    v.z = activate(p.function, v.z) * up.z, v.w = activate(p.function, v.w) * up.w;
#endif
    if (m >= p.tokens || left <= 0) return;
    if (p.residual) {
        float4 more = load(p.residual + (size_t)m * p.residual_row + row, left);
        v.x += more.x, v.y += more.y, v.z += more.z, v.w += more.w;
    }
    store(p.y + (size_t)m * p.y_row + row, left, v.x, v.y, v.z, v.w);
}

extern "C" __global__ void __launch_bounds__(THREADS) batch(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) u8 memory[];
    Stage *stages = (Stage *)memory;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int all = (p.columns + COLUMNS - 1) / COLUMNS, from = all * (int)blockIdx.z / CLUSTER;
    int count = all * (int)(blockIdx.z + 1) / CLUSTER - from, row0 = warp / ACROSS * SIXTEENS * 16, token0 = warp % ACROSS * EIGHTS * 8;
    Rows rows = rows_of(p);
    pdl_trigger();
    for (int n = 0; n < min(STAGES - 1, count); n++) ask_weights(stages[n], rows, (from + n) * COLUMNS, p.columns);
    copies_commit();
    pdl_wait();
    for (int n = 0; n < STAGES - 1; n++) {
        if (n < count) ask_x(stages[n], p, (from + n) * COLUMNS);
        copies_commit();
    }
    Sums d = {};
    #pragma unroll 1
    for (int n = 0; n < count; n++) {
        copies_wait<STAGES - 2>();
        show_copies();
        __syncthreads();
        int next = n + STAGES - 1;
        if (next < count) {
            ask_weights(stages[next % STAGES], rows, (from + next) * COLUMNS, p.columns);
            ask_x(stages[next % STAGES], p, (from + next) * COLUMNS);
        }
        copies_commit();
        multiply(d, stages[n % STAGES], row0, token0);
    }
    __syncthreads();
    float *sums = (float *)memory;
    #pragma unroll
    for (int i = 0; i < SIXTEENS; i++)
        #pragma unroll
        for (int n = 0; n < EIGHTS; n++)
            #pragma unroll
            for (int j = 0; j < 4; j++) sums[(token0 + 8 * n + 2 * t + j % 2) * WIDE + row0 + 16 * i + g + j / 2 * 8] = d[i][n][j];
#if CLUSTER > 1
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
#ifdef GLU
    const int fours = ROWS / 8;
#else
    const int fours = ROWS / 4;
#endif
    for (int i = threadIdx.x; i < BATCH / CLUSTER * fours; i += THREADS)
        finish(p, sums, blockIdx.z * (BATCH / CLUSTER) + i / fours, i % fours);
#if CLUSTER > 1
    cluster_arrive();  // nobody reads this block's sums any more
    cluster_wait();
#endif
}
