// Units of survivors under a bitmask, between decode.cuh and decode_kernel.cuh; masked.cuh is before these.
//
// The words that hold the survivors of a unit's rows are copied as they lie in memory. They become bytes in shared memory, one
// after the other, unless they have four bits; a lane picks its own from there, by a table of what eight bits of a mask select.
// What is pruned gets the zero point, which counts nothing once it is taken off, in integers. Time goes by with instructions, and
// with accesses to shared memory: so all that can be known of a unit is found before the first one, and addresses are numbers
// that stay in registers.

static_assert(SEGMENTS == 2, "masks and survivors of a unit go in pairs");
constexpr int ROWS_BYTES = 512;  // of 32 rows, 16 bytes of each
constexpr int ROOM_BYTES = 2 * ROWS_BYTES + 2 * SURVIVOR_BYTES;
constexpr int TABLE_BYTES = 32 << 10;  // `selectors` of any eight bits, once for each lane: so no two want the same bank
constexpr int EMPTY_UNITS = STAGES;  // what is fetched ahead is not asked whether it is one
constexpr int BETWEEN_ROWS = 8;  // rows g, g + 8, ... are those of lane (g, t): so lanes read what lies close together

// Of a unit: that the survivors of a segment end where 31 blocks do not reach, so that a lane may look behind 32; that it ends
// with the last segment; that it has just one.
constexpr u32 MORE = 1 << 8, LAST_ONE = 1 << 9, SINGLE = 1 << 10;
constexpr int GRID_SHIFT = 11;
constexpr u32 GRID_BITS = 15 << GRID_SHIFT;  // its bits, unless it has no grid

struct Planned {
    u32 first, words, other_first, other_words;  // of its segments: survivors, in 16 bytes from where those are aligned; where
                                                 // they are to be in a stage, and from bit 16 on, how many 16 bytes they take
    u32 start, other_start;                      // of its segments: the first survivor: its byte in shared memory, or if of
                                                 // four bits, its place among such codes of a stage
    u32 zeros, scales;                           // first word of its zero points, of its scales
    u32 sums, other_sums;                        // of its segments: sums of activations; eight times that far are these
    u32 mask;                                    // first word of the mask
    u32 kind;                                    // bits, 0: there is no such unit; MORE, LAST_ONE, SINGLE; GRID_BITS; from bit
                                                 // 16 on, the grid
};
static_assert(sizeof(Planned) == 48 && ROOM_BYTES == 3168, "decode.py makes room for so much");

__device__ __forceinline__ int row_of(int g, int j) { return g + j * BETWEEN_ROWS; }

__device__ __forceinline__ float sum_as_read(int sum) { return __int_as_float(sum); }

// Selectors of any eight bits, for every lane.
__device__ __forceinline__ void fill_table(char* table) {
    for (int i = threadIdx.x; i < 256 * 8; i += THREADS) {
        const u32 select = selectors(i / 8);
        ((uint4*)table)[i] = make_uint4(select, select, select, select);
    }
}

// A lane, and where it reads and copies from.
struct Reader : Lane {
    const u32* mask;                 // of row `lane`, or of the last row of the weight: nobody looks at further ones
    const u16* bases;                // what `scale_base` of this row counts from
    const uint4* pieces;             // its piece of the codes, counted from where 16 bytes are aligned
    u32 piece_limit, tail_limit;     // what `words` and GRID_BITS of `kind` have to exceed for it to copy something
    Part part;                       // of a row's mask
    u32 room, rows, table, x, sums;  // in shared memory: what a lane has of its warp's rows, what it reads of these and
                                     // of the table, of activations, of their sums

    using Lane::Lane;
};

__device__ __forceinline__ Reader reader_of(const Site& a) {
    Reader l(a);
    const int r = l.lane, row = min(l.tile * 32 + r, a.w.rows - 1);
    l.mask = a.w.mask + row;
    l.bases = CODED ? a.w.group_scales : a.w.scales + (size_t)row * a.w.grids;
    l.pieces = (const uint4*)((size_t)a.w.codes & ~(size_t)15) + r;
    l.part = part_of(l.t);
    l.piece_limit = r << 16 | 0xFFFF, l.tail_limit = (r < 8 && ZEROS ? r : r >= 8 && r < 12 && CODED ? 0 : 15) << GRID_SHIFT;
    keep(l.mask), keep(l.bases), keep(l.pieces), keep(l.piece_limit), keep(l.tail_limit);
    keep(l.part.lower), keep(l.part.octet), keep(l.tail), keep(l.field.four);
    return l;
}

// `own` is the address of what its warp has.
__device__ __forceinline__ void reach(Reader& l, char* table, u32 own, const Room& room) {
    l.room = own + l.lane * 16, l.rows = own + l.g * 16;
    l.table = address(table) + l.lane * 4, l.x = address(room.x) + (TILES > 1 ? l.g : min(l.g, COLUMNS - 1)) * 32 + l.t * 8;
    l.sums = address(room.sums) + l.t * 8;
    keep(l.room), keep(l.rows), keep(l.table), keep(l.x), keep(l.sums);
}

// ---------------------------------------------------------------------------------------------------- plans

// Where the survivors of a segment are.
struct Stretch {
    u32 first, pieces;  // pieces of 16 bytes, counted from where the codes start, or just before
    u32 skip;           // bytes of the first piece, before the first block
    u32 start;          // survivors of that block that come before
    bool more;          // whether they end where 31 blocks do not reach
};

__device__ __forceinline__ Stretch stretch_of(const Site& a, const Unit& u, int tile, int segment) {
    const uint2 range = survivors_of(a.w, tile, segment);
    const int blocks = blocks_of(range), offset = (size_t)a.w.codes & 15;
    const size_t first = offset + 4 * (u.word + (size_t)(range.x / 32) * u.bits);
    const u32 skip = first & 15, pieces = blocks ? (skip + blocks * u.bits * 4 + 15) / 16 : 0;
    return Stretch{(u32)(first / 16), pieces, skip, range.x % 32, blocks > 31};
}

__device__ __forceinline__ Planned plan(const Site& a, const Unit& u, const Reader& l) {
    Planned p = {};
    const bool single = u.segments == 1;
    const int second = u.segment + 1, part = (a.stage_bytes - TAIL) / SEGMENTS;
    const u32 survivors = l.room - l.lane * 16 + 2 * ROWS_BYTES;
    const Stretch one = stretch_of(a, u, l.tile, u.segment), other = single ? Stretch{} : stretch_of(a, u, l.tile, second);
    p.first = one.first, p.words = (TAIL + one.skip) | one.pieces << 16;
    p.other_first = other.first, p.other_words = (TAIL + part + other.skip) | other.pieces << 16;
    p.start = one.start + (u.bits == 4 ? 2 * (TAIL + one.skip) : survivors);
    p.other_start = other.start + (u.bits == 4 ? 2 * (TAIL + part + other.skip) : survivors + SURVIVOR_BYTES);
    p.zeros = u.zero + l.tile * u.bits, p.scales = u.grid * a.w.scale_words;
    p.sums = u.segment * COLUMNS * 4, p.other_sums = (single ? SEGMENTS_IN_ALL : second) * COLUMNS * 4;
    p.mask = (u32)u.segment * (u32)a.w.rows;
    p.kind = u.bits | (one.more || other.more ? MORE : 0) | (u.segment + u.segments == SEGMENTS_IN_ALL ? LAST_ONE : 0) |
             (single ? SINGLE : 0) | (u.bits < 16 ? u.bits << GRID_SHIFT : 0) | (u32)u.grid << 16;
    return p;
}

// No unit.
__device__ __forceinline__ Planned nothing() {
    Planned p = {};
    p.kind = SINGLE;  // so nobody looks for the mask of a second segment
    return p;
}

// Parts of a unit's `Planned`, at its address.
__device__ __forceinline__ uint4 words_of(u32 planned) { return shared_four(planned); }
__device__ __forceinline__ uint2 starts_of(u32 planned) { return shared_two(planned + 16); }
__device__ __forceinline__ uint2 tail_of(u32 planned) { return shared_two(planned + 24); }
__device__ __forceinline__ uint2 sums_of(u32 planned) { return shared_two(planned + 32); }
__device__ __forceinline__ uint2 mask_and_kind_of(u32 planned) { return shared_two(planned + 40); }
__device__ __forceinline__ u32 kind_of(u32 planned) { return shared_word(planned + 44); }

// ---------------------------------------------------------------------------------------------------- copies

// Copies without a branch.
__device__ __forceinline__ void copy16_if(bool wanted, u32 to, const void* from) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global.L2::128B [%0], [%1], 16;}" ::"r"(to),
                 "l"(from), "r"((u32)wanted));
}
__device__ __forceinline__ void copy4_if(bool wanted, u32 to, const void* from) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], 4;}" ::"r"(to), "l"(from),
                 "r"((u32)wanted));
}

// Start to copy what a unit needs of the weight.
__device__ __forceinline__ void fetch(const Site& a, u32 planned, const Reader& l, u32 stage) {
    const uint4 words = words_of(planned);
    const uint2 tail = tail_of(planned);
    const u32 to = stage + l.lane * 16 + TAIL, other_to = to + (u32)(a.stage_bytes - TAIL) / SEGMENTS;
    const uint4 *from = l.pieces + words.x, *other_from = l.pieces + words.z;
    copy16_if(words.y > l.piece_limit, to, from);
    copy16_if(words.w > l.piece_limit, other_to, other_from);
    if ((words.y | words.w) >> 21) {  // more than lanes
#pragma unroll 1
        for (int i = 32; i < (int)(words.y >> 16) - l.lane; i += 32) copy16(to + i * 16, from + i);
#pragma unroll 1
        for (int i = 32; i < (int)(words.w >> 16) - l.lane; i += 32) copy16(other_to + i * 16, other_from + i);
    }
    copy4_if((kind_of(planned) & GRID_BITS) > l.tail_limit, stage + l.lane * 4, l.tail + (l.lane < 8 ? tail.x : tail.y));
}

struct Ahead {};  // nothing: units are loaded as they are planned

__device__ __forceinline__ Ahead look_ahead(const Site&, const int4*, const Reader&) { return {}; }

// Find all that is known of a warp's units, and start to copy for the first ones; behind the last one there is none, as often
// as one is looked at.
__device__ __forceinline__ void start_units(const Site& a, const int4* units, int most, Ahead, const Reader& l, const Room& room) {
    for (int i = l.lane; i < a.most_units + EMPTY_UNITS; i += 32) {
        Unit u = {};
        if (i < most) u = unit(__ldg(units + i));
        room.units[i] = u.bits ? plan(a, u, l) : nothing();
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) {
        fetch(a, address(room.units + i), l, room.ring_at + i * a.stage_bytes);
        commit();
    }
}

// ---------------------------------------------------------------------------------------------------- products

// What of a unit is in registers: loaded as soon as they are free, while the one before it is multiplied.
struct Loaded {
    u32 mask, other_mask;  // of row `lane`
    u32 kind;
    u16 base;              // of its scale
};

// Behind the last unit, and for the second segment of one that has none: something, as nobody looks at it.
__device__ __forceinline__ void load(const Site& a, u32 planned, const Reader& l, Loaded& loaded) {
    const uint2 v = mask_and_kind_of(planned);
    const u32* mask = l.mask + v.x;
    loaded.kind = v.y;
    loaded.mask = __ldg(mask);
    loaded.other_mask = __ldg(mask + (v.y & SINGLE ? 0 : a.w.rows));
    if (v.y & GRID_BITS) loaded.base = __ldg(l.bases + (v.y >> 16));
}

// The survivors of a unit as bytes, sixteen of each lane; of blocks that there are not, too: of these only signs are looked at, by
// what is pruned behind the last survivor, and `eight_of` leaves none.
template <int BITS>
__device__ __forceinline__ void spread_unit(u32 planned, u32 kind, u32 stage, const Reader& l) {
    const uint4 words = words_of(planned);
    const u32 from = stage + (words.y & 0xFFFF), other_from = stage + (words.w & 0xFFFF);
    const u32 to = l.room - l.lane * 16 + 2 * ROWS_BYTES;
    auto all = [&](int i) {
        int own = l.lane + i;
        keep(own);  // else what depends on it alone is found for all widths, whatever a unit has
        spread<BITS>([&](int k) { return shared_word(from + k * 4); }, own, to);
        if (BITS < 16) spread<BITS>([&](int k) { return shared_word(other_from + k * 4); }, own, to + SURVIVOR_BYTES);
    };
    all(0);
    all(32);
    if (kind & MORE) {
        __syncwarp();  // so this is a branch, and not what all units go through
        if (l.lane < 2) all(64);
    }
}

// For every row of a unit its masks, and where its survivors start; and its scale, its zero point as four bytes and as a number.
template <int BITS>
__device__ __forceinline__ void share_rows(u32 kind, uint2 starts, u32 stage, float row_scale, const Loaded& loaded, const Reader& l) {
    u32 zero = 0;
    if constexpr (BITS < 16) {
        zero = zero_from<BITS>([&](int i) { return shared_word(stage + i * 4); }, l.lane, l.field);
        const u32 word = CODED ? shared_word(stage + 32 + l.lane / 8 * 4) : 0;
        const u32 scale = __float_as_uint(scale_from<BITS>(loaded.base, word, l.field) * row_scale);
        share(l.room + ROWS_BYTES, make_uint4(scale, zero * 0x01010101, zero, 0));
    }
    const u32 more = BITS == 4 ? 2 * stage : 0;  // such codes stay where they are
    u32 mask = loaded.mask, other = loaded.other_mask;
    if (LAST != ~0u && (kind & LAST_ONE)) (kind & SINGLE ? mask : other) &= LAST;
    const u32 sum = before(__popc(mask) + (__popc(other) << 16));
    const u32 start = starts.x + more + (sum & 0xFFFF), other_start = starts.y + more + (sum >> 16);
    share(l.room, make_uint4(mask, other, start, other_start));
}

// Of a lane's rows.
struct Steps {
    float scales[4];
    int zeros[4];
};

// Add the codes of two segments times their activations; where the sums of these start is given. What the zero points count is
// taken off first: so sums are exact, and nothing is left of what is pruned.
__device__ __forceinline__ void add_codes(const Codes (&c)[SEGMENTS], const Steps& steps, uint2 at, const Reader& l, Results& result) {
    Sums d;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            auto sum_of = [&](u32 at) { return (int)shared_word(l.sums + at + n * 32 + i * 4); };
            const int sum = sum_of(at.x) + sum_of(at.y);
#pragma unroll
            for (int j = 0; j < 4; j++) d[j / 2][n][j % 2 * 2 + i] = MAGIC - steps.zeros[j] * sum;
        }
    // Columns that there are not, too: nobody looks at what they add up to.
    multiply_codes(d, c[0], [&](int n) { return shared_two(l.x + at.x * 8 + n * 256); });
    multiply_codes(d, c[1], [&](int n) { return shared_two(l.x + at.y * 8 + n * 256); });
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& sum = result[j / 2][n][j % 2 * 2 + i];
                sum = fmaf(steps.scales[j], whole_sum(d[j / 2][n][j % 2 * 2 + i]), sum);
            }
    }
}

template <int BITS>
__device__ __forceinline__ void process(const Site& a, u32 planned, Loaded& loaded, u32 stage, float row_scale, const Reader& l,
                                        const Room& room, Results& result) {
    constexpr bool RAW = BITS == 16, AS_PACKED = BITS == 4;
    const u32 kind = loaded.kind;
    share_rows<BITS>(kind, starts_of(planned), stage, row_scale, loaded, l);
    load(a, planned + (u32)sizeof(Planned), l, loaded);
    if (!AS_PACKED) spread_unit<BITS>(planned, kind, stage, l);
    __syncwarp();
    const auto selectors_of = [&](u32 eight) { return shared_word(l.table + eight * 128); };
    Codes c[SEGMENTS];  // RAW: of one segment, low and high bytes
    Steps steps;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const u32 own = l.rows + j * BETWEEN_ROWS * 16;
        const uint4 row = shared_four(own), step = RAW ? uint4{} : shared_four(own + ROWS_BYTES);
        steps.scales[j] = __uint_as_float(step.x);
        steps.zeros[j] = ZEROS ? step.z : 1 << (BITS - 1);
        const u32 fill = RAW ? 0 : ZEROS ? step.y : steps.zeros[j] * 0x01010101u;
        place<BITS, AS_PACKED>(c, j, row.x, row.z, fill, l.part, selectors_of);
        if (!RAW) place<BITS, AS_PACKED>(c + 1, j, row.y, row.w, fill, l.part, selectors_of);
    }
    const uint2 sums = sums_of(planned);
    if constexpr (RAW) add_raw(c[0], c[1], room.x + sums.x * 8, l, result);
    else add_codes(c, steps, sums, l, result);
    __syncwarp();
}

// Where a warp is among its units.
struct Turn {
    u32 planned, stage;
    Loaded loaded;
};

// Units of one width that follow each other.
template <int BITS>
__device__ __forceinline__ void multiply_run(const Site& a, Turn& now, float row_scale, const Reader& l, const Room& room, Results& result) {
    do {
        wait_for_all_but<STAGES - 1>();
        __syncwarp();
        process<BITS>(a, now.planned, now.loaded, now.stage, row_scale, l, room, result);
        fetch(a, now.planned + STAGES * (u32)sizeof(Planned), l, now.stage);
        commit();
        now.planned += (u32)sizeof(Planned);
        now.stage += a.stage_bytes;
        if (now.stage == room.ring_at + STAGES * a.stage_bytes) now.stage = room.ring_at;
    } while ((now.loaded.kind & 255) == BITS);
}

#define WIDTH(BITS) \
    case BITS: \
        multiply_run<BITS>(a, now, row_scale, l, room, result); \
        break;

__device__ __forceinline__ void multiply_units(const Site& a, float row_scale, int, const Reader& l, const Room& room, Results& result) {
    Turn now = {address(room.units), room.ring_at};
    load(a, now.planned, l, now.loaded);
#pragma unroll 1
    while (const int bits = now.loaded.kind & 255) switch (bits) {
            CODE_WIDTHS(WIDTH)
        }
}
