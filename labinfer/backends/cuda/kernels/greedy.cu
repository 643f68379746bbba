// Greedy decoding that stays on the device: the greatest logit of each row becomes the next token of its sequence, and
// the step moves on by one. One block for each row; `made` [rows, length] records the tokens, `step` counts them.
extern "C" __global__ void __launch_bounds__(1024) argmax(const float *logits, int row, int n, int *best) {
    __shared__ float values[32];
    __shared__ int places[32];
    begin();
    logits += (size_t)blockIdx.x * row;
    float top = -INFINITY;
    int at = 0x7fffffff;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = get(logits + i);
        if (v > top) top = v, at = i;
    }
    for (int round = 0; round < 2; round++) {
        #pragma unroll
        for (int o = 16; o; o >>= 1) {
            float other = __shfl_xor_sync(FULL, top, o);
            int where = __shfl_xor_sync(FULL, at, o);
            if (other > top || (other == top && where < at)) top = other, at = where;
        }
        if (round == 0) {
            if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = top, places[threadIdx.x / 32] = at;
            __syncthreads();
            bool has = threadIdx.x < blockDim.x / 32;
            top = has ? values[threadIdx.x] : -INFINITY, at = has ? places[threadIdx.x] : 0x7fffffff;
        }
    }
    if (threadIdx.x == 0) best[blockIdx.x] = at;
}
