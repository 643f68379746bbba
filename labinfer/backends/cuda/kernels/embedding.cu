// y[t] = row ids[t] of the table, exactly as stored. A thread makes four numbers, a block's width apart.
extern "C" __global__ void embedding(const int *ids, const u8 *table, int rows, int columns, float *y, int y_row) {
    int t = blockIdx.y;
    begin();
    int id = get(ids + t);
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        int i = (blockIdx.x * 4 + j) * blockDim.x + threadIdx.x;
        if (i < columns) y[(size_t)t * y_row + i] = weight_at(matrix(table, rows, columns), id, i);
    }
}
