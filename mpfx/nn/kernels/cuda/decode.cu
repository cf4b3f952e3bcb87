// Units of dense codes, between decode.cuh and decode_kernel.cuh.
//
// The words of a unit are copied as they lie in memory, one word row after the other, 128 bytes each; lanes unpack their codes
// from there. Lane (g, t) has rows 4g .. 4g+3: so what it reads of a word row is one piece. The zero points are taken off in
// float32.

constexpr int ROOM_BYTES = 256;  // of 32 rows: scale, and scale times zero point
constexpr int TABLE_BYTES = 0;
constexpr int EMPTY_UNITS = 0;

struct Planned {
    int4 unit;
};
static_assert(sizeof(Planned) == 16 && ROOM_BYTES == 256, "decode.py makes room for so much");

__device__ __forceinline__ int row_of(int g, int j) { return 4 * g + j; }

__device__ __forceinline__ float sum_as_read(int sum) { return sum; }

__device__ __forceinline__ void fill_table(char*) {}  // there is none

// A lane, and where it reads and copies from.
struct Reader : Lane {
    const char* codes;  // what it copies of the first word rows: 16 bytes of one, or if not ALIGNED, 4
    u32 row_bytes;      // from one word row to the next one
    int codes_to;       // where to, in a stage
    int from_row;       // 0 .. 3, or more than any unit has, if the weight has no such rows
    int zero_tile;      // 0 if it copies scales

    using Lane::Lane;
};

__device__ __forceinline__ Reader reader_of(const Site& a) {
    Reader l(a);
    const int r = l.lane;
    const int row = ALIGNED ? r / 8 : 0, piece = ALIGNED ? r % 8 : r / 4, column = l.tile * 32 + (ALIGNED ? 4 * piece : r);
    l.from_row = column < a.w.rows ? row : 1 << 20;
    l.codes = (const char*)(a.w.codes + (size_t)row * a.w.rows + column);
    l.row_bytes = 4 * a.w.rows;
    l.codes_to = row * 128 + ((piece ^ row * 2) << 4) + (ALIGNED ? 0 : r % 4 * 4);
    l.zero_tile = r < 8 ? l.tile : 0;
    keep(l.codes), keep(l.codes_to), keep(l.from_row), keep(l.tail), keep(l.zero_tile);
    return l;
}

__device__ __forceinline__ void reach(Reader&, char*, u32, const Room&) {}  // what it reads is found by way of `Room`

typedef int4 Ahead;  // a unit: each lane loads one of the first 32

__device__ __forceinline__ Ahead look_ahead(const Site& a, const int4* units, const Reader& l) {
    return __ldg(units + min(l.lane, a.most_units - 1));
}

// ---------------------------------------------------------------------------------------------------- copies

// Start to copy what a unit needs of the weight.
__device__ __forceinline__ void fetch(const Site& a, const Unit& u, const Reader& l, u32 stage) {
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
    const int at = (l.lane < 8 ? u.zero : u.grid * a.w.scale_words) + l.zero_tile * u.bits;
    if (l.lane < (l.lane < 8 ? u.zero_lanes : u.scale_lanes)) copy4(stage + a.stage_bytes - TAIL + l.lane * 4, l.tail + (u32)at);
}

// Keep at hand what units a warp has, and start to copy for the first ones.
__device__ __forceinline__ void start_units(const Site& a, const int4* units, int most, Ahead ahead, const Reader& l, const Room& room) {
    for (int i = l.lane; i < a.most_units; i += 32) room.units[i].unit = i < 32 ? ahead : __ldg(units + i);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) {
        if (i < most) {
            const Unit u = unit(room.units[i].unit);
            if (u.bits) fetch(a, u, l, room.ring_at + i * a.stage_bytes);
        }
        commit();
    }
}

// ---------------------------------------------------------------------------------------------------- products

// Words of four rows in a stage. Swizzled, as lanes with one g read four word rows at once.
__device__ __forceinline__ uint4 staged(const char* stage, int row, int g) {
    return *(const uint4*)(stage + row * 128 + ((g ^ (row & 3) * 2) << 4));
}

__device__ __forceinline__ float2* steps_of(const Room& room) { return (float2*)room.own; }

// Scale of row `lane`, and scale times zero point.
template <int BITS>
__device__ __forceinline__ void step(const u32* tail, u16 base, float row_scale, const Reader& l, const Room& room) {
    if constexpr (BITS == 16) return;
    const u32 zero = zero_from<BITS>([&](int i) { return tail[i]; }, l.lane, l.field);
    const float scale = scale_from<BITS>(base, tail[8 + l.lane / 8], l.field) * row_scale;
    steps_of(room)[l.lane] = make_float2(scale, scale * (float)zero);
}

// Sums of the activations of a unit's segments.
struct Ones {
    float of[TILES][2];
    __device__ float operator()(int, int n, int i) const { return of[n][i % 2]; }
};

__device__ __forceinline__ Ones ones_of(const float* sums, const float* more, const Reader& l) {
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

__device__ __forceinline__ void clear(Sums& d) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) d[m][n][i] = MAGIC;
}

// Add what was found for a unit; `ones` are the sums of its activations.
__device__ __forceinline__ void add_unit(const Ones& ones, const Room& room, const Reader& l, const Sums& d, Results& result) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const float2 steps[2] = {steps_of(room)[row_of(l.g, 2 * m)], steps_of(room)[row_of(l.g, 2 * m + 1)]};
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                result[m][n][i] = fmaf(steps[i / 2].x, whole_sum(d[m][n][i]), fmaf(-steps[i / 2].y, ones(m, n, i), result[m][n][i]));
    }
}

template <int BITS>
__device__ __forceinline__ void process(const Site& a, const Unit& u, const char* stage, u16 base, float row_scale, const Reader& l,
                                        const Room& room, Results& result) {
    step<BITS>((const u32*)(stage + a.stage_bytes - TAIL), base, row_scale, l, room);
    const int second = u.segments == 1 ? SEGMENTS_IN_ALL : u.segment + 1;
    auto x = [&](int s) { return room.x + (s ? second : u.segment) * SEGMENT_BYTES; };
    Sums d;
    clear(d);
    auto codes = [&](int first) { return codes_from<BITS == 16 ? 8 : BITS>([&](int row) { return staged(stage, first + row, l.g); }, l.t); };
    if constexpr (BITS == 16) add_raw(codes(0), codes(8), x(0), l, result);
    else
#pragma unroll
        for (int s = 0; s < SEGMENTS; s++)
            multiply_codes(d, codes(s * BITS), [&](int n) {
                uint2 b = make_uint2(0, 0);
                if (n * 8 + l.g < COLUMNS) b = *(const uint2*)(x(s) + (n * 8 + l.g) * 32 + l.t * 8);
                return b;
            });
    const Ones ones = ones_of(room.sums + u.segment * COLUMNS, room.sums + second * COLUMNS, l);
    if constexpr (BITS == 16) return;
    __syncwarp();
    add_unit(ones, room, l, d, result);
    __syncwarp();
}

#define WIDTH(BITS) \
    case BITS: \
        process<BITS>(a, u, stage, base, row_scale, l, room, result); \
        break;

__device__ __forceinline__ void multiply_units(const Site& a, float row_scale, int most, const Reader& l, const Room& room, Results& result) {
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
            if (u.bits) fetch(a, u, l, room.ring_at + at);
        }
        commit();
        at = at == (STAGES - 1) * a.stage_bytes ? 0 : at + a.stage_bytes;
    }
}
