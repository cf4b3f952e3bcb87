// Matrix times a few vectors on packed weights, on tensor cores.
//
// A group of warps owns 32 rows of the weight (one of every block of a cluster); they share the channels out in units of
// up to 64 channels with one scale a row. Every warp starts to copy the words of its first units to shared memory; while
// they are on their way the block puts the activations into the order of the channels; then every warp multiplies unit
// after unit. Codes are unpacked to bytes, the left operand as `mma` wants it: lane (g, t) of a warp, g = lane / 4, t =
// lane % 4, holds four rows, channels 8t .. 8t+7 of a segment. Activations become integers relative to the largest
// one of their vector, of three bytes (four, if they are float32): the right operand, a column each. So products are
// exact, and the zero point is taken off once a unit, by way of the sum of its activations.
//
// Under a mask a unit is copied as it lies in memory: a word of the mask for every row, and the words that hold the
// survivors of its rows. These become bytes in shared memory, one after the other; a lane picks its own from there, by a
// table of what eight bits of a mask select. What is pruned becomes 0, so the zero point is taken off by way of the sum of
// those activations whose weights are kept: products of the mask itself.
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

constexpr int PARTS = DTYPE == 2 ? 4 : 3;       // bytes of an activation
constexpr int DIGITS = DTYPE == 2 ? 30 : 22;    // bits of the largest one, as an integer
constexpr int THREADS = GROUPS * WARPS * 32;
constexpr int COLUMNS = COUNT * PARTS;
constexpr int TILES = (COLUMNS + 7) / 8;
constexpr int SEGMENT_BYTES = COLUMNS * 32;  // of activations
constexpr int TAIL = 64;  // bytes behind the codes of a stage: 8 words of zero points, 4 of scales
#if MASKED
constexpr int MASK_BYTES = 128;  // of a segment, before its survivors' words
constexpr int ROOM_BYTES = 256 + 2 * SURVIVOR_BYTES;
constexpr int TABLE_BYTES = 32 << 10;  // `selectors` of any eight bits, once for each lane: so no two want the same bank
constexpr int BETWEEN_ROWS = 8, BETWEEN_LANES = 1;  // rows g, g + 8, ...: lanes read what lies close together
#else
constexpr int ROOM_BYTES = 256;
constexpr int TABLE_BYTES = 0;
constexpr int BETWEEN_ROWS = 1, BETWEEN_LANES = 4;  // rows 4g .. 4g+3: what a lane reads is one piece
#endif

// ---------------------------------------------------------------------------------------------------- small parts

// An integer in the mantissa of 3 * 2^22: as a float, it is that much too large.
constexpr int MAGIC = 0x4B400000;

__device__ __forceinline__ void multiply(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ void store(void* p, size_t i, float f) {
    if (DTYPE == 2) ((float*)p)[i] = f;
    else if (DTYPE == 0) asm volatile("{.reg .b16 h; cvt.rn.bf16.f32 h, %1; st.global.b16 [%0], h;}" ::"l"((u16*)p + i), "f"(f));
    else asm volatile("{.reg .b16 h; cvt.rn.f16.f32 h, %1; st.global.b16 [%0], h;}" ::"l"((u16*)p + i), "f"(f));
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int LATER>
__device__ __forceinline__ void wait_for_all_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

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
    Field field;           // of row `lane`
    const char* codes;                   // what it copies of the first word rows: 16 bytes of one, or if not ALIGNED, 4;
                                         // MASKED: of the masks of segments
    const uint4* pieces;                 // MASKED only: its piece of the codes, counted from where 16 bytes are aligned
    u32 row_bytes;                       // from one word row to the next one
    int codes_to;                        // where to, in a stage
    int from_row;                        // 0 .. 3, or more than any unit has, if the weight has no such rows
    const u32* tail;                     // zero points, or coded scales of these rows
    int zero_tile;                       // 0 if it copies scales
};

// What is to stay in a register, as it is needed too often to be computed anew each time.
template <typename T>
__device__ __forceinline__ void keep(T*& p) { asm volatile("" : "+l"(p)); }
__device__ __forceinline__ void keep(int& i) { asm volatile("" : "+r"(i)); }

// Of a stage, what a segment has under a mask: the mask's words, then those of its survivors.
__device__ __forceinline__ int part_bytes(const Site& a) { return (a.stage_bytes - TAIL) / SEGMENTS; }

__device__ __forceinline__ Lane lane_of(const Site& a) {
    Lane l;
    const int r = threadIdx.x % 32;
    l.lane = r, l.g = r / 4, l.t = r % 4, l.tile = (blockIdx.y - a.first_block) * GROUPS + threadIdx.x / (WARPS * 32);
    l.field = field_of(r);
    const int row = ALIGNED ? r / 8 : 0, piece = ALIGNED ? r % 8 : r / 4, column = l.tile * 32 + (ALIGNED ? 4 * piece : r);
    l.from_row = column < a.w.rows ? row : 1 << 20;
    l.codes = (const char*)((MASKED ? a.w.mask : a.w.codes) + (size_t)row * a.w.rows + column);
    l.row_bytes = 4 * a.w.rows;
    l.codes_to = MASKED ? row * part_bytes(a) + column % 32 * 4 : row * 128 + ((piece ^ row * 2) << 4) + (ALIGNED ? 0 : r % 4 * 4);
    l.tail = r < 8 ? a.w.zeros + r : a.w.scale_codes + (l.tile * 4 + r - 8);
    l.zero_tile = r < 8 ? l.tile : 0;
    l.pieces = (const uint4*)((size_t)a.w.codes & ~(size_t)15) + r;
    if (MASKED) keep(l.pieces);
    keep(l.codes), keep(l.codes_to), keep(l.from_row), keep(l.tail), keep(l.zero_tile);
    return l;
}

// What is known of a unit when it is fetched.
struct Planned {
    int4 unit;
#if MASKED
    int4 stretches;  // where the survivors of its segments are, as `stretch_of` writes it
#endif
};

// Shared memory: what a block has, and what a warp has.
struct Room {
    char* given;      // AT_ONCE activation vectors as they are given
    char* x;          // of every segment, COLUMNS columns of 32 bytes; one more segment of zeros
    float* sums;      // of every segment's columns
    u32* largest;     // of every vector, as bits of a float32
    Planned* units;
    char* ring;       // STAGES stages: words of a unit, 128 bytes a word row, and TAIL
    u32 ring_at;
    float2* steps;    // 32 rows: scale, and scale times zero point
    char* survivors;  // MASKED only: bytes, twice SURVIVOR_BYTES
    u32 table;        // MASKED only: address of the selectors for this lane
};

// The j-th row of a lane.
__device__ __forceinline__ int row_of(int g, int j) { return g * BETWEEN_LANES + j * BETWEEN_ROWS; }

// ---------------------------------------------------------------------------------------------------- activations

// Channels that a thread puts into order: eight in a row, as often as it takes. Four threads have a segment.
constexpr int ROUNDS = (SEGMENTS_IN_ALL * 4 + THREADS - 1) / THREADS;

// Which activations meet eight channels.
struct Places {
    int at[8];
};

__device__ __forceinline__ Places places(const Args& a, int channel) {
    Places p;
    if (ORDER == 2 && EVEN) {
        const uint4 v = __ldg((const uint4*)((const u16*)a.order + min(channel, IN - 8)));
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 8; k++) p.at[k] = w[k / 2] >> (16 * (k % 2)) & 0xFFFF;
    } else
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const int c = min(channel + k, IN - 1);
            p.at[k] = ORDER == 0 ? c : ORDER == 2 ? __ldg((const u16*)a.order + c) : __ldg((const int*)a.order + c);
        }
    return p;
}

// Numbers that another kernel may have written while this one was already running.
__device__ __forceinline__ uint4 load16(const void* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// The larger of the sizes of numbers: their bits without the sign are in the order of the numbers.
__device__ __forceinline__ u32 larger(u32 largest, const uint4& v) {
    if (DTYPE == 2) return max(max(max(v.x << 1, v.y << 1), max(v.z << 1, v.w << 1)), largest);
    const u32 all = 0x7FFF7FFF;
    return __vmaxu2(__vmaxu2(__vmaxu2(v.x & all, v.y & all), __vmaxu2(v.z & all, v.w & all)), largest);
}

// What a thread brings of AT_ONCE vectors, 16 bytes a time; or, if they are not aligned, or too many for its registers,
// nothing: then it is loaded where it is stored.
constexpr int PIECES = (IN * (int)sizeof(Number) / 16 + THREADS - 1) / THREADS;
constexpr bool AHEAD = EVEN && PIECES * AT_ONCE <= 8;

struct Given {
    uint4 piece[AHEAD ? AT_ONCE * PIECES : 1];
};

__device__ __forceinline__ bool is_piece(int i) { return i < IN * (int)sizeof(Number) / 16; }

__device__ __forceinline__ const Number* vector_of(const Args& a, int b) { return (const Number*)a.x + (size_t)b * IN; }

// Start to load vectors b .. b + AT_ONCE - 1.
__device__ __forceinline__ void load_activations(const Args& a, int b, Given& given) {
    if (AHEAD)
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int k = 0; k < PIECES; k++) {
                const int piece = k * THREADS + threadIdx.x;
                given.piece[i * PIECES + k] = make_uint4(0, 0, 0, 0);
                if (b + i < COUNT && is_piece(piece)) given.piece[i * PIECES + k] = load16((const uint4*)vector_of(a, b + i) + piece);
            }
}

// Take them to shared memory, and find the largest of each.
__device__ __forceinline__ void place_activations(const Args& a, const Room& room, int b, const Given& given) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        if (b + i >= COUNT) break;
        const Number* from = vector_of(a, b + i);
        Number* to = (Number*)room.given + i * IN;
        u32 largest = 0;
        if (EVEN) {
#pragma unroll
            for (int k = 0; k < PIECES; k++) {
                const int piece = k * THREADS + threadIdx.x;
                if (!is_piece(piece)) break;
                const uint4 v = AHEAD ? given.piece[i * PIECES + k] : load16((const uint4*)from + piece);
                ((uint4*)to)[piece] = v;
                largest = larger(largest, v);
            }
            largest = DTYPE == 2 ? largest >> 1 : max(largest & 0xFFFF, largest >> 16);
        } else
            for (int k = threadIdx.x; k < IN; k += THREADS) {
                const Number v = ((const volatile Number*)from)[k];
                to[k] = v;
                largest = max(largest, (DTYPE == 2 ? __float_as_uint(v) & 0x7FFFFFFF : (u32)v & 0x7FFF));
            }
        if (DTYPE == 0) largest <<= 16;
        if (DTYPE == 1) largest = __float_as_uint(half_to_float((u16)largest));
        largest = __reduce_max_sync(~0u, largest);
        if (threadIdx.x % 32 == 0) atomicMax(room.largest + b + i, largest);
    }
}

// What the integers of a vector count: a power of two. Not a number, if an activation is not finite.
__device__ __forceinline__ float unit_of(u32 largest) {
    const int exponent = max((int)(largest >> 23) - DIGITS + 1, 1);
    return largest >= 0x7F800000 ? __uint_as_float(0x7FC00000) : __uint_as_float((u32)exponent << 23);
}

// A number as an integer, plus 128 in each of its bytes: so these are unsigned.
__device__ __forceinline__ u32 whole(float value, float inverse) {
    if (DTYPE == 2) return __float2int_rn(value * inverse) + 0x80808080u;
    return __float_as_uint(fmaf(value, inverse, __int_as_float(MAGIC))) - MAGIC + 0x808080u;
}

// Put eight channels of a vector in order, as columns of bytes.
__device__ __forceinline__ void arrange(const Room& room, const Places& p, const Number* given, int octet, int b) {
    const int left = IN - octet * 8;
    const float inverse = __frcp_rn(unit_of(room.largest[b]));
    u32 value[8];
#pragma unroll
    for (int k = 0; k < 8; k++) value[k] = whole(EVEN || k < left ? to_float(given[p.at[k]]) : 0.0f, inverse);
    u32 pair[2][4];  // their low two bytes and their high two bytes, side by side
#pragma unroll
    for (int k = 0; k < 4; k++) {
        pair[0][k] = __byte_perm(value[2 * k], value[2 * k + 1], 0x5140);
        pair[1][k] = __byte_perm(value[2 * k], value[2 * k + 1], 0x7362);
    }
    uint2* to = (uint2*)(room.x + octet / 4 * SEGMENT_BYTES + octet % 4 * 8) + b * PARTS * 4;
    float* sums = room.sums + octet / 4 * COLUMNS + b * PARTS;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {  // the highest byte first
        const int byte = PARTS - 1 - part, select = byte % 2 ? 0x7632 : 0x5410;
        const u32(&from)[4] = pair[byte / 2];
        const u32 first = __byte_perm(from[0], from[1], select) ^ 0x80808080, second = __byte_perm(from[2], from[3], select) ^ 0x80808080;
        to[part * 4] = make_uint2(first, second);
        int sum = __dp4a((int)first, 0x01010101, __dp4a((int)second, 0x01010101, 0));
        const u32 four = 15u << (threadIdx.x & 28);  // the threads of this segment
        sum += __shfl_xor_sync(four, sum, 1);
        sum += __shfl_xor_sync(four, sum, 2);
        if (octet % 4 == 0) sums[part] = (float)sum;
    }
}

// One more segment, of zeros, stands in where a unit has only one. Nothing is the largest so far.
__device__ __forceinline__ void add_zeros(const Room& room) {
    for (int i = threadIdx.x; i < COLUMNS * 4; i += THREADS)
        ((uint2*)(room.x + SEGMENTS_IN_ALL * SEGMENT_BYTES))[i] = make_uint2(0, 0);
    for (int i = threadIdx.x; i < COLUMNS; i += THREADS) room.sums[SEGMENTS_IN_ALL * COLUMNS + i] = 0;
    if (threadIdx.x < COUNT) room.largest[threadIdx.x] = 0;
}

// ---------------------------------------------------------------------------------------------------- weights

// Words of four rows in a stage. Swizzled, as lanes with one g read four word rows at once.
__device__ __forceinline__ uint4 staged(const char* stage, int row, int g) {
    return *(const uint4*)(stage + row * 128 + ((g ^ (row & 3) * 2) << 4));
}

// Scale of row `lane`, and scale times zero point.
template <int BITS>
__device__ __forceinline__ void step(const u32* tail, u16 base, float row_scale, const Lane& l, const Room& room) {
    if constexpr (BITS == 16) return;
    const u32 zero = zero_from<BITS>([&](int i) { return tail[i]; }, l.lane, l.field);
    const float scale = scale_from<BITS>(base, tail[8 + l.lane / 8], l.field) * row_scale;
    room.steps[l.lane] = make_float2(scale, scale * (float)zero);
}

// ---------------------------------------------------------------------------------------------------- products

typedef float Results[2][TILES][4];  // of a lane's rows 2m and 2m + 1, columns 2t and 2t + 1 of every tile
typedef int Sums[2][TILES][4];

// Add the codes of four rows times the activations of one segment.
__device__ __forceinline__ void multiply_codes(Sums& d, const Codes& c, const char* x, const Lane& l) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        uint2 b = make_uint2(0, 0);
        if (n * 8 + l.g < COLUMNS) b = *(const uint2*)(x + (n * 8 + l.g) * 32 + l.t * 8);
#pragma unroll
        for (int m = 0; m < 2; m++)
            multiply(d[m][n], c.chunk[0][2 * m], c.chunk[0][2 * m + 1], c.chunk[1][2 * m], c.chunk[1][2 * m + 1], b);
    }
}

// float16 values, given as their low and high bytes: few weights have them, so they are multiplied one by one.
__device__ __forceinline__ void add_raw(const Codes& lows, const Codes& highs, const char* x, const Lane& l,
                                        Results& result) {
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

// Sums of the activations of a unit's segments.
struct Ones {
    float of[TILES][2];
    __device__ float operator()(int, int n, int i) const { return of[n][i % 2]; }
};

__device__ __forceinline__ Ones ones_of(const float* sums, const float* more, const Lane& l) {
    Ones ones;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int column = min(n * 8 + 2 * l.t + i, COLUMNS - 1);
            ones.of[n][i] = sums[column] + (SEGMENTS == 2 ? more[column] : 0.0f);
        }
    return ones;
}

__device__ __forceinline__ float whole_sum(int sum) { return __int_as_float(sum) - __int_as_float(MAGIC); }

__device__ __forceinline__ void clear(Sums& d) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) d[m][n][i] = MAGIC;
}

// Add what was found for a unit; `ones` are the sums of those activations that a code of the row counts.
template <typename Ones>
__device__ __forceinline__ void add_unit(const Ones& ones, const Room& room, const Lane& l, const Sums& d, Results& result) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const float2 steps[2] = {room.steps[row_of(l.g, 2 * m)], room.steps[row_of(l.g, 2 * m + 1)]};
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                result[m][n][i] = fmaf(steps[i / 2].x, whole_sum(d[m][n][i]), fmaf(-steps[i / 2].y, ones(m, n, i), result[m][n][i]));
    }
}

// ---------------------------------------------------------------------------------------------------- units

#if MASKED
// Where the survivors of a segment are, as they lie in memory, in whole pieces of 16 bytes.
struct Stretch {
    u32 first;  // piece, from the one on in which the codes start
    u32 packed;

    __device__ int pieces() const { return packed & 255; }
    __device__ int blocks() const { return packed >> 8 & 63; }   // of 32 survivors
    __device__ int skip() const { return packed >> 14 & 12; }    // bytes of the first piece, before the first block
    __device__ int start() const { return packed >> 18 & 31; }   // survivors of the first block that come before
};

__device__ __forceinline__ Stretch stretch_of(const Site& a, const Unit& u, int tile, int segment) {
    const uint2 range = survivors_of(a.w, tile, segment);
    const int blocks = blocks_of(range), offset = (size_t)a.w.codes & 15;
    const size_t first = offset + 4 * (u.word + (size_t)(range.x / 32) * u.bits), skip = first & 15;
    const u32 pieces = blocks ? (skip + blocks * u.bits * 4 + 15) / 16 : 0;
    return Stretch{(u32)(first / 16), pieces | blocks << 8 | (u32)skip << 14 | range.x % 32 << 18};
}

__device__ __forceinline__ int4 stretches_of(const Site& a, const Unit& u, int tile) {
    Stretch one = {}, other = {};
    if (u.bits) one = stretch_of(a, u, tile, u.segment);
    if (u.segments > 1) other = stretch_of(a, u, tile, u.segment + 1);
    return make_int4(one.first, one.packed, other.first, other.packed);
}

__device__ __forceinline__ Stretch stretch(const int4& unit, int s) { return s ? Stretch{(u32)unit.z, (u32)unit.w} : Stretch{(u32)unit.x, (u32)unit.y}; }

// Start to copy the masks and survivors of a unit: a part of the stage for each segment.
__device__ __forceinline__ void fetch_words(const Site& a, const Unit& u, const int4& stretches, const Lane& l, u32 stage) {
    const char* mask = l.codes + (u32)u.segment * l.row_bytes;
    if (ALIGNED) {
        if (l.from_row < u.segments) copy16(stage + l.codes_to, mask);
    } else
        for (int s = l.from_row; s < u.segments; s++) copy4(stage + s * part_bytes(a) + l.codes_to, mask + s * l.row_bytes);
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++) {
        const Stretch found = stretch(stretches, s);
        const uint4* from = l.pieces + found.first;
        const u32 to = stage + s * part_bytes(a) + MASK_BYTES + l.lane * 16;
        const int pieces = found.pieces();
        if (l.lane < pieces) copy16(to, from);
        if (pieces > 32)
#pragma unroll 1
            for (int i = 32; i < pieces - l.lane; i += 32) copy16(to + i * 16, from + i);
    }
}

// The survivors of a unit as bytes; and what a lane's own row has: its masks, and where its survivors start.
template <int BITS>
__device__ __forceinline__ void spread_unit(const Site& a, const Unit& u, const int4& stretches, const char* stage,
                                            const Lane& l, const Room& room, u32 (&mask)[SEGMENTS], u32 (&start)[SEGMENTS]) {
    const bool is_row = l.tile * 32 + l.lane < a.w.rows;
    u32 own = 0;
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++) {
        const char* part = stage + s * part_bytes(a);
        mask[s] = is_row && s < u.segments ? mask_from(((const u32*)part)[l.lane], u.segment + s) : 0;
        own |= __popc(mask[s]) << (16 * s);
        const Stretch found = stretch(stretches, s);
        if (BITS < 16 || s == 0)
            spread<BITS>((const u32*)(part + MASK_BYTES + found.skip()), found.blocks(), l.lane, room.survivors + s * SURVIVOR_BYTES);
    }
    const u32 sum = before(own, l.lane);
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++) start[s] = (sum >> (16 * s) & 0xFFFF) + stretch(stretches, s).start() + address(room.survivors) + s * SURVIVOR_BYTES;
    __syncwarp();
}

// Selectors of any eight bits, for every lane.
__device__ __forceinline__ void fill_table(char* table) {
    for (int i = threadIdx.x; i < 256 * 32; i += THREADS) ((u32*)table)[i] = selectors(i / 32);
}
#endif

// Start to copy what a unit needs of the weight.
__device__ __forceinline__ void fetch(const Site& a, const Unit& u, const Planned& planned, const Lane& l, u32 stage) {
#if MASKED
    fetch_words(a, u, planned.stretches, l, stage);
#else
    const int words = u.bits * u.segments - l.from_row;
    const char* from = l.codes + u.word * l.row_bytes;
    if (ALIGNED) {
        const u32 to = stage + l.codes_to, four_rows = 4 * l.row_bytes;
#pragma unroll
        for (int i = 0; i < 16; i += 4, from += four_rows)
            if (i < words) copy16(to + i * 128, from);
    } else
#pragma unroll 1
        for (int r = 0; r < words; r++, from += l.row_bytes)
            copy4(stage + r * 128 + (l.codes_to ^ (r & 3) << 5), from);
#endif
    const int at = (l.lane < 8 ? u.zero : u.grid * a.w.scale_words) + l.zero_tile * u.bits;
    if (l.lane < (l.lane < 8 ? u.zero_lanes : u.scale_lanes)) copy4(stage + a.stage_bytes - TAIL + l.lane * 4, l.tail + (u32)at);
}

template <int BITS>
__device__ __forceinline__ void process(const Site& a, const Unit& u, const Planned& planned, const char* stage, u16 base,
                                        float row_scale, const Lane& l, const Room& room, Results& result) {
    step<BITS>((const u32*)(stage + a.stage_bytes - TAIL), base, row_scale, l, room);
    const int second = u.segments == 1 ? SEGMENTS_IN_ALL : u.segment + 1;
    auto x = [&](int s) { return room.x + (s ? second : u.segment) * SEGMENT_BYTES; };
    Sums d;
    clear(d);
#if MASKED
    u32 mask[SEGMENTS];
    u32 start[SEGMENTS];
    spread_unit<BITS>(a, u, planned.stretches, stage, l, room, mask, start);
    auto selectors_of = [&](u32 eight) { return shared_word(room.table + eight * 128); };
    Sums ones;
    clear(ones);
#pragma unroll
    for (int s = 0; s < (BITS == 16 ? 1 : SEGMENTS); s++) {
        Codes c[2], kept;
        masked_codes<BITS, BETWEEN_ROWS>(mask[s], start[s], l.g, l.t, selectors_of, c, kept);
        if constexpr (BITS == 16) add_raw(c[0], c[1], x(0), l, result);
        else {
            multiply_codes(d, c[0], x(s), l);
            multiply_codes(ones, kept, x(s), l);
        }
    }
    const auto counted = [&](int m, int n, int i) { return whole_sum(ones[m][n][i]); };
#else
    auto codes = [&](int first) { return codes_from<BITS == 16 ? 8 : BITS>([&](int row) { return staged(stage, first + row, l.g); }, l.t); };
    if constexpr (BITS == 16) add_raw(codes(0), codes(8), x(0), l, result);
    else
#pragma unroll
        for (int s = 0; s < SEGMENTS; s++) multiply_codes(d, codes(s * BITS), x(s), l);
    const Ones counted = ones_of(room.sums + u.segment * COLUMNS, room.sums + second * COLUMNS, l);
#endif
    if constexpr (BITS == 16) return;
    __syncwarp();
    add_unit(counted, room, l, d, result);
    __syncwarp();
}

// ---------------------------------------------------------------------------------------------------- clusters

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

__device__ __forceinline__ float of_block(const float* p, int rank) {
#if __CUDA_ARCH__ >= 900
    u32 there;
    float f;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(f) : "r"(there) : "memory");
    return f;
#else
    return *p;
#endif
}

__device__ __forceinline__ void group_barrier() {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + (int)threadIdx.x / (WARPS * 32)), "n"(WARPS * 32) : "memory");
}

// Add up what the warps of a group found, then the groups of the cluster: always in the same order. Each warp's results
// take the place of its ring; `stride` bytes are between two of them.
__device__ __forceinline__ void finish(const Site& a, const Lane& l, int warp, const u32* largest,
                                       const Results& result, char* rooms, int stride) {
    auto found = [&](int w, int i) -> float& { return ((float*)(rooms + w * stride))[i]; };  // (COLUMNS, 32)
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = n * 8 + 2 * l.t + i % 2;
                if (column < COLUMNS) found(warp, column * 32 + row_of(l.g, 2 * m + i / 2)) = result[m][n][i];
            }
    group_barrier();
    for (int i = warp * 32 + l.lane; i < COLUMNS * 32; i += WARPS * 32) {
        float sum = found(0, i);
#pragma unroll
        for (int w = 1; w < WARPS; w++) sum += found(w, i);
        found(0, i) = sum;  // no other thread reads this place of the first warp's
    }
    const int splits = cluster_size();
    if (splits > 1) cluster_barrier();
    else group_barrier();
    const int row = l.tile * 32 + l.lane;
    if (cluster_rank() == 0 && row < a.w.rows)
#pragma unroll 1
        for (int b = warp; b < COUNT; b += WARPS) {
            float sum = 0;
#pragma unroll 1
            for (int r = 0; r < splits; r++) {
                float weight = 1;  // of the last byte
#pragma unroll
                for (int part = PARTS - 1; part >= 0; part--, weight *= 256)
                    sum += weight * of_block(&found(0, (b * PARTS + part) * 32 + l.lane), r);
            }
            sum *= unit_of(largest[b]);
            if (a.bias) sum += to_float(__ldg((const Number*)a.bias + row));
            store(a.out, (size_t)b * a.w.rows + row, sum);
        }
    if (splits > 1) cluster_barrier();  // nobody leaves while others read
}

#define WIDTH(BITS) \
    case BITS: \
        process<BITS>(a, u, planned, stage, base, row_scale, l, room, result); \
        break;

constexpr int bytes_of(int n) { return n + 127 & ~127; }

__device__ __forceinline__ const Site& site_of(const Args& args) {
    int site = 0;
#pragma unroll
    for (int i = 1; i < SITES; i++)
        if (blockIdx.y >= args.sites[i].first_block) site = i;
    return args.sites[site];
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Args args) {
    extern __shared__ __align__(128) char shared[];
    const Site& a = site_of(args);
    const int warp = threadIdx.x / 32 % WARPS;
    const Lane l = lane_of(a);
    const int ring_bytes = STAGES * a.stage_bytes;
    Room room;
    room.largest = (u32*)(shared + TABLE_BYTES);
    room.given = (char*)room.largest + bytes_of(COUNT * 4);
    room.x = room.given + bytes_of(AT_ONCE * IN * sizeof(Number));
    room.sums = (float*)(room.x + (SEGMENTS_IN_ALL + 1) * SEGMENT_BYTES);
    const int stride = max(ring_bytes + ROOM_BYTES + a.most_units * (int)sizeof(Planned), COLUMNS * 128);
    char* rooms = (char*)room.sums + bytes_of((SEGMENTS_IN_ALL + 1) * COLUMNS * 4) + threadIdx.x / (WARPS * 32) * WARPS * stride;
    int own = rooms - shared + warp * stride;  // a number: a pointer that is kept forgets that this is shared memory
    keep(own);
    room.steps = (float2*)(shared + own);
    room.survivors = (char*)(room.steps + 32);
    room.table = address(shared) + l.lane * 4;
    room.ring = shared + own + ROOM_BYTES;
    room.ring_at = address(room.ring);
    room.units = (Planned*)(room.ring + ring_bytes);
    let_next_start();
    // What is short and waited for is loaded before the memory is busy with words.
    const int4* units = a.units + (cluster_rank() * WARPS + warp) * a.most_units;
    const int4 first_unit = __ldg(units + min(l.lane, a.most_units - 1));
    const int most = l.tile * 32 < a.w.rows ? a.most_units : 0;  // the last block may have groups without rows
    Places order[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) order[r] = places(args, (r * THREADS + (int)threadIdx.x) * 8);
    const int row = l.tile * 32 + l.lane;
    const float row_scale = CODED && row < a.w.rows ? half_to_float(__ldg(a.w.row_scales + row)) : 1.0f;
    add_zeros(room);
#if MASKED
    fill_table(shared);
#endif
    Given given;
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++)
        if (turn == args.early) {
            wait_for_last();
            load_activations(args, 0, given);
        } else {
            for (int i = l.lane; i < a.most_units; i += 32) {
                const int4 u = i < 32 ? first_unit : __ldg(units + i);
                room.units[i].unit = u;
#if MASKED
                if (most) room.units[i].stretches = stretches_of(a, unit(u), l.tile);
#endif
            }
            __syncwarp();
#pragma unroll 1
            for (int i = 0; i < STAGES; i++) {
                if (i < most) {
                    const Unit u = unit(room.units[i].unit);
                    if (u.bits) fetch(a, u, room.units[i], l, room.ring_at + i * a.stage_bytes);
                }
                commit();
            }
        }
    __syncthreads();
    for (int b = 0; b < COUNT; b += AT_ONCE) {
        if (b) {
            __syncthreads();
            load_activations(args, b, given);
        }
        place_activations(args, room, b, given);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            const int octet = r * THREADS + threadIdx.x;
            if (octet < SEGMENTS_IN_ALL * 4)
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if (b + i < COUNT) arrange(room, order[r], (const Number*)room.given + i * IN, octet, b + i);
        }
    }
    __syncthreads();
    Results result = {};
    int at = 0;  // of the ring
#pragma unroll 1
    for (int i = 0; i < most; i++) {
        const Planned planned = room.units[i];
        const Unit u = unit(planned.unit);
        if (!u.bits) break;
        const u16 base = u.bits == 16 ? 0 : scale_base(a.w, u.grid, l.tile * 32 + l.lane);
        const char* stage = room.ring + at;
        wait_for_all_but<STAGES - 1>();
        __syncwarp();
        switch (u.bits) {
            CODE_WIDTHS(WIDTH)
        }
        if (i + STAGES < most) {
            const Planned later = room.units[i + STAGES];
            const Unit u = unit(later.unit);
            if (u.bits) fetch(a, u, later, l, room.ring_at + at);
        }
        commit();
        at = at == (STAGES - 1) * a.stage_bytes ? 0 : at + a.stage_bytes;
    }
    wait_for_all_but<0>();
    __syncwarp();  // all lanes have read the last unit, whose place the results take
    finish(a, l, warp, room.largest, result, rooms, stride);
}
