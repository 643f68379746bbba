// Products with float32 weights, in float32: a block makes 32 rows of the weight x 32 tokens. EXPERTS as in tiles.cu.
#define TILE 32
extern "C" __global__ void __launch_bounds__(256) plain(
    const float *x, int x_row, int tokens, int columns, const float *weight, int rows, const float *bias,
    const float *residual, int residual_row, float *y, int y_row, u64 matrix_bytes, const int *bounds,
    const int *order, int experts) {
    __shared__ float ws[TILE][TILE + 1], xs[TILE][TILE + 1];
    begin();
    int first = blockIdx.y * TILE, end = tokens, row0 = blockIdx.x * TILE;
#ifdef EXPERTS
    int expert = find_group(bounds, experts, TILE, blockIdx.y, first, end);
    if (expert < 0) return;
    weight += expert * (matrix_bytes / 4);
#endif
    int column = threadIdx.x % 32, line = threadIdx.x / 32;
    float sums[4] = {};
    for (int k = 0; k < columns; k += TILE) {
        #pragma unroll
        for (int i = line; i < TILE; i += 8) {
            bool inside = k + column < columns;
            ws[i][column] = inside && row0 + i < rows ? weight[(size_t)(row0 + i) * columns + k + column] : 0.f;
            int m = first + i;
            xs[i][column] = inside && m < end ? get(x + (size_t)(order ? get(order + m) : m) * x_row + k + column) : 0.f;
        }
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < TILE; j++)
            #pragma unroll
            for (int i = 0; i < 4; i++) sums[i] += ws[column][j] * xs[line + 8 * i][j];
        __syncthreads();
    }
    int row = row0 + column;
    if (row >= rows) return;
    for (int i = 0; i < 4; i++) {
        int m = first + line + 8 * i;
        if (m >= end) continue;
        float v = sums[i] + (bias ? bias[row] : 0.f);
        if (residual) v += get(residual + (size_t)m * residual_row + row);
        y[(size_t)m * y_row + row] = v;
    }
}
