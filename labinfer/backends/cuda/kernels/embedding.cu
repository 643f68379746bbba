// y[t] = row ids[t] - first of the table, exactly as stored, or zeros beyond it: another rank has that row. A thread makes four numbers, a block's width apart.
extern "C" __global__ void embedding(const int *ids, const u8 *table, int first, int rows, int columns, float *y, int y_row) {
    int t = blockIdx.y;
    begin();
    int id = get(ids + t) - first;
    bool here = (u32)id < (u32)rows;
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        int i = (blockIdx.x * 4 + j) * blockDim.x + threadIdx.x;
        if (i < columns) y[(size_t)t * y_row + i] = here ? weight_at(matrix(table, rows, columns), id, i) : 0.f;
    }
}
