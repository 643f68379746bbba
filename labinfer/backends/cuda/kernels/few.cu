// Products for a few tokens (at most TOKENS <= 8) with weights in any 16-bit or block format: each weight is read once,
// straight into tensor-core fragments. TILE_WARPS warps share the columns of a tile of 16 rows, each a run of steps of
// 128: lane 4 g + t has the block of 32 columns 4 s + t of rows g and g + 8. A block has 8 warps, so 8 / TILE_WARPS tiles at once.
#define TILES (WARPS / TILE_WARPS)
#if PLAIN  // blocks of weights under way for each lane
#define AHEAD 1
#elif CODE_BYTES == 16
#define AHEAD 4
#else
#define AHEAD 2
#endif
struct Shared {
    float red[WARPS][16][TOKENS];
    float scratch[32];
    float scale[TOKENS];
};

// Rows of x as quads, zero beyond `columns`; rows are `pitch` quads apart, so that 8 tokens lie in different banks.
DEV void stage(uint2 *xs, int pitch, Shared &s, const float *x, int x_row, int tokens, int columns, const float *weight,
               float eps, float offset) {
    bool whole = columns % 4 == 0 && x_row % 4 == 0 && (u64)x % 16 == 0;
    for (int m = 0; m < TOKENS; m++) {
        float squares = 0.f;
        const float *row = x + (size_t)m * x_row;
        #pragma unroll 4
        for (int q = threadIdx.x; q < pitch; q += WARPS * 32) {
            int i = 4 * q, count = m < tokens ? columns - i : 0;
            float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
            if (whole && count > 0) v = get((const float4 *)(row + i));
            else if (count > 0) {
                v.x = get(row + i);
                if (count > 1) v.y = get(row + i + 1);
                if (count > 2) v.z = get(row + i + 2);
                if (count > 3) v.w = get(row + i + 3);
            }
#ifdef NORM
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            if (weight && count > 0) {
                v.x *= weight[i] + offset;
                if (count > 1) v.y *= weight[i + 1] + offset;
                if (count > 2) v.z *= weight[i + 2] + offset;
                if (count > 3) v.w *= weight[i + 3] + offset;
            }
#endif
            xs[m * pitch + q] = quad(v.x, v.y, v.z, v.w);
        }
#ifdef NORM
        float sum = block_sum(squares, s.scratch);
        if (threadIdx.x == 0) s.scale[m] = rsqrtf(sum / columns + eps);
#endif
    }
    __syncthreads();
}

// What a lane loads of a tile: blocks of two rows; those beyond the end are the last one again.
struct Pair {
    Raw a, b;
};
DEV Pair fetch(const Parts &parts, int tile, int columns, int block) {
    int g = threadIdx.x % 32 / 4, part = part_of(parts, tile), rows = parts.p[part].rows;
#ifdef GLU
    int row = min(tile * 8 + g, rows - 1);
    Matrix a = matrix(parts.p[0].w, rows, columns), b = matrix(parts.p[1].w, rows, columns);
    block = min(block, a.blocks - 1);
    return {load_block(a, place_of(a, row, block)), load_block(b, place_of(b, row, block))};
#else
    Matrix w = matrix(parts.p[part].w, rows, columns);
    block = min(block, w.blocks - 1);
    int row = min(tile * 16 + g, rows - 1), other = min(tile * 16 + g + 8, rows - 1);
    return {load_block(w, place_of(w, row, block)), load_block(w, place_of(w, other, block))};
#endif
}

// Where a warp is: its tile, and which of its `count` steps there.
struct Place {
    int tile, done;
};
DEV void advance(Place &at, int count) {
    if (++at.done == count) at.done = 0, at.tile += gridDim.x * TILES;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) few(
    const float *x, int x_row, int tokens, int columns, const float *weight, float eps, float offset,
    const float *residual, int residual_row, int function, int tiles, const __grid_constant__ Parts parts) {
    extern __shared__ uint2 xs[];
    __shared__ Shared s;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int blocks = (columns + 31) / 32, steps = (blocks + 3) / 4, pitch = steps * 32 + 1;
    int count = (steps + TILE_WARPS - 1) / TILE_WARPS, from = warp % TILE_WARPS * count;
    Place at = {(int)blockIdx.x * TILES + warp / TILE_WARPS, 0}, next = at;
    Pair ahead[AHEAD];
    pdl_trigger();
    #pragma unroll
    for (int i = 0; i < AHEAD; i++) {  // weights do not wait for the kernel before
        if (next.tile < tiles) ahead[i] = fetch(parts, next.tile, columns, 4 * (from + next.done) + t);
        advance(next, count);
    }
    pdl_wait();
    stage(xs, pitch, s, x, x_row, tokens, columns, weight, eps, offset);
    const uint2 *mine = xs + (g < TOKENS ? g : 0) * pitch + 8 * t;
    float d[4] = {}, e[4] = {};
    #pragma unroll 1
    while (at.tile - warp / TILE_WARPS < tiles) {  // as long as any warp of the block has a tile
        u32 a[16], b[16];
        unpack(ahead[0].a, a);
        unpack(ahead[0].b, b);
        #pragma unroll
        for (int i = 1; i < AHEAD; i++) ahead[i - 1] = ahead[i];
        if (next.tile < tiles) ahead[AHEAD - 1] = fetch(parts, next.tile, columns, 4 * (from + next.done) + t);
        advance(next, count);
        int step = from + at.done, tile = at.tile;
        bool inside = tile < tiles && 4 * step + t < blocks && g < TOKENS;
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            uint2 v = inside ? mine[32 * step + j] : make_uint2(0, 0);
            mma(j % 2 ? e : d, a[2 * j], b[2 * j], a[2 * j + 1], b[2 * j + 1], v.x, v.y);
        }
        advance(at, count);
        if (at.tile == tile) continue;
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            int m = 2 * t + j % 2;
            if (m < TOKENS) s.red[warp][g + j / 2 * 8][m] = d[j] + e[j];
            d[j] = e[j] = 0.f;
        }
        __syncthreads();
        #pragma unroll 1
        for (int k = 0; k < TILES && tile - warp / TILE_WARPS + k < tiles; k++) {
            int one = tile - warp / TILE_WARPS + k;
            auto sum = [&](int row, int m) {
                float v = 0.f;
                #pragma unroll
                for (int w = 0; w < TILE_WARPS; w++) v += s.red[k * TILE_WARPS + w][row][m];
#ifdef NORM
                v *= s.scale[m];
#endif
                return v;
            };
#ifdef ADD
            float residue = residual_at(parts, one, threadIdx.x, tokens, residual, residual_row);
#else
            float residue = 0.f;
#endif
            finish(parts, one, threadIdx.x, tokens, residue, function, sum);
        }
        __syncthreads();
    }
}
