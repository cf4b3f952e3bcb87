// Matrix times a few vectors on packed weights, on tensor cores. Here is what units of dense codes (decode.cu) and of survivors
// under a bitmask (decode_masked.cu) have in common; behind one of these comes the kernel that multiplies them
// (decode_kernel.cuh).
//
// A group of warps owns 32 rows of the weight (one of every block of a cluster); they share the channels out in units of
// up to 64 channels with one scale a row. Every warp starts to copy the words of its first units to shared memory; while
// they are on their way the block puts the activations into the order of the channels; then every warp multiplies unit
// after unit. Codes are unpacked to bytes, the left operand as `mma` wants it: lane (g, t) of a warp, g = lane / 4, t =
// lane % 4, holds four rows, channels 8t .. 8t+7 of a segment. Activations become integers relative to the largest
// one of their vector, of three bytes (four, if they are float32): the right operand, a column each. So products are
// exact, and the zero point is taken off once a unit, by way of the sum of its activations.
//
// Several weights that the same activations meet, in the same order, are multiplied by one launch: its blocks are shared
// out among these sites.
//
// Set by whoever compiles, besides what packed.cuh needs: SITES; GROUPS of a block, each with rows of its own; WARPS of a group;
// STAGES, units that are copied ahead; SEGMENTS of a unit, at most; COUNT of vectors; AT_ONCE of them that are put in
// order together; ORDER, bytes of an entry of the channel order, 0: none; EVEN, whether all segments are full, and vectors
// and the order are aligned.

struct Site {
    Weight w;
    const int4* units;  // (warps of a cluster, most_units): after the last one of a warp, bits of 0
    const void* bias;   // (rows,), dtype of x, or null
    void* out;          // (COUNT, rows), dtype of x
    int most_units, stage_bytes;
    int first_block;    // of a launch, along y
};

struct Args {
    const void* x;      // (COUNT, IN)
    const void* order;  // (IN,) u16 or u32: the activation that meets a channel
    int early;          // whether weights are to be read before what ran before has come to its end
    Site sites[SITES];
};

constexpr int PARTS = DTYPE == 2 ? 4 : 3;  // bytes of an activation
constexpr int THREADS = GROUPS * WARPS * 32;
constexpr int COLUMNS = COUNT * PARTS;
constexpr int TILES = (COLUMNS + 7) / 8;
constexpr int SEGMENT_BYTES = COLUMNS * 32;  // of activations
constexpr int TAIL = 64;  // bytes of a stage besides the codes: 8 words of zero points, 4 of scales

// An integer in the mantissa of 3 * 2^22: as a float, it is that much too large. So sums become floats that start from it, as
// long as they are less than 2^22: those of 64 channels are half as much.
constexpr int MAGIC = 0x4B400000;
__device__ __forceinline__ float whole_sum(int sum) { return __int_as_float(sum) - __int_as_float(MAGIC); }

// What is to stay in a register, as it is needed too often to be computed anew each time.
template <typename T>
__device__ __forceinline__ void keep(T*& p) { asm volatile("" : "+l"(p)); }
__device__ __forceinline__ void keep(int& i) { asm volatile("" : "+r"(i)); }
__device__ __forceinline__ void keep(u32& i) { asm volatile("" : "+r"(i)); }

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int LATER>
__device__ __forceinline__ void wait_for_all_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

// ---------------------------------------------------------------------------------------------------- units, lanes, room

struct Unit {
    int bits, segments;           // of every channel; of 32 channels each
    int zero_lanes, scale_lanes;  // lanes that copy its zero points, from 0 up to here, and its scales, from 8 up to here
    int segment, grid;            // the first one; of the scales
    u32 word;                     // first word row of the codes; under a mask, first word of the width's stream
    int zero;                     // first word of its zero points
};

__device__ __forceinline__ Unit unit(const int4& v) {
    return Unit{v.x & 255, v.x >> 8 & 255, v.x >> 16 & 255, v.x >> 24, v.y & 0xFFFF, v.y >> 16, (u32)v.z, v.w};
}

// Which part of the work a lane has.
struct Lane {
    int lane, g, t, tile;
    Field field;      // of row `lane`
    const u32* tail;  // zero points, or coded scales of these rows

    __device__ __forceinline__ explicit Lane(const Site& a)
        : lane(threadIdx.x % 32), g(lane / 4), t(lane % 4), tile((blockIdx.y - a.first_block) * GROUPS + threadIdx.x / (WARPS * 32)),
          field(field_of(lane)), tail(lane < 8 ? a.w.zeros + lane : a.w.scale_codes + (tile * 4 + lane - 8)) {}
};

struct Planned;  // what is known of a unit before it is fetched: dense codes and survivors have their own

// Shared memory: what a block has, and what a warp has.
struct Room {
    u32* largest;     // of every vector, as bits of a float32
    char* given;      // AT_ONCE activation vectors as they are given
    char* x;          // of every segment, COLUMNS columns of 32 bytes; one more segment of zeros
    float* sums;      // of every segment's columns, as `sum_as_read` says
    char* own;        // ROOM_BYTES, for whatever units want
    char* ring;       // STAGES stages: words of a unit, and TAIL
    u32 ring_at;
    Planned* units;   // of this warp, as they are to be multiplied
};

// ---------------------------------------------------------------------------------------------------- products

__device__ __forceinline__ void multiply(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

typedef float Results[2][TILES][4];  // of a lane's rows 2m and 2m + 1, columns 2t and 2t + 1 of every tile
typedef int Sums[2][TILES][4];

// Add the codes of four rows times the activations of one segment: `right(n)` are those of tile n.
template <typename Right>
__device__ __forceinline__ void multiply_codes(Sums& d, const Codes& c, const Right& right) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const uint2 b = right(n);
#pragma unroll
        for (int m = 0; m < 2; m++)
            multiply(d[m][n], c.chunk[0][2 * m], c.chunk[0][2 * m + 1], c.chunk[1][2 * m], c.chunk[1][2 * m + 1], b);
    }
}

// float16 values, given as their low and high bytes: few weights have them, so they are multiplied one by one.
__device__ __forceinline__ void add_raw(const Codes& lows, const Codes& highs, const char* x, const Lane& l, Results& result) {
#pragma unroll 1
    for (int column = 0; column < COLUMNS; column++) {
        const signed char* bytes = (const signed char*)x + column * 32 + l.t * 8;
        float sum[4] = {};
#pragma unroll
        for (int k = 0; k < 8; k++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 low = lows.chunk[k / 4][j] >> (8 * (k % 4)) & 255, high = highs.chunk[k / 4][j] >> (8 * (k % 4)) & 255;
                sum[j] += half_to_float((u16)(low | high << 8)) * (float)bytes[k];
            }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sum[j] += __shfl_xor_sync(~0u, sum[j], 1);
            sum[j] += __shfl_xor_sync(~0u, sum[j], 2);
#pragma unroll
            for (int n = 0; n < TILES; n++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (column == n * 8 + 2 * l.t + i) result[j / 2][n][j % 2 * 2 + i] += sum[j];
        }
    }
}
