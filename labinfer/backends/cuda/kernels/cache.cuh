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

// Eight numbers of a row of DIM, as they lie there; those from `count` on are zero.
struct Eight {
#if CACHE == 0
    uint4 v[2];
#else
    uint4 v[1];
#endif
};
template <int DIM> DEV Eight load_eight(const Cached *p, int count) {
    Eight r = {};
    if (DIM % 8 == 0) {  // then there are eight, or none
        if (count > 0)
            #pragma unroll
            for (int i = 0; i < (int)(sizeof(r) / 16); i++) r.v[i] = get((const uint4 *)p + i);
    } else {
        Cached *to = (Cached *)&r;
        #pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) to[i] = get(p + i);
    }
    return r;
}
DEV float at(const Eight &r, int i) {
#if CACHE == 0
    const u32 *w = (const u32 *)r.v;
    return __uint_as_float(w[i]);
#else
    u32 w = i < 2 ? r.v[0].x : i < 4 ? r.v[0].y : i < 6 ? r.v[0].z : r.v[0].w;
    return value((u16)(i % 2 ? w >> 16 : w & 0xffff));
#endif
}
