// What kernels on packed weights have in common: numbers, codes from planes of bits, survivors of a mask, scales.
//
// Set by whoever compiles: DTYPE of the activations (0 bfloat16, 1 float16, 2 float32); IN, channels; CODED, whether
// scales are; ZEROS, whether there are zero points; MASKED, whether there is a bitmask; ALIGNED, whether rows come in
// fours, and codes and mask start where 16 bytes do; LAST, which bits of the last segment's mask stand for channels.

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

// ---------------------------------------------------------------------------------------------------- copies, launches

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

// ---------------------------------------------------------------------------------------------------- masks

#if MASKED
// Most survivors of 32 rows of a segment, in whole blocks, and what a read may run over.
constexpr int SURVIVOR_BYTES = 33 * 32 + 8;

// Eight codes of a block of packed words, a byte each: codes 8k .. 8k+7.
template <int BITS>
__device__ __forceinline__ uint2 eight_of(const u32* words, int k) {
    if constexpr (BITS == 8) return make_uint2(words[2 * k], words[2 * k + 1]);
    u32 c[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if constexpr (BITS & 4) c[i] |= words[k] >> (4 * i) & 0x0F0F0F0F;
        if constexpr (BITS & 2) c[i] |= (words[(BITS & 4) + k / 2] >> (4 * (k % 2) + 2 * i) & 0x03030303) << (BITS & 4);
        if constexpr (BITS & 1) c[i] |= (words[BITS & 6] >> (2 * k + i) & 0x01010101) << (BITS & 6);
    }
    return make_uint2(c[0], c[1]);
}

// Survivors of these rows of a segment: the codes x .. y - 1 of their stream.
__device__ __forceinline__ uint2 survivors_of(const Weight& w, int tile, int segment) {
    const u32* at = w.starts + (size_t)segment * ((w.rows + 31) / 32 + 1) + tile;
    return make_uint2(__ldg(at), __ldg(at + 1));
}

__device__ __forceinline__ int blocks_of(uint2 range) {
    return range.y > range.x ? (range.y + 31) / 32 - range.x / 32 : 0;
}

// Survivors as bytes in shared memory, one after the other, and eight zeros; of float16 values the low bytes, and behind
// them the high ones.
template <int BITS>
__device__ __forceinline__ void spread(const u32* words, int blocks, int lane, char* survivors) {
    const u32* mine = words + lane / 4 * BITS;
    auto move = [&](int i) {  // eight codes
        const u32* block = mine + i / 4 * BITS;
        ((uint2*)survivors)[lane + i] = eight_of<BITS == 16 ? 8 : BITS>(block, lane % 4);
        if constexpr (BITS == 16) ((uint2*)(survivors + SURVIVOR_BYTES))[lane + i] = eight_of<8>(block + 8, lane % 4);
    };
    const int left = blocks * 4 - lane;
    if (lane == 0) ((uint2*)survivors)[left] = make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < 96; i += 32)
        if (i < left) move(i);
#pragma unroll 1
    for (int i = 96; i < left; i += 32) move(i);
}

// The mask of a row of a segment, as far as it stands for channels.
__device__ __forceinline__ u32 mask_from(u32 word, int segment) { return segment == SEGMENTS_IN_ALL - 1 ? word & LAST : word; }

// Where `prmt` finds the bytes of eight channels, given as bits, four in each half of the result. A channel that is kept
// finds the next byte of the two operands; one that is not finds a sign, and becomes 0 if that byte is less than 128. The
// product is linear in the bits, spread to nibbles: one that is set moves all behind it on by one.
__device__ __forceinline__ u32 selectors(u32 eight) {
    u32 bits = (eight | eight << 12) & 0x000F000F;
    bits = (bits | bits << 6) & 0x03030303;
    bits = (bits | bits << 3) & 0x11111111;
    return bits * 0x11111108u + 0x88888888u;
}

// Eight channels of a row, a byte each: codes, 0 where there is none, and whether there is one, 1 or 0.
struct Eight {
    u32 codes[2], kept[2];
};

// `__byte_perm`, which knows no signs, masks its selector.
__device__ __forceinline__ u32 picked(u32 low, u32 high, u32 select) {
    u32 v;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(low), "r"(high), "r"(select));
    return v;
}

// What lies in shared memory at an address.
__device__ __forceinline__ u32 shared_word(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

// `at`: an address in shared memory, of the first survivor.
template <bool LARGE>  // whether codes can be 128 and more
__device__ __forceinline__ Eight placed(u32 at, u32 select, u32 ones) {
    const u32 word = at & ~3, turn = 8 * at;
    const u32 first = shared_word(word), middle = shared_word(word + 4), last = shared_word(word + 8);
    const u32 low = __funnelshift_r(first, middle, turn), high = __funnelshift_r(middle, last, turn);
    Eight v;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 half = i ? select >> 16 : select;
        v.kept[i] = picked(ones, ones, half);
        v.codes[i] = picked(low, high, half);
        if (LARGE) v.codes[i] &= v.kept[i] * 255;
    }
    return v;
}

// Survivors in the rows before; counts of two segments side by side.
__device__ __forceinline__ u32 before(u32 own, int lane) {
    u32 sum = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const u32 other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
    }
    return sum - own;
}

// Codes of rows first, first + STEP, first + 2 STEP, first + 3 STEP, channels 8t ..: of float16 values low and high bytes;
// 0 where pruned; and which are kept. A lane gives the mask of its own row, and where in shared memory this row's survivors
// start; `selectors_of` eight bits says where to find them.
template <int BITS, int STEP, typename Selectors>
__device__ __forceinline__ void masked_codes(u32 mask, u32 start, int first, int t, const Selectors& selectors_of,
                                             Codes (&c)[2], Codes& kept) {
    const u32 lower = (1u << (8 * t)) - 1;
    u32 ones = 0x01010101;
    asm("" : "+r"(ones));  // a register: else it is loaded anew each time
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const u32 m = __shfl_sync(~0u, mask, first + j * STEP);
        const u32 at = __shfl_sync(~0u, start, first + j * STEP) + __popc(m & lower);
        const u32 select = selectors_of(__byte_perm(m, 0, 0x4440 + t));
#pragma unroll
        for (int byte = 0; byte < (BITS == 16 ? 2 : 1); byte++) {
            const Eight v = placed<(BITS >= 8)>(at + byte * SURVIVOR_BYTES, select, ones);
#pragma unroll
            for (int i = 0; i < 2; i++) c[byte].chunk[i][j] = v.codes[i], kept.chunk[i][j] = v.kept[i];
        }
    }
}
#endif
