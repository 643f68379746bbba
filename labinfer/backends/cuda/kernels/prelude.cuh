// What every kernel shares. No CUDA headers: NVRTC alone compiles this.
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned u32;
typedef unsigned long long u64;
#define DEV __device__ __forceinline__
#define FULL 0xffffffffu
#define INFINITY __int_as_float(0x7f800000)

// 16-bit numbers travel as their bits; a u32 holds two, the first in its low half.
DEV float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
DEV float from_f16(u16 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v)); return r; }
DEV u16 to_bf16(float v) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
DEV u16 to_f16(float v) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
DEV u32 two_bf16(float a, float b) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
DEV u32 two_f16(float a, float b) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }

// The number type of matrix products: bf16, or f16 (HALF) unless the weights are bf16.
#ifdef HALF
DEV u32 two(float a, float b) { return two_f16(fminf(fmaxf(a, -65504.f), 65504.f), fminf(fmaxf(b, -65504.f), 65504.f)); }
DEV float one(u16 v) { return from_f16(v); }
#define MMA_TYPE "f16"
#else
DEV u32 two(float a, float b) { return two_bf16(a, b); }
DEV float one(u16 v) { return from_bf16(v); }
#define MMA_TYPE "bf16"
#endif

// What a kernel leaves: float32, or with NARROW, for the product that follows, f16 (1) or bf16 (2) as the weights there.
#ifdef NARROW
typedef u16 Out;
DEV u32 out_two(float a, float b) {
    return NARROW == 2 ? two_bf16(a, b) : two_f16(fminf(fmaxf(a, -65504.f), 65504.f), fminf(fmaxf(b, -65504.f), 65504.f));
}
DEV Out out_of(float v) { return (u16)out_two(v, 0.f); }
DEV void store_two(Out *p, float a, float b) { *(u32 *)p = out_two(a, b); }
DEV void store_four(Out *p, float a, float b, float c, float d) { *(uint2 *)p = make_uint2(out_two(a, b), out_two(c, d)); }
#else
typedef float Out;
DEV Out out_of(float v) { return v; }
DEV void store_two(Out *p, float a, float b) { *(float2 *)p = make_float2(a, b); }
DEV void store_four(Out *p, float a, float b, float c, float d) { *(float4 *)p = make_float4(a, b, c, d); }
#endif

// d += a b: a is 16 rows x 16, b is 16 x 8. Lane 4 g + t holds of a: rows g, g + 8 (a0, a1) at columns 2t, 2t + 1 and the
// same rows (a2, a3) at 2t + 8, 2t + 9; of b those columns' numbers for column g; of d rows g, g + 8 at columns 2t, 2t + 1.
DEV void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Programmatic dependent launch: a kernel starts while the one before it ends. Before `wait` it may read only what no
// kernel writes; every kernel waits, in every block, so that whatever ran two kernels ago has ended too.
DEV void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEV void pdl_trigger() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEV void begin() {
    pdl_trigger();
    pdl_wait();
}

// Activations, keys, values and step arrays are read at L2: under programmatic launch a line in this multiprocessor's L1
// can be older than what the kernel before wrote.
DEV float get(const float *p) { float r; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(r) : "l"(p)); return r; }
DEV int get(const int *p) { int r; asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(r) : "l"(p)); return r; }
DEV u16 get(const u16 *p) { u16 r; asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(r) : "l"(p)); return r; }
DEV uint2 get(const uint2 *p) { uint2 r; asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p)); return r; }
DEV uint4 get(const uint4 *p) {
    uint4 r;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}
DEV float2 get(const float2 *p) {
    float2 r;
    asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(r.x), "=f"(r.y) : "l"(p));
    return r;
}
DEV float4 get(const float4 *p) {
    float4 r;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "l"(p));
    return r;
}

// Four numbers, of which `left` are there; at once where they are and lie aligned.
DEV float4 load(const float *p, int left) {
    if (left >= 4 && (u64)p % 16 == 0) return get((const float4 *)p);
    return make_float4(get(p), left > 1 ? get(p + 1) : 0.f, left > 2 ? get(p + 2) : 0.f, left > 3 ? get(p + 3) : 0.f);
}
DEV void store(Out *p, int left, float a, float b, float c, float d) {
    if (left >= 4 && (u64)p % (4 * sizeof(Out)) == 0) {
        store_four(p, a, b, c, d);
        return;
    }
    p[0] = out_of(a);
    if (left > 1) p[1] = out_of(b);
    if (left > 2) p[2] = out_of(c);
    if (left > 3) p[3] = out_of(d);
}

DEV float two_to(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
// 2 to the score less the greatest score so far; 0 for minus infinity, whatever the greatest is.
DEV float weight_of(float score, float max) { return two_to(score == -INFINITY ? score : score - max); }

DEV float warp_sum(float v) {
    #pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    return v;
}
// The sum over a block of up to 1024 threads; `scratch` has 32 floats.
DEV float block_sum(float v, float *scratch) {
    int warps = blockDim.x / 32;
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0.f;
    return warp_sum(v);
}

DEV u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
// Copies to shared memory that go on beside the kernel (sm_80), in groups.
DEV void copy16(void *to, const void *from, bool inside) {  // zeros where not inside
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
DEV void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four matrices of 8 x 8 numbers of 16 bits, whose rows, of 16 bytes, the lanes point to in turn, as `mma` takes them.
DEV void ldmatrix(u32 (&r)[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

// Clusters (sm_90): blocks that can read and write each other's shared memory.
#if __CUDA_ARCH__ >= 900
DEV void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEV void store_remote(float *p, int rank, float v) {
    u32 at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
DEV void store_remote(float4 *p, int rank, float4 v) {
    u32 at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
DEV float4 load_remote(const float4 *p, int rank) {
    u32 at;
    float4 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "r"(at) : "memory");
    return r;
}
#endif

// The sequence that token t belongs to: the last one whose tokens begin at or before it and that has any.
DEV int sequence_of(const int *query_start, int sequences, int t) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (get(query_start + middle) <= t) low = middle;
        else high = middle - 1;
    }
    return low;
}

// The activation functions, numbered as layout.ACTIVATION_CODES numbers them.
DEV float activate(int function, float x) {
    switch (function) {
    case 0: return x / (1.f + expf(-x));
    case 1: return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case 2: return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case 3: return x / (1.f + expf(-1.702f * x));
    case 4: return fmaxf(x, 0.f);
    case 5: x = fmaxf(x, 0.f); return x * x;
    case 6: return tanhf(x);
    default: return 1.f / (1.f + expf(-x));
    }
}
