// What `stream.cu` does with tiles in block formats (STAGED), whose rows are, in shared memory, all rows of a matrix.
//
// For one token or two (BYTES), products are of bytes: x is rounded to 16 bits of the greatest number in its block, and
// lane 4 g + t takes block 4 s + t of rows g and g + 8. Columns 2 b and 2 b + 1 of a product have the upper and lower
// bytes of x in block 4 s + b and zeros for the others, so that a block's sums come out by themselves, and exact, where
// its scale is. For more tokens that costs more than it saves: then that lane unpacks its blocks to f16.
#define TOGETHER true
#define PAIRED false
#define BYTES (TOKENS <= 2)
#if BYTES
typedef float Sums[TOKENS][2];  // for rows g and g + 8
#else
typedef float Sums[4][4];
#endif
#define MOST 32512.f  // of a number's 16 bits: 127 * 256
struct Rounded {  // a block of x
    float scale;  // over UPPER
    int sums[2], unused;  // over the first and last 16 columns, times what ZERO or a minimum stand there for
};
struct Kept {  // beside `xs`
    Rounded blocks[BYTES ? TOKENS : 1][CHUNK / 32];
    uint4 zeros[2];
};

// N columns of x from `column` on, by each lane. As bytes, a block has first the upper, then the lower ones; in f16, lane t
// finds its j-th eight columns, of four, at 4 j + t: the lanes of a read lie together.
template <int N> DEV void keep(u16 *xs, Kept &kept, int m, int column, const float (&v)[N]) {
    u32 *to = (u32 *)(xs + m * (CHUNK + 32)) + column / 128 * 64;
#if BYTES
    u32 most = 0;
    #pragma unroll
    for (int i = 0; i < N; i++) most = max(most, __float_as_uint(fabsf(v[i])));  // NaN is above all
    #pragma unroll
    for (int o = 1; o < 32 / N; o *= 2) most = max(most, __shfl_xor_sync(FULL, most, o));
    float top = __uint_as_float(most), by = top > 0.f ? __fdividef(MOST, top) : 0.f;
    int sum = 0, ones = 0x01010101, at = column % 128 / 32 * 16 + column % 32 / 4;
    #pragma unroll
    for (int i = 0; i < N; i += 4) {
        u32 q[4];  // 2^23 and more: the low bits are of a whole number, here with 128 more
        #pragma unroll
        for (int j = 0; j < 4; j++) q[j] = __float_as_uint(fmaf(v[i + j], by, 12582912.f + 128.f));
        u32 upper = __byte_perm(__byte_perm(q[0], q[1], 0x0051), __byte_perm(q[2], q[3], 0x0051), 0x5410);
        u32 lower = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410) ^ 0x80808080u;
        sum += 256 * __dp4a((int)upper, ones, 0) + __dp4a((int)lower, ones, 0);
        to[at + i / 4] = upper, to[at + i / 4 + 8] = lower;
    }
    #pragma unroll
    for (int o = 1; o < 16 / N; o *= 2) sum += __shfl_xor_sync(FULL, sum, o);
    int last = column / 16 % 2;
    Rounded &block = kept.blocks[m][column / 32];
    if (column % 16 == 0) block.sums[last] = sum * (ZERO ? -ZERO * (last ? UPPER : 1) : UPPER);
    if (column % 32 == 0) block.scale = top * (1.f / MOST / UPPER);
#else
    int eighth = column % 128 / 8;
    uint2 *quads = (uint2 *)to + (eighth % 4 * 4 + eighth / 4) * 2 + column % 8 / 4;
    #pragma unroll
    for (int i = 0; i < N; i += 4) quads[i / 4] = quad(v[i], v[i + 1], v[i + 2], v[i + 3]);
#endif
}

#if BYTES
// d = a b + c, of bytes: as `mma`, with four numbers for each of its two.
#if FORMAT == Q8_0
#define CODE_TYPE "s8"
#else
#define CODE_TYPE "u8"
#endif
DEV void mma_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32." CODE_TYPE ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
#endif
DEV void multiply(Sums &d, const Kept &kept, const u8 *ws, const u16 *xs, int width) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Matrix w = matrix(ws, 16, width);
    #pragma unroll 1  // measured
    for (int step = threadIdx.x / 32; step * 4 < w.blocks; step += WARPS) {
        Raw above = load_block(w, 32 * step + lane), below = load_block(w, 32 * step + lane + 8 * w.blocks);
#if BYTES
        Scales scales[2] = {scales_of(above.scales), scales_of(below.scales)};
        u32 a[8], b[8];
        codes_of(above, a), codes_of(below, b);
        const int none[4] = {};
        #pragma unroll
        for (int m = 0; m < TOKENS; m++) {
            const uint4 *x = g / 2 == t ? (const uint4 *)(xs + m * (CHUNK + 32)) + 4 * (4 * step + t) + g % 2 * 2 : kept.zeros;
            uint4 first = x[0], last = x[1];
            Rounded block = kept.blocks[m][4 * step + t];
            int low[4], high[4];
            mma_bytes(low, a[0], b[0], a[1], b[1], first.x, first.y, none);
            mma_bytes(low, a[2], b[2], a[3], b[3], first.z, first.w, low);
            mma_bytes(high, a[4], b[4], a[5], b[5], last.x, last.y, none);
            mma_bytes(high, a[6], b[6], a[7], b[7], last.z, last.w, high);
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                int u = low[2 * i] * 256 + low[2 * i + 1], v = high[2 * i] * 256 + high[2 * i + 1];
                if (ZERO) u += block.sums[0], v += block.sums[1];
#if FORMAT == Q6_K
                d[m][i] += block.scale * (scales[i].d0 * (float)u + scales[i].d1 * (float)v);
#else
                d[m][i] += block.scale * (scales[i].d0 * (float)(u * UPPER + v));
                if (MINIMA) d[m][i] += block.scale * (scales[i].m0 * (float)(block.sums[0] + block.sums[1]));
#endif
            }
        }
#else
        const uint4 *x = (const uint4 *)(xs + (g < TOKENS ? g : 0) * (CHUNK + 32)) + 16 * step + t;
        u32 a[16], b[16];
        unpack(above, a), unpack(below, b);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 v = g < TOKENS ? x[4 * j] : make_uint4(0, 0, 0, 0);
            mma(d[j], a[4 * j], b[4 * j], a[4 * j + 1], b[4 * j + 1], v.x, v.y);
            mma(d[j], a[4 * j + 2], b[4 * j + 2], a[4 * j + 3], b[4 * j + 3], v.z, v.w);
        }
#endif
    }
}
