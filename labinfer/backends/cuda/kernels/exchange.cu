// Collectives of RANKS GPUs that can write to each other's memory. Each has a mailbox. A rank pushes its part to all the
// others and takes the parts that came in the order of ranks, so that sums have the same bits everywhere. Both halves of
// a mailbox are used in turn: what comes from a rank in one turn shows that it has read all of the turn before.
//
// Of up to FEW times four numbers each travels in a word with the turn that it belongs to, so that no flag has to follow
// and a reader looks at the word itself (NCCL's protocol "LL"). Many go in pieces of PIECE times four, each of which a count
// follows; BLOCKS blocks at most do that, each with pieces and counts of its own. Turns and counts are kept here, so that
// a graph can be launched again.

struct Mailbox {
    u32 turn, arrived;  // of the few: turns that are over, and blocks that have begun the present one
    u32 none[30];
    u32 counts[BLOCKS][32];  // of the many, by rank: pieces that have come, at its own place pieces exchanged
    u64 few[2][RANKS][FEW][4];
    float4 many[2][RANKS][BLOCKS][PIECE];
};
static_assert(sizeof(Mailbox) == BYTES, "the plan says so");

struct Peers {
    Mailbox *boxes[8];
    const int *left;  // on the host: not 0 once a rank has failed, for which nobody should wait
    int rank;
};
DEV bool in_vain(const Peers &peers, int looks) { return looks % 1024 == 1023 && *(const volatile int *)peers.left; }

// A result [rows, n] of a thread's four columns from column i on, of which all parts are there.
struct Sum {
    const float *residual;
    float *y;
    int residual_row, y_row, n;
    DEV void operator()(int row, int i, const float4 (&parts)[RANKS]) const {
        float4 sum = parts[0];
        #pragma unroll
        for (int r = 1; r < RANKS; r++)
            sum = make_float4(sum.x + parts[r].x, sum.y + parts[r].y, sum.z + parts[r].z, sum.w + parts[r].w);
        if (residual) {
            float4 to = load(residual + (size_t)row * residual_row + i, n - i);
            sum = make_float4(to.x + sum.x, to.y + sum.y, to.z + sum.z, to.w + sum.w);
        }
        store(y + (size_t)row * y_row + i, n - i, sum.x, sum.y, sum.z, sum.w);
    }
};
struct Join {
    float *y;
    int y_row, starts[9];
    DEV void operator()(int row, int i, const float4 (&parts)[RANKS]) const {
        #pragma unroll
        for (int r = 0; r < RANKS; r++) {
            int left = starts[r + 1] - starts[r] - i;
            float4 v = parts[r];
            if (left > 0) store(y + (size_t)row * y_row + starts[r] + i, left, v.x, v.y, v.z, v.w);
        }
    }
};

// This rank's part: `own` columns, of which one from i on are wanted; the widest part has n.
struct Own {
    const float *x;
    int x_row, own, rows, n;
    DEV float4 four(int row, int i) const {
        return i < own ? load(x + (size_t)row * x_row + i, own - i) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
};

DEV void send(u64 *to, u32 turn, float4 v) {
    u64 mark = (u64)turn << 32;
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};\nst.relaxed.sys.global.v2.b64 [%0+16], {%3, %4};"
                 ::"l"(to), "l"(mark | __float_as_uint(v.x)), "l"(mark | __float_as_uint(v.y)),
                 "l"(mark | __float_as_uint(v.z)), "l"(mark | __float_as_uint(v.w)) : "memory");
}
DEV float4 receive(const Peers &peers, const u64 *from, u32 turn) {
    u64 a, b, c, d;
    for (int looks = 0; !in_vain(peers, looks); looks++) {
        asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%4];\nld.relaxed.sys.global.v2.b64 {%2, %3}, [%4+16];"
                     : "=l"(a), "=l"(b), "=l"(c), "=l"(d) : "l"(from) : "memory");
        if (a >> 32 == turn && b >> 32 == turn && c >> 32 == turn && d >> 32 == turn) break;
    }
    return make_float4(__uint_as_float((u32)a), __uint_as_float((u32)b), __uint_as_float((u32)c), __uint_as_float((u32)d));
}
// Each thread takes four columns of a row (block y).
template <class Use> DEV void few(const Peers &peers, const Own &own, const Use &use) {
    __shared__ u32 shared;
    Mailbox *here = peers.boxes[peers.rank];
    int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
    bool there = i < own.n;
    begin();
    if (threadIdx.x == 0) shared = get((const int *)&here->turn) + 1;
    __syncthreads();
    u32 turn = shared;
    size_t place = (size_t)row * ((own.n + 3) / 4) + i / 4;
    float4 parts[RANKS], part = own.four(row, i);
    #pragma unroll
    for (int r = 0; r < RANKS; r++)
        if (there && r != peers.rank) send(peers.boxes[r]->few[turn % 2][peers.rank][place], turn, part);
    if (threadIdx.x == 0) {
        u32 before, blocks = gridDim.x * gridDim.y;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&here->arrived) : "memory");
        if (before == blocks - 1) here->arrived = 0, here->turn = turn;  // all blocks know the turn
    }
    if (!there) return;
    #pragma unroll
    for (int r = 0; r < RANKS; r++)
        parts[r] = r == peers.rank ? part : receive(peers, here->few[turn % 2][r][place], turn);
    use(row, i, parts);
}

DEV void raise(u32 *count, u32 to) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(count), "r"(to) : "memory"); }
DEV void wait_for(const Peers &peers, const u32 *count, u32 wanted) {
    u32 found;
    for (int looks = 0; !in_vain(peers, looks); looks++) {
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
        if ((int)(found - wanted) >= 0) break;
    }
}
// Each block takes every gridDim-th piece of the rows, one after another.
template <class Use> DEV void many(const Peers &peers, const Own &own, const Use &use) {
    Mailbox *here = peers.boxes[peers.rank];
    int block = blockIdx.x, fours = (own.n + 3) / 4, all = own.rows * fours;
    begin();
    u32 count = get((const int *)&here->counts[block][peers.rank]);
    for (int first = block * PIECE; first < all; first += gridDim.x * PIECE) {
        int at = first + threadIdx.x, row = at / fours, i = at % fours * 4;
        bool there = at < all;
        float4 parts[RANKS], part = there ? own.four(row, i) : make_float4(0.f, 0.f, 0.f, 0.f);
        count++;
        #pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != peers.rank) peers.boxes[r]->many[count % 2][peers.rank][block][threadIdx.x] = part;
        __syncthreads();
        #pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != peers.rank && threadIdx.x == r) {
                raise(&peers.boxes[r]->counts[block][peers.rank], count);
                wait_for(peers, &here->counts[block][r], count);
            }
        __syncthreads();
        #pragma unroll
        for (int r = 0; r < RANKS; r++)
            parts[r] = r == peers.rank ? part : get(&here->many[count % 2][r][block][threadIdx.x]);
        if (there) use(row, i, parts);
    }
    if (threadIdx.x == 0) here->counts[block][peers.rank] = count;
}

extern "C" __global__ void all_reduce_few(Peers peers, Own own, Sum sum) { few(peers, own, sum); }
extern "C" __global__ void all_gather_few(Peers peers, Own own, Join join) { few(peers, own, join); }
extern "C" __global__ void __launch_bounds__(PIECE, 1) all_reduce_many(Peers peers, Own own, Sum sum) { many(peers, own, sum); }
extern "C" __global__ void __launch_bounds__(PIECE, 1) all_gather_many(Peers peers, Own own, Join join) { many(peers, own, join); }
