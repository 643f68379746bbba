// Keys and values in the cache: CACHE is f32 (0), f16 (1) or bf16 (2).
#if CACHE == 0
typedef float Cached;
DEV float value(Cached v) { return v; }
DEV Cached cached(float v) { return v; }
#elif CACHE == 1
typedef u16 Cached;
DEV float value(Cached v) { return from_f16(v); }
DEV Cached cached(float v) { return to_f16(fminf(fmaxf(v, -65504.f), 65504.f)); }
#else
typedef u16 Cached;
DEV float value(Cached v) { return from_bf16(v); }
DEV Cached cached(float v) { return to_bf16(v); }
#endif

// Eight numbers at p, zero from number `count` on; one load or two where ALIGNED.
template <bool ALIGNED> DEV void eight(const Cached *p, int count, float (&v)[8]) {
    if (!ALIGNED || count < 8) {
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < count ? value(get(p + i)) : 0.f;
        return;
    }
#if CACHE == 0
    float4 a = get((const float4 *)p), b = get((const float4 *)p + 1);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
#else
    uint4 a = get((const uint4 *)p);
    u32 words[4] = {a.x, a.y, a.z, a.w};
    #pragma unroll
    for (int i = 0; i < 4; i++) v[2 * i] = value(words[i] & 0xffff), v[2 * i + 1] = value(words[i] >> 16);
#endif
}
