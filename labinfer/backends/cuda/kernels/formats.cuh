// Weights in their stored formats, as layout.py lays them out. FORMAT is one of the numbers below.
#define F32 0
#define F16 1
#define BF16 2
#define Q8_0 3
#define Q4_0 4
#define Q4_1 5
#define Q5_0 6
#define Q5_1 7
#define Q4_K 8
#define Q5_K 9
#define Q6_K 10
#define PLAIN (FORMAT <= BF16)
#define NIBBLES (FORMAT >= Q4_0)

// Blocks of 32 columns that a row is stored in.
DEV int blocks_of(int columns) { return PLAIN ? (columns + 31) / 32 : (columns + 127) / 128 * 4; }
// A matrix [rows, columns] whose first plane is at `at`.
struct Matrix {
    const u8 *at;
    int rows, columns, blocks;
};
DEV Matrix matrix(const u8 *at, int rows, int columns) { return {at, rows, columns, blocks_of(columns)}; }
// Which block of a plane it is.
DEV size_t place_of(const Matrix &w, size_t row, int block) {
    return PLAIN ? row * w.blocks + block : ((row / 8 * (w.blocks / 4) + block / 4) * 8 + row % 8) * 4 + block % 4;
}
// Where a plane begins that follows `before` bytes for every block.
DEV const u8 *plane(const Matrix &w, int before) { return w.at + (size_t)(w.rows + 7) / 8 * 8 * w.blocks * before; }

#ifdef STAGED  // in shared memory
template <class T> DEV T stored(const T *p) { return *p; }
#else
template <class T> DEV T stored(const T *p) { return __ldg(p); }
#endif

// A number is code * d + m, with other d and m for the first and last 16 columns of a block.
struct Scales {
    float d0, m0, d1, m1;
};
#if !PLAIN
// Bytes of eight blocks in each plane.
#if FORMAT == Q8_0
#define PLANES {128, 128, 16}
#define EIGHT_BLOCKS 272
#elif FORMAT == Q4_0
#define PLANES {128, 16}
#define EIGHT_BLOCKS 144
#elif FORMAT == Q4_1
#define PLANES {128, 32}
#define EIGHT_BLOCKS 160
#elif FORMAT == Q5_0
#define PLANES {128, 32, 16}
#define EIGHT_BLOCKS 176
#elif FORMAT == Q5_1
#define PLANES {128, 32, 32}
#define EIGHT_BLOCKS 192
#elif FORMAT == Q4_K
#define PLANES {128, 16, 4}
#define EIGHT_BLOCKS 148
#elif FORMAT == Q5_K
#define PLANES {128, 32, 16, 4}
#define EIGHT_BLOCKS 180
#else
#define PLANES {128, 64, 16, 2}
#define EIGHT_BLOCKS 210
#endif
// Bytes of a block's codes, their further bits included.
#define CODE_BYTES (FORMAT == Q8_0 ? 32 : FORMAT == Q5_0 || FORMAT == Q5_1 || FORMAT == Q5_K ? 20 : FORMAT == Q6_K ? 24 : 16)
// What is taken off a code: codes are then signed.
#define ZERO (FORMAT == Q4_0 ? 8 : FORMAT == Q5_0 ? 16 : FORMAT == Q6_K ? 32 : 0)

#define MINIMA (FORMAT == Q4_1 || FORMAT == Q5_1 || FORMAT == Q4_K || FORMAT == Q5_K)

// The scales of the block at place b as they are stored: at most two words. Eight blocks of a row share one of them.
DEV uint2 load_scales(const Matrix &w, size_t b) {
    const u8 *p = plane(w, CODE_BYTES);
#if FORMAT == Q4_1 || FORMAT == Q5_1
    return make_uint2(stored((const u32 *)p + b), 0);
#elif FORMAT == Q6_K
    return make_uint2(stored((const u16 *)p + b), stored((const u16 *)plane(w, CODE_BYTES + 2) + b / 64 * 8 + b / 4 % 8));
#elif FORMAT == Q4_K || FORMAT == Q5_K
    return make_uint2(stored((const u16 *)p + b), stored((const u32 *)plane(w, CODE_BYTES + 2) + b / 64 * 8 + b / 4 % 8));
#else
    return make_uint2(stored((const u16 *)p + b), 0);
#endif
}
DEV Scales scales_of(uint2 stored) {
#if FORMAT == Q8_0 || FORMAT == Q4_0 || FORMAT == Q5_0
    float d = from_f16(stored.x);
    return {d, 0.f, d, 0.f};
#elif FORMAT == Q4_1 || FORMAT == Q5_1
    float d = from_f16(stored.x & 0xffff), m = from_f16(stored.x >> 16);
    return {d, m, d, m};
#elif FORMAT == Q6_K
    float d = from_f16(stored.y);
    return {d * (signed char)(stored.x & 0xff), 0.f, d * (signed char)(stored.x >> 8), 0.f};
#else
    float d = from_f16(stored.y & 0xffff) * (stored.x & 0xff), m = -from_f16(stored.y >> 16) * (stored.x >> 8);
    return {d, m, d, m};
#endif
}
// Element j of a block of codes.
DEV int code_at(const Matrix &w, size_t row, int block, int j) {
    size_t b = place_of(w, row, block);
#if FORMAT == Q8_0
    return ((const signed char *)(j < 16 ? w.at : plane(w, 16)))[b * 16 + j % 16];
#else
    int code = w.at[b * 16 + j % 16] >> (j / 16 * 4) & 15;
#if CODE_BYTES == 20
    code |= (((const u32 *)plane(w, 16))[b] >> j & 1) << 4;
#elif CODE_BYTES == 24
    code |= (plane(w, 16)[b * 8 + j % 8] >> (j / 8 * 2) & 3) << 4;
#endif
    return code - ZERO;
#endif
}
#endif

// One number, exactly as stored.
DEV float weight_at(const Matrix &w, size_t row, int column) {
#if FORMAT == F32
    return ((const float *)w.at)[row * w.columns + column];
#elif FORMAT == F16
    return from_f16(((const u16 *)w.at)[row * w.blocks * 32 + column]);
#elif FORMAT == BF16
    return from_bf16(((const u16 *)w.at)[row * w.blocks * 32 + column]);
#else
    Scales s = scales_of(load_scales(w, place_of(w, row, column / 32)));
    int j = column % 32;
    return code_at(w, row, column / 32, j) * (j < 16 ? s.d0 : s.d1) + (j < 16 ? s.m0 : s.m1);
#endif
}

#if FORMAT != F32
// A block of 32 columns as it is loaded from place b, and then as 16 pairs in the number type of products: of each four columns the
// pairs are (0, 1), (2, 3) in plain formats and (0, 2), (1, 3) in the others; `quad` puts activations in that order.
struct Raw {
#if PLAIN
    uint4 v[4];
#else
    uint4 codes;
#if FORMAT == Q8_0
    uint4 more;
#elif CODE_BYTES == 20
    u32 more;
#elif CODE_BYTES == 24
    uint2 more;
#endif
    uint2 scales;
#endif
};
DEV Raw load_block(const Matrix &w, size_t b) {
    Raw r;
#if PLAIN
    #pragma unroll
    for (int i = 0; i < 4; i++) r.v[i] = stored((const uint4 *)w.at + b * 4 + i);
#else
    r.codes = stored((const uint4 *)w.at + b);
#if FORMAT == Q8_0
    r.more = stored((const uint4 *)plane(w, 16) + b);
#elif CODE_BYTES == 20
    r.more = stored((const u32 *)plane(w, 16) + b);
#elif CODE_BYTES == 24
    r.more = stored((const uint2 *)plane(w, 16) + b);
#endif
    r.scales = load_scales(w, b);
#endif
    return r;
}
#if !PLAIN
#define UPPER (FORMAT == Q8_0 || CODE_BYTES > 16 ? 1 : 16)
// The codes as bytes, four columns in a word, before ZERO is taken off; those of the last 16 columns times UPPER.
DEV void codes_of(const Raw &r, u32 (&v)[8]) {
    u32 c[4] = {r.codes.x, r.codes.y, r.codes.z, r.codes.w};
#if FORMAT == Q8_0
    u32 d[4] = {r.more.x, r.more.y, r.more.z, r.more.w};
#endif
    #pragma unroll
    for (int i = 0; i < 8; i++) {
#if FORMAT == Q8_0
        v[i] = i < 4 ? c[i] : d[i - 4];
#elif UPPER > 1
        v[i] = c[i % 4] & (i < 4 ? 0x0f0f0f0fu : 0xf0f0f0f0u);
#else
        v[i] = c[i % 4] >> (i / 4 * 4) & 0x0f0f0f0fu;
#if CODE_BYTES == 20  // bits 4 i .. 4 i + 3 of `more` are the fifth ones
        v[i] |= ((r.more >> (4 * i) & 15) * 0x00204081u & 0x01010101u) << 4;
#else  // byte j % 8 of `more` has, at 2 (j / 8), the high bits of column j
        v[i] |= ((i & 1 ? r.more.y : r.more.x) >> (i / 2 * 2) & 0x03030303u) << 4;
#endif
#endif
    }
}
DEV u32 fma_two(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
#endif
DEV void unpack(const Raw &r, u32 (&v)[16]) {
#if PLAIN
    #pragma unroll
    for (int i = 0; i < 4; i++) v[4 * i] = r.v[i].x, v[4 * i + 1] = r.v[i].y, v[4 * i + 2] = r.v[i].z, v[4 * i + 3] = r.v[i].w;
#else  // products are in f16, which scales and all codes fit
    Scales s = scales_of(r.scales);
    u32 codes[8], d0 = two_f16(s.d0, s.d0), d1 = two_f16(s.d1, s.d1), m0 = two_f16(s.m0, s.m0), m1 = two_f16(s.m1, s.m1);
    codes_of(r, codes);
    #pragma unroll
    for (int i = 0; i < 16; i++) {  // 1024 + code is exact in f16, and so is the difference
        u32 word = codes[i / 2] ^ (FORMAT == Q8_0 ? 0x80808080u : 0);
        float by = i < 8 ? 1.f : 1.f / UPPER, less = -1024.f * by - (FORMAT == Q8_0 ? 128 : ZERO);
        u32 code = fma_two(word >> i % 2 * 8 & 0x00ff00ffu | 0x64006400u, two_f16(by, by), two_f16(less, less));
        v[i] = fma_two(code, i < 8 ? d0 : d1, i < 8 ? m0 : m1);
    }
#endif
}
// Four activations as the two pairs that meet `unpack`'s.
#if PLAIN
DEV uint2 quad(float a, float b, float c, float d) { return make_uint2(two(a, b), two(c, d)); }
#else
DEV uint2 quad(float a, float b, float c, float d) { return make_uint2(two(a, c), two(b, d)); }
#endif
#endif
