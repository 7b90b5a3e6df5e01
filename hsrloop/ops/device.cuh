// What every source is compiled after: what a card has and a host has not. For the host see
// tests/kernels.py.

#define WARP 32

typedef unsigned long long Key;

static __device__ float from_half(unsigned short bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}

static __device__ unsigned short to_half(float number) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}

// The greatest key of a warp, all of which must ask for it.
static __device__ Key greatest_in_warp(Key key) {
    for (int apart = WARP / 2; apart; apart /= 2) {
        const Key other = __shfl_xor_sync(0xFFFFFFFFu, key, apart);
        key = other > key ? other : key;
    }
    return key;
}
