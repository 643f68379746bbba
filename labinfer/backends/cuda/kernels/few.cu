// Products for a few tokens (at most TOKENS <= 8): every weight is read once, straight into tensor-core fragments.
// A block takes tiles of 16 rows; its 8 warps share the columns, 128 at a time: lane 4 g + t has the block of 32 columns
// 4 s + t of rows g and g + 8.
struct Shared {
    float red[WARPS][16][TOKENS];
    float scratch[32];
    float scale[TOKENS];
};

// Rows of x as quads, zero beyond `columns`; rows are `pitch` quads apart, so that 8 tokens lie in different banks.
DEV void stage(uint2 *xs, int pitch, Shared &s, const float *x, int x_row, int tokens, int columns, const float *weight,
               float eps, float offset) {
    for (int m = 0; m < TOKENS; m++) {
        float squares = 0.f;
        for (int q = threadIdx.x; q < pitch; q += blockDim.x) {
            float v[4];
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                int i = 4 * q + j;
                v[j] = m < tokens && i < columns ? get(x + (size_t)m * x_row + i) : 0.f;
#ifdef NORM
                squares += v[j] * v[j];
                if (i < columns && weight) v[j] *= weight[i] + offset;
#endif
            }
            xs[m * pitch + q] = quad(v[0], v[1], v[2], v[3]);
        }
#ifdef NORM
        float sum = block_sum(squares, s.scratch);
        if (threadIdx.x == 0) s.scale[m] = rsqrtf(sum / columns + eps);
#endif
    }
    __syncthreads();
}

// The rows of a tile that this lane loads: (matrix, row) for g and g + 8; rows beyond the end are the last one again.
struct Place {
    const u8 *first, *second;
    int rows0, rows1, row0, row1;
};
DEV Place place(const Part (&p)[3], int tile) {
    int g = threadIdx.x % 32 / 4;
#ifdef GLU
    int row = min(tile * 8 + g, p[0].rows - 1);
    return {p[0].w, p[1].w, p[0].rows, p[1].rows, row, row};
#else
    int part = part_of(p, tile), rows = p[part].rows;
    return {p[part].w, p[part].w, rows, rows, min(tile * 16 + g, rows - 1), min(tile * 16 + g + 8, rows - 1)};
#endif
}

struct Pair {
    Raw a, b;
};
DEV Pair fetch(const Place &p, int columns, int block) {
    Matrix a = matrix(p.first, p.rows0, columns), b = matrix(p.second, p.rows1, columns);
    block = min(block, a.blocks - 1);
    return {load_block(a, p.row0, block), load_block(b, p.row1, block)};
}

DEV float row_sum(const Shared &s, int row, int m) {
    float v = 0.f;
    #pragma unroll
    for (int w = 0; w < WARPS; w++) v += s.red[w][row][m];
#ifdef NORM
    v *= s.scale[m];
#endif
    return v;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) few(
    const float *x, int x_row, int tokens, int columns, const float *weight, float eps, float offset,
    const float *residual, int residual_row, int function, int tiles, Part p0, Part p1, Part p2) {
    extern __shared__ uint2 xs[];
    __shared__ Shared s;
    const Part parts[3] = {p0, p1, p2};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int blocks = (columns + 31) / 32, steps = (blocks + 3) / 4, pitch = steps * 32 + 1;
    int tile = blockIdx.x, step = warp;
    Place at = place(parts, tile);
    pdl_trigger();
    Pair next;
    if (step < steps) next = fetch(at, columns, 4 * step + t);  // weights do not wait for the kernel before
    pdl_wait();
    stage(xs, pitch, s, x, x_row, tokens, columns, weight, eps, offset);
    const uint2 *mine = xs + (g < TOKENS ? g : 0) * pitch + 8 * t;
    for (; tile < tiles; tile += gridDim.x) {
        float d[4] = {}, e[4] = {};
        for (step = warp; step < steps; step += WARPS) {
            Pair now = next;
            bool last = step + WARPS >= steps;
            if (last && tile + gridDim.x < tiles) at = place(parts, tile + gridDim.x);
            if (!last || tile + gridDim.x < tiles) next = fetch(at, columns, 4 * (last ? warp : step + WARPS) + t);
            u32 a[16], b[16];
            unpack(now.a, a);
            unpack(now.b, b);
            bool inside = 4 * step + t < blocks && g < TOKENS;
            #pragma unroll
            for (int i = 0; i < 8; i++) {
                uint2 v = inside ? mine[32 * step + i] : make_uint2(0, 0);
                mma(i % 2 ? e : d, a[2 * i], b[2 * i], a[2 * i + 1], b[2 * i + 1], v.x, v.y);
            }
        }
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            int m = 2 * t + j % 2;
            if (m < TOKENS) s.red[warp][g + j / 2 * 8][m] = d[j] + e[j];
        }
        __syncthreads();
        finish(parts, tile, tokens, residual, residual_row, function, [&](int row, int m) { return row_sum(s, row, m); });
        __syncthreads();
    }
}
