// Latent attention (DeepSeek-V2): queries go through the key half of kv_b, meet the cached latents, and what comes back
// goes through its value half. One block for each head (x) of a token (y); float32.
struct Latent {
    const float *q;
    float *y;
    const u8 *kv_b;
    const Cached *k, *v;
    const int *positions, *query_start, *block_table;
    int q_row, y_row, table_row, sequences, block_size, heads, nope, rope, value, rank;
    float scale;
};
#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS) mla(Latent p) {
    extern __shared__ float shared[];
    __shared__ float scratch[32];
    float *q = shared, *sums = q + p.rank + p.rope, *scores = sums + p.rank;  // scores of THREADS keys
    int head = blockIdx.x, token = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    begin();
    Matrix kv_b = matrix(p.kv_b, p.heads * (p.nope + p.value), p.rank);
    int row0 = head * (p.nope + p.value);
    const float *query = p.q + (size_t)token * p.q_row + head * (p.nope + p.rope);
    for (int r = threadIdx.x; r < p.rank; r += THREADS) {
        float v = 0.f;
        for (int i = 0; i < p.nope; i++) v += get(query + i) * weight_at(kv_b, row0 + i, r);
        q[r] = v * p.scale;
        sums[r] = 0.f;
    }
    for (int r = threadIdx.x; r < p.rope; r += THREADS) q[p.rank + r] = get(query + p.nope + r) * p.scale;
    __syncthreads();
    int position = get(p.positions + token), sequence = sequence_of(p.query_start, p.sequences, token);
    const int *table = p.block_table + (size_t)sequence * p.table_row;
    float top = -INFINITY, total = 0.f;
    for (int start = 0; start <= position; start += THREADS) {
        int count = min(THREADS, position + 1 - start);
        for (int i = warp; i < count; i += THREADS / 32) {  // a warp scores a key
            int key = start + i, slot = get(table + key / p.block_size) * p.block_size + key % p.block_size;
            float s = 0.f;
            for (int r = lane; r < p.rank; r += 32) s += q[r] * value(get(p.k + (size_t)slot * p.rank + r));
            for (int r = lane; r < p.rope; r += 32) s += q[p.rank + r] * value(get(p.v + (size_t)slot * p.rope + r));
            s = warp_sum(s);
            if (lane == 0) scores[i] = s;
        }
        __syncthreads();
        float mine = threadIdx.x < count ? scores[threadIdx.x] : -INFINITY, best = mine;
        #pragma unroll
        for (int o = 16; o; o >>= 1) best = fmaxf(best, __shfl_xor_sync(FULL, best, o));
        if (lane == 0) scratch[warp] = best;
        __syncthreads();
        for (int w = 0; w < THREADS / 32; w++) best = fmaxf(best, scratch[w]);
        best = fmaxf(best, top);
        float weight = threadIdx.x < count ? expf(mine - best) : 0.f, old = expf(top - best);
        total = total * old + block_sum(weight, scratch);
        top = best;
        scores[threadIdx.x] = weight;
        __syncthreads();
        for (int r = threadIdx.x; r < p.rank; r += THREADS) {
            float sum = sums[r] * old;
            for (int i = 0; i < count; i++) {
                int key = start + i, slot = get(table + key / p.block_size) * p.block_size + key % p.block_size;
                sum += scores[i] * value(get(p.k + (size_t)slot * p.rank + r));
            }
            sums[r] = sum;
        }
        __syncthreads();
    }
    for (int i = warp; i < p.value; i += THREADS / 32) {
        float v = 0.f;
        for (int r = lane; r < p.rank; r += 32) v += sums[r] * weight_at(kv_b, row0 + p.nope + i, r);
        v = warp_sum(v);
        if (lane == 0) p.y[(size_t)token * p.y_row + head * p.value + i] = v / total;
    }
}
