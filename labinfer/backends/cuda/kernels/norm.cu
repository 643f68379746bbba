// Normalisation: one block for each group of a row (block y) of a token (block x).
// NARROW writes the number type of products, for the product that follows.
#ifdef NARROW
typedef u16 Out;
DEV Out out(float v) { return (u16)two(v, 0.f); }
#else
typedef float Out;
DEV Out out(float v) { return v; }
#endif
#define EACH(i) _Pragma("unroll 8") for (int i = threadIdx.x; i < n; i += blockDim.x)

extern "C" __global__ void rms_norm(
    const float *x, int x_row, const float *weight, Out *y, int y_row, int n, float eps, float offset) {
    __shared__ float scratch[32];
    begin();
    x += (size_t)blockIdx.x * x_row + blockIdx.y * n;
    y += (size_t)blockIdx.x * y_row + blockIdx.y * n;
    float squares = 0.f;
    EACH(i) {
        float v = get(x + i);
        squares += v * v;
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    EACH(i) y[i] = out(get(x + i) * scale * (weight ? weight[i] + offset : 1.f));
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
    EACH(i) sum += get(x + i);
    float mean = block_sum(sum, scratch) / n;
    EACH(i) {
        float v = get(x + i) - mean;
        squares += v * v;
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    EACH(i) y[i] = (get(x + i) - mean) * scale * weight[i] + (bias ? bias[i] : 0.f);
}
