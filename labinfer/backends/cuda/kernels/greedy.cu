// Greedy decoding that stays on the device: the greatest logit of each row becomes the next token of its sequence, and
// the step moves on by one token.
struct Best {
    float value;
    int token;
};
DEV Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a; }
DEV Best warp_best(Best best) {
    #pragma unroll
    for (int o = 16; o; o >>= 1)
        best = better(best, {__shfl_xor_sync(FULL, best.value, o), __shfl_xor_sync(FULL, best.token, o)});
    return best;
}

// The best of a part (block y) of a row (block x), for `advance`.
extern "C" __global__ void __launch_bounds__(256) argmax(const float *logits, int row, int n, float *values, int *tokens) {
    __shared__ Best shared[8];
    begin();
    logits += (size_t)blockIdx.x * row;
    Best best = {-INFINITY, 0x7fffffff};
    #pragma unroll 4
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < n; i += gridDim.y * blockDim.x)
        best = better(best, {get(logits + i), i});
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = warp_best(threadIdx.x < 8 ? shared[threadIdx.x] : Best{-INFINITY, 0x7fffffff});
    if (threadIdx.x == 0) {
        values[blockIdx.x * gridDim.y + blockIdx.y] = best.value;
        tokens[blockIdx.x * gridDim.y + blockIdx.y] = best.token;
    }
}

// One warp for each row: its best token of `parts` parts. `made` [rows, length] keeps the tokens, `count` how many.
extern "C" __global__ void __launch_bounds__(32) advance(
    const float *values, const int *tokens, int parts, int *token_ids, int *positions, int *context_len, int *total_len,
    int *made, int length, int *count) {
    int row = blockIdx.x;
    begin();
    Best best = {-INFINITY, 0x7fffffff};
    #pragma unroll 4
    for (int i = threadIdx.x; i < parts; i += 32)
        best = better(best, {get(values + row * parts + i), get(tokens + row * parts + i)});
    best = warp_best(best);
    if (threadIdx.x) return;
    int step = get(count + row);
    if (step < length) made[(size_t)row * length + step] = best.token;
    count[row] = step + 1;
    token_ids[row] = best.token;
    positions[row] = get(positions + row) + 1;
    context_len[row] = get(context_len + row) + 1;
    total_len[row] = get(total_len + row) + 1;
}

// Where each row's next token goes in the cache of a group.
extern "C" __global__ void slots(const int *positions, const int *table, int table_row, int block_size, int rows, int *slots) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    begin();
    if (row >= rows) return;
    int position = get(positions + row);
    slots[row] = get(table + (size_t)row * table_row + position / block_size) * block_size + position % block_size;
}
