// A packed weight unpacked, transposed and in the order of the input: for many rows of activations, next to a matrix
// product. A warp has 32 rows of a segment; lane (g, t) of it rows 4g .. 4g+3, channels 8t .. 8t+7.
//
// Set by whoever compiles, besides what packed.cuh and masked.cuh need: MASKED, whether there is a bitmask; WARPS of a block;
// ORDER as in decode.cuh; FULL, whether all segments are full, what is written comes in tiles of 32 rows, and the order is
// aligned.

struct Args {
    const void* order;
    Weight w;
    const int4* units;  // (segments,): bits, first word row (under a mask, first word of the width), grid, zero points
    void* out;          // (IN, out_rows), rows `first_row` ... of the weight
    int first_row, out_rows;
};

__device__ __forceinline__ int place_of(const Args& a, int channel) {
    if (ORDER == 0) return channel;
    return ORDER == 2 ? __ldg((const u16*)a.order + channel) : __ldg((const int*)a.order + channel);
}

// Four rows of a channel; `left` of them are wanted.
__device__ __forceinline__ void write(const Args& a, int place, int column, int left, const float (&v)[4]) {
    Number* to = (Number*)a.out + (size_t)((u32)place * (u32)a.out_rows + (u32)column);
    if (FULL) {
        if constexpr (DTYPE == 2) *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
        else *(uint2*)to = make_uint2(two_numbers(v[0], v[1]), two_numbers(v[2], v[3]));
    } else
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (j < left) {
                if constexpr (DTYPE == 2) to[j] = v[j];
                else to[j] = (u16)two_numbers(v[j], 0);
            }
}

// Places of eight channels among the input's; -1: there is no such channel.
__device__ __forceinline__ void places_of(const Args& a, int channel, int (&place)[8]) {
    if (FULL && ORDER == 2) {
        const uint4 v = __ldg((const uint4*)((const u16*)a.order + channel));
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 8; k++) place[k] = w[k / 2] >> (16 * (k % 2)) & 0xFFFF;
    } else
#pragma unroll
        for (int k = 0; k < 8; k++) place[k] = FULL || channel + k < IN ? place_of(a, channel + k) : -1;
}

struct Room {
    float2* steps;    // 32 rows: scale, zero point + 2^23
    u32* absent;      // MASKED only: the zero points as four bytes
    char* survivors;  // MASKED only
};

template <int BITS>
__device__ __forceinline__ void load_codes(const Args& a, const int4& unit, int segment, int tile, int lane,
                                           const Room& room, Codes (&c)[2]) {
#if MASKED
    const uint2 range = survivors_of(a.w, tile, segment);
    const int row = tile * 32 + lane;
    const u32 mask = row < a.w.rows ? mask_from(__ldg(a.w.mask + (size_t)segment * a.w.rows + row), segment) : 0;
    const u32 survivors = address(room.survivors);
    const u32* words = a.w.codes + (u32)unit.y + (size_t)(range.x / 32) * BITS;
    const int blocks = blocks_of(range);
    for (int i = lane; i < 2 * blocks; i += 32) spread<BITS>([&](int k) { return words[k]; }, i, survivors);
    if (lane == 0) share(survivors + 32 * blocks, 0);  // what is pruned behind the last survivor looks at the next code, too
    __syncwarp();
    const u32 start = survivors + (blocks ? range.x % 32 : 0) + before(__popc(mask));  // without survivors all look at that
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int r = lane / 4 * 4 + j;  // what is pruned gets the zero point, which counts nothing
        const u32 fill = BITS < 16 ? room.absent[r] : 0;
        place<BITS, false>(c, j, __shfl_sync(~0u, mask, r), __shfl_sync(~0u, start, r), fill, part_of(lane % 4), selectors);
    }
#else
    const int column = tile * 32 + lane / 4 * 4, left = a.w.rows - column;
    auto four = [&](int row) {
        const u32* p = a.w.codes + (size_t)((u32)unit.y + row) * a.w.rows + (left > 0 ? column : 0);
        if (ALIGNED) return __ldg((const uint4*)p);
        return make_uint4(__ldg(p), left > 1 ? __ldg(p + 1) : 0, left > 2 ? __ldg(p + 2) : 0, left > 3 ? __ldg(p + 3) : 0);
    };
    if constexpr (BITS == 16) {
        c[0] = codes_from<8>(four, lane % 4);
        c[1] = codes_from<8>([&](int row) { return four(8 + row); }, lane % 4);
    } else c[0] = codes_from<BITS>(four, lane % 4);
#endif
}

template <int BITS>
__device__ __forceinline__ void load_steps(const Args& a, const int4& unit, int tile, int lane, const Room& room) {
    const Field field = field_of(lane);
    const u32* zeros = a.w.zeros + unit.w + tile * BITS;
    const u32 zero = zero_from<BITS>([&](int i) { return __ldg(zeros + i); }, lane, field);
    const u32 code = CODED ? __ldg(a.w.scale_codes + (size_t)unit.z * a.w.scale_words + tile * 4 + lane / 8) : 0;
    const int row = min(tile * 32 + lane, a.w.rows - 1);
    const float row_scale = CODED ? half_to_float(__ldg(a.w.row_scales + row)) : 1.0f;
    room.steps[lane] = make_float2(row_scale * scale_from<BITS>(scale_base(a.w, unit.z, row), code, field), 8388608.0f + (float)zero);
    if (MASKED) room.absent[lane] = zero * 0x01010101u;
}

template <int BITS>
__device__ __forceinline__ void expand_segment(const Args& a, const int4& unit, int segment, int tile, int lane,
                                               const Room& room) {
    if constexpr (BITS > 0 && BITS < 16) load_steps<BITS>(a, unit, tile, lane, room);
    __syncwarp();
    Codes c[2] = {};
    if constexpr (BITS > 0) load_codes<BITS>(a, unit, segment, tile, lane, room, c);
    float2 steps[4];
    int place[8];
#pragma unroll
    for (int j = 0; j < 4; j++) steps[j] = room.steps[lane / 4 * 4 + j];
    places_of(a, segment * 32 + lane % 4 * 8, place);
    const int column = tile * 32 + lane / 4 * 4 - a.first_row;
    const int left = min(a.out_rows, a.w.rows - a.first_row) - column;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 low = c[0].chunk[k / 4][j], high = c[1].chunk[k / 4][j];
            if constexpr (BITS == 0) v[j] = 0;
            else if constexpr (BITS == 16) v[j] = half_to_float((u16)__byte_perm(low, high, k % 4 + (k % 4 + 4) * 16));
            // The code in the mantissa of 2^23: so what is to be taken off is that and the zero point.
            else v[j] = (__uint_as_float(__byte_perm(low, 0x4B000000, 0x7440 + k % 4)) - steps[j].y) * steps[j].x;
        }
        if (place[k] >= 0) write(a, place[k], column, left, v);
    }
}

#define WIDTH(BITS) \
    case BITS: \
        expand_segment<BITS>(a, unit, segment, tile, lane, room); \
        break;

extern "C" __global__ void __launch_bounds__(WARPS * 32) expand(const __grid_constant__ Args a) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int segment = blockIdx.y, tile = a.first_row / 32 + blockIdx.x * WARPS + warp;
    __shared__ __align__(16) float2 steps[WARPS][32];
    Room room = {steps[warp], nullptr, nullptr};
    if (MASKED) {
        __shared__ __align__(16) u32 absent[WARPS][32];
        __shared__ __align__(16) char survivors[WARPS][2 * SURVIVOR_BYTES];
        room.absent = absent[warp], room.survivors = survivors[warp];
    }
    if (tile * 32 >= min(a.w.rows, a.first_row + a.out_rows)) return;
    const int4 unit = __ldg(a.units + segment);
    switch (unit.x) {
        WIDTH(0)
        CODE_WIDTHS(WIDTH)
    }
}
