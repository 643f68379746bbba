// Mixture of experts: who goes where. The products themselves are tiles.cu's and plain.cu's.

// One block of 32 threads for each token; `scores` and `choice` are num_experts floats each in shared memory.
struct Routing {
    int experts, top_k, sigmoid, normalize, groups, top_groups, two;
    float scale;
};
// The place of the greatest of `n` numbers, the first among equals; NaN is below everything.
DEV int greatest(const float *v, int n) {
    float best = -INFINITY;
    int at = n;
    for (int i = threadIdx.x; i < n; i += 32)
        if (v[i] > best || at == n) best = v[i] == v[i] ? v[i] : -INFINITY, at = i;
    #pragma unroll
    for (int o = 16; o; o >>= 1) {
        float other = __shfl_xor_sync(FULL, best, o);
        int where = __shfl_xor_sync(FULL, at, o);
        if (other > best || (other == best && where < at)) best = other, at = where;
    }
    return min(at, n - 1);
}
extern "C" __global__ void route(
    const float *logits, Routing r, const float *bias, int *ids, int ids_row, float *weights, int weights_row) {
    extern __shared__ float shared[];
    float *scores = shared, *choice = scores + r.experts, *group = choice + r.experts;
    int t = blockIdx.x, lane = threadIdx.x, size = r.experts / r.groups;
    begin();
    logits += (size_t)t * r.experts;
    float top = -INFINITY, sum = 0.f;
    for (int i = lane; i < r.experts; i += 32) top = fmaxf(top, get(logits + i));
    #pragma unroll
    for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, o));
    for (int i = lane; i < r.experts; i += 32) {
        float x = get(logits + i);
        scores[i] = r.sigmoid ? 1.f / (1.f + expf(-x)) : expf(x - top);
        sum += scores[i];
    }
    sum = r.sigmoid ? 1.f : warp_sum(sum);
    for (int i = lane; i < r.experts; i += 32) {
        scores[i] /= sum;
        choice[i] = scores[i] + (bias ? bias[i] : 0.f);
    }
    __syncwarp();
    if (r.top_groups < r.groups) {
        for (int g = lane; g < r.groups; g += 32) {
            float first = -INFINITY, second = -INFINITY;
            for (int i = g * size; i < (g + 1) * size; i++)
                if (choice[i] > first) second = first, first = choice[i];
                else second = fmaxf(second, choice[i]);
            group[g] = r.two ? first + second : first;
        }
        __syncwarp();
        for (int n = 0; n < r.groups - r.top_groups; n++) {  // drop the worst, the last among equals
            if (lane == 0) {
                int worst = -1;
                for (int g = 0; g < r.groups; g++)
                    if (group[g] < INFINITY && (worst < 0 || group[g] <= group[worst])) worst = g;
                group[worst] = INFINITY;
            }
            __syncwarp();
        }
        for (int i = lane; i < r.experts; i += 32)
            if (group[i / size] == INFINITY) choice[i] = -INFINITY;
        __syncwarp();
    }
    float chosen = 0.f;
    for (int n = 0; n < r.top_k; n++) {
        int best = greatest(choice, r.experts);
        __syncwarp();  // all have read before one is struck out
        chosen += scores[best];
        if (lane == 0) {
            ids[(size_t)t * ids_row + n] = best;
            weights[(size_t)t * weights_row + n] = scores[best];
            choice[best] = -INFINITY;
        }
        __syncwarp();
    }
    float by = r.scale / (r.normalize ? chosen + 1e-20f : 1.f);
    for (int n = lane; n < r.top_k; n += 32) weights[(size_t)t * weights_row + n] *= by;
}

// Sorts the pairs (token, n-th expert) by expert, one block. bounds[e]: where expert e's begin; order[i]: the token of
// the i-th; places: where each pair has gone, or -1: experts before `first` and after so many are other ranks'.
// A warp takes an expert, so that pairs keep their order.
extern "C" __global__ void group(
    const int *ids, int ids_row, int tokens, int top_k, int first, int experts, int *bounds, int *order, int *places) {
    extern __shared__ int counts[];
    int pairs = tokens * top_k, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    begin();
    for (int e = threadIdx.x; e <= experts; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        int e = get(ids + i / top_k * ids_row + i % top_k) - first;
        if ((u32)e < (u32)experts) atomicAdd(&counts[e], 1);
        else places[i] = -1;
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int e = 0, sum = 0; e <= experts; e++) {
            int count = counts[e];
            counts[e] = bounds[e] = sum;
            sum += count;
        }
    __syncthreads();
    for (int e = warp; e < experts; e += warps) {
        int at = counts[e];
        if (counts[e + 1] == at) continue;
        for (int i = 0; i < pairs; i += 32) {
            bool mine = i + lane < pairs && get(ids + (i + lane) / top_k * ids_row + (i + lane) % top_k) - first == e;
            u32 found = __ballot_sync(FULL, mine);
            int to = at + __popc(found & ((1u << lane) - 1));
            if (mine) order[to] = (i + lane) / top_k, places[i + lane] = to;
            at += __popc(found);
        }
    }
}

// y[t] = the sum over n of weights[t][n] * results[places[t][n]], where there is such a place
extern "C" __global__ void combine(
    const float *results, const float *weights, int weights_row, const int *places, int top_k, float *y, int y_row, int n) {
    int t = blockIdx.y;
    begin();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        float sum = 0.f;
        for (int k = 0; k < top_k; k++) {
            int place = get(places + t * top_k + k);
            if (place >= 0) sum += get(weights + (size_t)t * weights_row + k) * get(results + (size_t)place * n + i);
        }
        y[(size_t)t * y_row + i] = sum;
    }
}
