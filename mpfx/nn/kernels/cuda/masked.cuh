// What kernels on weights under a bitmask have in common, besides packed.cuh: survivors, and where a mask puts them.
//
// Set by whoever compiles: LAST, which bits of the last segment's mask stand for channels.

// Most survivors of 32 rows of a segment, in whole blocks, and what a read may run over.
constexpr int SURVIVOR_BYTES = 33 * 32 + 16;

// Eight codes of a block of packed words, a byte each: codes 8k .. 8k+7; `word(i)` being word i of the block.
template <int BITS, typename Word>
__device__ __forceinline__ uint2 eight_of(const Word& word, int k) {
    if constexpr (BITS == 8) return make_uint2(word(2 * k), word(2 * k + 1));
    u32 c[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if constexpr (BITS & 4) c[i] |= word(k) >> (4 * i) & 0x0F0F0F0F;
        if constexpr (BITS & 2) c[i] |= (word((BITS & 4) + k / 2) >> (4 * (k % 2) + 2 * i) & 0x03030303) << (BITS & 4);
        if constexpr (BITS & 1) c[i] |= (word(BITS & 6) >> (2 * k + i) & 0x01010101) << (BITS & 6);
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

// The mask of a row of a segment, as far as it stands for channels.
__device__ __forceinline__ u32 mask_from(u32 word, int segment) { return segment == SEGMENTS_IN_ALL - 1 ? word & LAST : word; }

// Where `prmt` finds the bytes of eight channels, given as bits, four in each half of the result. A channel that is kept
// finds the next byte of the two operands; one that is not finds the first one's sign, and becomes 0 if that byte is less
// than 128. The product is linear in the bits, spread to nibbles: one that is set moves all behind it on by one.
__device__ __forceinline__ u32 selectors(u32 eight) {
    u32 bits = (eight | eight << 12) & 0x000F000F;
    bits = (bits | bits << 6) & 0x03030303;
    bits = (bits | bits << 3) & 0x11111111;
    return (bits * 0x11111108u + 0x88888888u) & (bits * 7 | 0x88888888u);
}

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
__device__ __forceinline__ uint2 shared_two(u32 at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ uint4 shared_four(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ void share(u32 at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
__device__ __forceinline__ void share(u32 at, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Survivors as bytes in shared memory, one after the other; of float16 values the low bytes, and behind them the high ones.
// This takes the i-th sixteen there; `word(i)` being word i of their blocks.
template <int BITS, typename Word>
__device__ __forceinline__ void spread(const Word& word, int i, u32 to) {
    constexpr int EACH = BITS == 16 ? 8 : BITS;
#pragma unroll
    for (int byte = 0; byte < (BITS == 16 ? 2 : 1); byte++) {
        auto of_block = [&](int k) { return word(i / 2 * BITS + 8 * byte + k); };
        const uint2 low = eight_of<EACH>(of_block, i % 2 * 2), high = eight_of<EACH>(of_block, i % 2 * 2 + 1);
        share(to + i * 16 + byte * SURVIVOR_BYTES, make_uint4(low.x, low.y, high.x, high.y));
    }
}

// Survivors in the rows before; counts of two segments side by side.
__device__ __forceinline__ u32 before(u32 own) {
    u32 sum = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2)
        asm volatile("{.reg .b32 other; .reg .pred there; shfl.sync.up.b32 other|there, %0, %1, 0, -1; @there add.u32 %0, %0, other;}"
                     : "+r"(sum)
                     : "r"(d));
    return sum - own;
}

// Bits of the first word where `mask` has them, of the second one elsewhere.
__device__ __forceinline__ u32 chosen(u32 first, u32 second, u32 mask) {
    u32 v;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(v) : "r"(first), "r"(second), "r"(mask));
    return v;
}

// Eight channels of a row, a byte each: its survivors from an address in shared memory on, and `fill`, four bytes that are
// the same, where there is none. Of codes less than 128 the first byte has to be one, even if it is behind the last survivor:
// what is pruned finds its sign.
template <bool LARGE>  // whether codes can be 128 and more
__device__ __forceinline__ uint2 placed(u32 at, u32 select, u32 fill) {
    const u32 word = at & ~3u, turn = 8 * at;
    const u32 first = shared_word(word), middle = shared_word(word + 4), last = shared_word(word + 8);
    const u32 low = __funnelshift_r(first, middle, turn), high = __funnelshift_r(middle, last, turn);
    auto half = [&](u32 select) {
        if (!LARGE) return picked(low ^ fill, high ^ fill, select) ^ fill;
        const u32 kept = 255 * picked(0x01010101, 0x01010101, select);
        return (picked(low, high, select) & kept) | (fill & ~kept);
    };
    return make_uint2(half(select), half(select >> 16));
}

// The same of codes of four bits as they are packed: `at` counts codes of shared memory. Of eight codes in a row from there
// on, one is in each place of a word: in that of the first word, or if that place is before the first code, of the next one.
__device__ __forceinline__ uint2 placed_of_four_bits(u32 at, u32 select, u32 fill) {
    const u32 word = at >> 1 & ~3u, four = 0x0F0F0F0F;
    u32 place = at & 7;
    asm("" : "+r"(place));  // else eight times that is found anew
    const u32 from_first = (0xFFFFFFFFF0F0F0F0ull << (8 * place)) >> 32;
    const u32 eight = chosen(shared_word(word), shared_word(word + 4), from_first);
    const u32 low = (eight ^ fill) & four, high = (eight >> 4 ^ fill) & four;
    const u32 turned = chosen(select + place * 0x11111111u, select, 0x77777777u);
    return make_uint2(picked(low, high, turned) ^ fill, picked(low, high, turned >> 16) ^ fill);
}

// Which part of a row's mask a lane has: bits 8t ..
struct Part {
    u32 lower, octet;  // the bits before these; what makes `__byte_perm` take these
};

__device__ __forceinline__ Part part_of(int t) { return Part{(1u << (8 * t)) - 1, 0x4440u + t}; }

// The j-th of four rows of a lane, its part of the channels; of float16 values low bytes and, next, high ones; `fill` where
// pruned. Given are the mask of the row, where its survivors start, and the selectors of any eight bits.
template <int BITS, bool AS_PACKED, typename Of>
__device__ __forceinline__ void place(Codes* c, int j, u32 mask, u32 start, u32 fill, const Part& part, const Of& selectors_of) {
    const u32 at = start + __popc(mask & part.lower), select = selectors_of(picked(mask, 0, part.octet));
#pragma unroll
    for (int byte = 0; byte < (BITS == 16 ? 2 : 1); byte++) {
        const u32 own = at + byte * SURVIVOR_BYTES;
        const uint2 v = AS_PACKED ? placed_of_four_bits(own, select, fill) : placed<(BITS >= 8)>(own, select, fill);
        c[byte].chunk[0][j] = v.x, c[byte].chunk[1][j] = v.y;
    }
}
