// Normalisation: one block for each group of a row (block y) of a token (block x).
// NARROW writes the number type of products, for the product that follows.
#ifdef NARROW
typedef u16 Out;
#ifdef HALF
DEV Out out(float v) { return to_f16(v); }
#else
DEV Out out(float v) { return to_bf16(v); }
#endif
#else
typedef float Out;
DEV Out out(float v) { return v; }
#endif

extern "C" __global__ void rms_norm(
    const float *x, int x_row, const float *weight, Out *y, int y_row, int n, float eps, float offset) {
    __shared__ float scratch[32];
    begin();
    x += (size_t)blockIdx.x * x_row + blockIdx.y * n;
    y += (size_t)blockIdx.x * y_row + blockIdx.y * n;
    float squares = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = get(x + i);
        squares += v * v;
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = out(get(x + i) * scale * (weight ? weight[i] + offset : 1.f));
#ifdef NARROW  // products read rows padded with zeros
    for (int i = n + threadIdx.x; i < y_row; i += blockDim.x) y[i] = 0;
#endif
}

extern "C" __global__ void layer_norm(
    const float *x, int x_row, const float *weight, const float *bias, float *y, int y_row, int n, float eps) {
    __shared__ float scratch[32];
    begin();
    x += (size_t)blockIdx.x * x_row;
    y += (size_t)blockIdx.x * y_row;
    float sum = 0.f, squares = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += get(x + i);
    float mean = block_sum(sum, scratch) / n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = get(x + i) - mean;
        squares += v * v;
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = (get(x + i) - mean) * scale * weight[i] + (bias ? bias[i] : 0.f);
}
