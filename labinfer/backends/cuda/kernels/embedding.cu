// y[t] = row ids[t] of the table, exactly as stored.
extern "C" __global__ void embedding(const int *ids, const u8 *table, int rows, int columns, float *y, int y_row) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y;
    begin();
    if (i >= columns) return;
    int id = get(ids + t);
    y[(size_t)t * y_row + i] = weight_at(matrix(table, rows, columns), id, i);
}
