// Products for many tokens: a block makes 64 rows of the weight x 64 tokens, 64 columns at a time through shared memory.
// EXPERTS: the tokens are grouped by expert (`bounds`, see moe.cu), each group meets its own matrix of a stack;
// `order`, where given, says which row of x is a group's i-th token.
#define PITCH 20  // quads from row to row: 8 rows and 4 lanes then lie in different banks

DEV void load_weights(uint2 (*ws)[PITCH], const Matrix &w, int first, int step) {
    int row = threadIdx.x % 64, block = 2 * step + threadIdx.x / 64;
    uint2 *to = &ws[row][threadIdx.x / 64 * 8];
    u32 v[16] = {};
    if (block < w.blocks) unpack(load_block(w, place_of(w, min(first + row, w.rows - 1), block)), v);
    #pragma unroll
    for (int i = 0; i < 8; i++) to[i] = make_uint2(v[2 * i], v[2 * i + 1]);
}
DEV void load_tokens(uint2 (*xs)[PITCH], const float *x, int x_row, const int *order, int first, int end, int columns,
                     int step) {
    #pragma unroll
    for (int k = 0; k < 8; k++) {
        int at = threadIdx.x + 128 * k, m = at / 16, q = at % 16, i = 64 * step + 4 * q, row = first + m;
        float v[4] = {};
        if (row < end) {
            const float *p = x + (size_t)(order ? get(order + row) : row) * x_row;
            #pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j < columns) v[j] = get(p + i + j);
        }
        xs[m][q] = quad(v[0], v[1], v[2], v[3]);
    }
}

extern "C" __global__ void __launch_bounds__(128) tiles(
    const float *x, int x_row, int tokens, int columns, const u8 *weight, int rows, const float *bias,
    const float *residual, int residual_row, float *y, int y_row, u64 matrix_bytes, const int *bounds,
    const int *order, int experts) {
    __shared__ uint2 ws[64][PITCH], xs[64][PITCH];
    begin();
    int first = blockIdx.y * 64, end = tokens, row0 = blockIdx.x * 64;
#ifdef EXPERTS
    int expert = find_group(bounds, experts, 64, blockIdx.y, first, end);
    if (expert < 0) return;
    weight += expert * matrix_bytes;
#endif
    Matrix w = matrix(weight, rows, columns);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float d[8][4] = {};
    for (int step = 0; step < (columns + 63) / 64; step++) {
        load_weights(ws, w, row0, step);
        load_tokens(xs, x, x_row, order, first, end, columns, step);
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            uint2 a = ws[warp * 16 + g][4 * i + t], b = ws[warp * 16 + g + 8][4 * i + t];
            #pragma unroll
            for (int n = 0; n < 8; n++) {
                uint2 v = xs[8 * n + g][4 * i + t];
                mma(d[n], a.x, b.x, a.y, b.y, v.x, v.y);
            }
        }
        __syncthreads();
    }
    #pragma unroll
    for (int n = 0; n < 8; n++)
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = row0 + warp * 16 + g + j / 2 * 8, m = first + 8 * n + 2 * t + j % 2;
            if (row >= rows || m >= end) continue;
            float v = d[n][j] + (bias ? bias[row] : 0.f);
            if (residual) v += get(residual + (size_t)m * residual_row + row);
            y[(size_t)m * y_row + row] = v;
        }
}
