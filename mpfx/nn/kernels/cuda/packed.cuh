// What kernels on packed weights have in common: numbers, codes from planes of bits, survivors of a mask, scales.
//
// Set by whoever compiles: DTYPE of the activations (0 bfloat16, 1 float16, 2 float32); IN, channels; CODED, whether
// scales are; ZEROS, whether there are zero points; MASKED, whether there is a bitmask; ALIGNED, whether rows come in
// fours; LAST, which bits of the last segment's mask stand for channels.

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

// Kernels of one stream may overlap, if the next one is launched so: it starts as soon as all blocks of this one have, and
// there is room; until it waits, it may touch nothing but weights.
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

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
    int r;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
    return r;
#else
    return 1;
#endif
}

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// ---------------------------------------------------------------------------------------------------- masks

#if MASKED
// Most survivors of 32 rows of a segment, in whole blocks, and what a read may run over.
constexpr int SURVIVOR_BYTES = 33 * 32 + 8;

// Four codes of a block of packed words, a byte each: codes 4q .. 4q+3.
template <int BITS>
__device__ __forceinline__ u32 chunk_of(const u32* words, int q) {
    if constexpr (BITS == 8) return __ldg(words + q);
    u32 c = 0;
    if constexpr (BITS & 4) c |= __ldg(words + q / 2) >> (4 * (q % 2)) & 0x0F0F0F0F;
    if constexpr (BITS & 2) c |= (__ldg(words + (BITS & 4) + q / 4) >> (2 * (q % 4)) & 0x03030303) << (BITS & 4);
    if constexpr (BITS & 1) c |= (__ldg(words + (BITS & 6)) >> q & 0x01010101) << (BITS & 6);
    return c;
}

// Survivors of these rows of a segment: the codes x .. y - 1 of their stream.
__device__ __forceinline__ uint2 survivors_of(const Weight& w, int tile, int segment) {
    const u32* at = w.starts + (size_t)segment * ((w.rows + 31) / 32 + 1) + tile;
    return make_uint2(__ldg(at), __ldg(at + 1));
}

__device__ __forceinline__ int blocks_of(uint2 range) {
    return range.y > range.x ? (range.y + 31) / 32 - range.x / 32 : 0;
}

// Survivors as bytes in shared memory, one after the other.
template <int BITS>
__device__ __forceinline__ void spread(const u32* words, int blocks, int lane, char* survivors) {
#pragma unroll 4
    for (int i = lane; i < blocks * 8; i += 32) {
        const u32* block = words + i / 8 * BITS;
        if constexpr (BITS == 16) {
            ((u32*)survivors)[i] = __ldg(block + i % 8);
            ((u32*)(survivors + SURVIVOR_BYTES))[i] = __ldg(block + 8 + i % 8);
        } else ((u32*)survivors)[i] = chunk_of<BITS>(block, i % 8);
    }
}

__device__ __forceinline__ u32 four_from(const char* survivors, int at) {
    const u32* words = (const u32*)(survivors + (at & ~3));
    return __funnelshift_r(words[0], words[1], 8 * (at & 3));
}

// By bits of a mask, four at a time: where `prmt` finds the byte of each channel; those that are pruned find the other
// operand.
__device__ constexpr u16 PICK[16] = {0x4444, 0x4440, 0x4404, 0x4410, 0x4044, 0x4140, 0x4104, 0x4210,
                             0x0444, 0x1440, 0x1404, 0x2410, 0x1044, 0x2140, 0x2104, 0x3210};

// The mask of a row of a segment.
__device__ __forceinline__ u32 mask_of(const Weight& w, int segment, int row) {
    const u32 mask = row < w.rows ? __ldg(w.mask + (size_t)segment * w.rows + row) : 0;
    return segment == SEGMENTS_IN_ALL - 1 ? mask & LAST : mask;
}

// The codes of four rows; pruned weights get `absent_of` their row, four times a byte: the zero point, which counts
// nothing.
template <int BITS>
__device__ __forceinline__ void masked_codes(const char* survivors, u32 mask, u32 start, int lane, const u32* absent_of,
                                             const u32* pick, Codes (&c)[2]) {
    const int g = lane / 4, t = lane % 4;
    const int own = __popc(mask);
    int before = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, before, d);
        if (lane >= d) before += other;
    }
    before += (int)(start % 32) - own;
    const uint4 zeros = ((const uint4*)absent_of)[g];
    const u32 absent[4] = {zeros.x, zeros.y, zeros.z, zeros.w};
    const u32 lower = ((1u << (2 * t)) - 1) * 0x01010101u;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const u32 m = __shfl_sync(~0u, mask, 4 * g + j);
        int at = __shfl_sync(~0u, before, 4 * g + j) + __popc(m & lower);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 flags = m >> (2 * t + i) & 0x01010101;
            const u32 selector = pick[(flags * 0x01020408u) >> 24 & 15];
            c[0].chunk[i][j] = __byte_perm(four_from(survivors, at), BITS == 16 ? 0 : absent[j], selector);
            if constexpr (BITS == 16)
                c[1].chunk[i][j] = __byte_perm(four_from(survivors + SURVIVOR_BYTES, at), 0, selector);
            at += __popc(flags);
        }
    }
}
#endif

