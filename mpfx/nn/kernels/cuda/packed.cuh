// What kernels on packed weights have in common: numbers, codes from planes of bits, scales, copies, launches.
//
// Set by whoever compiles: DTYPE of the activations (0 bfloat16, 1 float16, 2 float32); IN, channels; CODED, whether
// scales are; ZEROS, whether there are zero points; ALIGNED, whether rows come in fours, and codes and mask start where 16
// bytes do.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int SEGMENTS_IN_ALL = (IN + 31) / 32;

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

// An activation as it is stored.
template <int D>
struct Stored {
    typedef u16 type;
};
template <>
struct Stored<2> {
    typedef float type;
};
typedef Stored<DTYPE>::type Number;

__device__ __forceinline__ float to_float(float f) { return f; }
__device__ __forceinline__ float to_float(u16 h) { return DTYPE == 1 ? half_to_float(h) : __uint_as_float(h << 16); }

// Two numbers of 16 bits in one register.
__device__ __forceinline__ u32 two_numbers(float low, float high) {
    u32 both;
    if (DTYPE == 0) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// The parts of a packed weight.
struct Weight {
    const u32* codes;         // (words, rows); under a mask (words,)
    const u16* scales;        // (rows, grids) float16; or, if CODED:
    const u32* scale_codes;   //   four bits each,
    const u16* row_scales;    //   times (rows,)
    const u16* group_scales;  //   times (grids,)
    const u32* zeros;
    const u32* mask;          // (segments, rows)
    const u32* starts;        // (segments, tiles + 1): survivors of a width before 32 rows of a segment
    int rows, grids, scale_words;
};

// Where a row is in 32 packed values: the shift to its field, in a word of planes of so many bits.
struct Field {
    int eight, four, two, one;
};

__device__ __forceinline__ Field field_of(int r) {
    const int eight = 8 * (r % 4);
    return Field{eight, eight + 4 * (r % 8 / 4), eight + 2 * (r % 16 / 4), eight + r / 4};
}

// Codes of four rows: chunk[0] of channels 8t .. 8t+3, chunk[1] of 8t+4 .. 8t+7, a byte each.
struct Codes {
    u32 chunk[2][4];
};

template <int P>
__device__ __forceinline__ void add_plane(Codes& c, const uint4& word, int chunk, int low) {
    const u32 w[4] = {word.x, word.y, word.z, word.w};
    constexpr u32 field = ((1u << P) - 1) * 0x01010101u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // A rotation, to where the plane belongs in a byte: what it carries around is masked out.
        const int turn = (low - P * ((chunk + i) % (8 / P))) & 31;
#pragma unroll
        for (int j = 0; j < 4; j++) c.chunk[i][j] |= __funnelshift_l(w[j], w[j], turn) & (field << low);
    }
}

// Codes of four rows of a segment: `four(row)` are the words of these in one of its word rows. Lane t has channels 8t ...
template <int BITS, typename Four>
__device__ __forceinline__ Codes codes_from(const Four& four, int t) {
    Codes c = {};
    if constexpr (BITS == 8) {
        const uint4 a = four(2 * t), b = four(2 * t + 1);
        return Codes{{{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}}};
    }
    if constexpr (BITS & 4) add_plane<4>(c, four(t), 2 * t, 0);
    if constexpr (BITS & 2) add_plane<2>(c, four((BITS & 4) + t / 2), 2 * t, BITS & 4);
    if constexpr (BITS & 1) add_plane<1>(c, four(BITS & 6), 2 * t, BITS & 6);
    return c;
}

// The zero point of row r of 32, `word(i)` being word i of theirs.
template <int BITS, typename Word>
__device__ __forceinline__ u32 zero_from(const Word& word, int r, const Field& field) {
    if (!ZEROS) return 1u << (BITS - 1);
    u32 zero = 0;
    if constexpr (BITS == 8) zero = word(r / 4) >> field.eight & 255;
    if constexpr (BITS & 4) zero |= word(r / 8) >> field.four & 15;
    if constexpr (BITS & 2) zero |= (word((BITS & 4) + r / 16) >> field.two & 3) << (BITS & 4);
    if constexpr (BITS & 1) zero |= (word(BITS & 6) >> field.one & 1) << (BITS & 6);
    return zero;
}

// The scale of a row as far as it is not packed.
__device__ __forceinline__ u16 scale_base(const Weight& w, int grid, int row) {
    return __ldg(CODED ? w.group_scales + grid : w.scales + (size_t)min(row, w.rows - 1) * w.grids + grid);
}

// The scale of a row but for row_scales; `word` holds its code, if CODED.
template <int BITS>
__device__ __forceinline__ float scale_from(u16 base, u32 word, const Field& field) {
    if (!CODED) return half_to_float(base);
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-0.25f * (float)(word >> field.four & 15)));
    return half_to_float(base) * (1.0f / ((1 << BITS) - 1) * power);
}

// What a switch does for every width of codes, and for float16 values.
#define CODE_WIDTHS(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(16)

// ---------------------------------------------------------------------------------------------------- copies, clusters

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Start to copy to shared memory.
__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void copy4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

// Kernels of one stream may overlap, if the next one is launched so: it starts as soon as all blocks of this one let it, and
// there is room. Until it waits, it may touch nothing but weights; and these only if whoever has written them is done: either
// this one has waited before it lets the next one start, or it is known not to come after anything that writes weights.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    int r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
#else
    return 0;
#endif
}

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}
// Without the promise that others see what was written before, for which a warp waits until memory has it all: who arrives only says
// that it is there, or that it has used what it read. (Of reads whose values nobody has waited for, this promises nothing either.)
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The same place of another block of the cluster.
__device__ __forceinline__ u32 in_block(u32 place, int rank) {
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(place) : "r"(rank));
#endif
    return place;
}
