// Many rows of activations times a packed weight, on the tensor cores of a Hopper GPU: the weight is unpacked in registers,
// never in memory.
//
// `arrange` puts the activations in the order of the channels, rounded up to whole tiles of TOKENS rows times STEP channels,
// each as `wgmma` reads it: 128 bytes a row, the eight pieces of 16 bytes of row r in the order of `piece ^ r % 8`.
//
// `tile`: a tile of results is 128 rows of the weight times TOKENS rows of activations, and a share of it all its channels, or
// some of them, if there are fewer tiles left than processors. There is a block for every processor; it works on share after
// share, and copies ahead across their bounds: two warps fill a ring of shared memory with what each step needs: a tile of
// activations, words, zero points, scales; two others find out the grid of every row, and one of these copies the activations that
// the ring takes at once, when `arrange` has ended, which what is copied of weights does not wait for; two groups of four warps
// multiply. Of a tile that is shared out, each share leaves in memory what it found, and whoever comes last adds up: nobody waits
// for a block that may not have been started yet. Two blocks of a cluster have been started, so if a tile's two shares are the
// last ones of both, they send each other half of what they found.
//
// Warp w of a group has the 32 rows 32w ... of a tile, of which each of its lanes (g, t) unpacks, as packed.cuh says, channels
// 8t .. 8t+7 of two rows: 16m + 2g and 16m + 2g + 1, in group m. So the left operand of `wgmma`, from registers, has rows of the
// weight in an order of their own, and so have the channels: of which `arrange` knows. As measured, a warp that has started products
// from registers goes on only when they have nearly come to their end (that their operands have been read by then is not promised:
// `have_been_read`), so it is the other group's that hide how it unpacks. At 512 rows of activations time goes by
// - with instructions that have to be fetched: both segments of a step are unpacked at once, widths that no weight has are not
//   compiled, those that are frequent are asked for first, and what is done once is written in few instructions. (Sums of shares
//   spelled out, 18 KB more, took 5 to 10 us longer, of 80.)
// - with shared memory, which is busy for some 920 of the 1024 cycles that the products of a step take.
// Of no use there: operands of the weight in shared memory, written by these or by other warps; a ring of its own for words;
// activations that are sent to two blocks at once; groups that take turns; the first words in the L2 before they are asked for.
//
// Set by whoever compiles, besides what packed.cuh needs (but not how many channels there are): ORDER as in decode.cuh; TOKENS,
// a multiple of 16 up to 256, and EIGHTS, how many times eight registers of each thread hold the results; STAGES of the ring;
// WORD_ROWS of a stage, twice as many as a segment has at most; PAIRS, whether blocks are in clusters of two.

constexpr int STEP = 64;  // channels: two segments
constexpr int X_BYTES = TOKENS * 128;
constexpr int MOST_BITS = WORD_ROWS / 2;  // of a segment: code for more is left out, which makes the rest faster to fetch
constexpr bool FLOATS = DTYPE == 0 && MOST_BITS >= 8;  // whether there may be codes that do not fit into halves of registers
constexpr int ROW_BYTES = 544;  // of 128 words, and some more: eight rows of four word rows are in 32 banks
constexpr int TAIL_WORDS = 2 * (32 + 16);  // of every segment: zero points of 128 rows, scales
constexpr int TAIL_AT = X_BYTES + WORD_ROWS * ROW_BYTES, GRIDS_AT = TAIL_AT + TAIL_WORDS * 4;
constexpr int STAGE_BYTES = (GRIDS_AT + 2 * 128 * 8 + 1023) / 1024 * 1024;
constexpr int MULTIPLIERS = 256;  // threads that multiply
constexpr int COPIERS = 2;        // warps that copy, every other step each
constexpr int PREPARERS = 2;      // warps that find out the grids of what was copied, every other step each
constexpr int THREADS = MULTIPLIERS + 32 * (COPIERS + PREPARERS);
// Registers: 168 a thread, of which those that do not multiply leave some to those that do: 168 * 384 = 72 * 128 + 216 * 256.
constexpr int ARRANGERS = 512;    // threads of a block of `arrange`
constexpr int PIECES = TOKENS / 8;  // four results of a thread each
constexpr int MOST_PARTS = 3;
constexpr int OF_STAGE = (PIECES / 2 + 1) / 2;  // pieces that blocks of a cluster send each other, in either of two stages

// Tiles that are shared out alike: numbers of the first one's rows, of its first share, and of it among those that are shared
// out at all; how many tiles of rows, and into how many shares.
struct Part {
    int tile, share, slot, tiles, splits;
    int steps;                // of a share: the last one has what is left
    u32 by_tiles, by_splits;  // what `divided` needs
};

struct Args {
    const void* x;      // (tokens, channels)
    const void* order;
    void* arranged;     // (tiles of activations, steps, X_BYTES)
    Weight w;
    const int4* units;  // (2 steps,): bits, first word row, grid, zero points of every segment; beyond the last one, zeros
    const void* bias;
    void* out;          // (tokens, rows)
    float4* found;      // (slots, most_splits, PIECES, MULTIPLIERS): what the shares of a tile found
    u32* arrived;       // (slots,): how many of them have
    int tokens, channels;
    int steps;          // of all channels
    int columns;        // tiles of rows of activations
    int shares, slots, most_splits;
    Part parts[MOST_PARTS];  // the first share of those that are not there is beyond the last one
};

// ---------------------------------------------------------------------------------------------------- activations

// What another kernel may have written while this one was already running, but before it waited.
__device__ __forceinline__ u32 load_one(const u16* from) {
    u16 v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(from));
    return v;
}
__device__ __forceinline__ u32 load_one(const u32* from) {
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}
__device__ __forceinline__ uint4 load_four(const void* from) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// The first of two channels that piece i of a row has for lanes t of a warp.
__device__ __forceinline__ int channel_of(int i, int t) { return i / 8 * STEP + i % 8 / 4 * 32 + i / 2 % 2 * 4 + i % 2 * 2 + 8 * t; }

// Where two adjacent channels, the first one even, are in the input: entries of two bytes are not taken apart yet.
struct Entries {
    u32 first, second;
};

__device__ __forceinline__ Entries load_entries(const Args& a, int channel) {
    const int second = min(channel + 1, a.channels - 1);
    if (ORDER == 0 || channel >= a.channels) return Entries{(u32)channel, (u32)channel + 1};
    if (ORDER == 4) return Entries{load_one((const u32*)a.order + channel), load_one((const u32*)a.order + second)};
    if (channel == second) return Entries{load_one((const u16*)a.order + channel), 0};
    return Entries{load_one((const u32*)((const u16*)a.order + channel)), 0};
}

__device__ __forceinline__ u32 first_of(const Entries& e) { return ORDER == 2 ? e.first & 0xFFFF : e.first; }
__device__ __forceinline__ u32 second_of(const Entries& e) { return ORDER == 2 ? e.first >> 16 : e.second; }

// Where a channel of both rows is: they are side by side, and pieces of 16 bytes change places so that eight threads, each of
// which has eight channels, write to all banks at once.
__device__ __forceinline__ u32 place_of(int channel) { return channel * 4 ^ channel / 32 % 2 << 4; }

// Write eight channels of two rows side by side.
__device__ __forceinline__ void put_side_by_side(char* to, int channel, const uint4& one, const uint4& other) {
    const u32 place = place_of(channel);
    *(uint4*)(to + place) = make_uint4(__byte_perm(one.x, other.x, 0x5410), __byte_perm(one.x, other.x, 0x7632),
                                       __byte_perm(one.y, other.y, 0x5410), __byte_perm(one.y, other.y, 0x7632));
    *(uint4*)(to + (place ^ 16)) = make_uint4(__byte_perm(one.z, other.z, 0x5410), __byte_perm(one.z, other.z, 0x7632),
                                              __byte_perm(one.w, other.w, 0x5410), __byte_perm(one.w, other.w, 0x7632));
}

// Have the L2 cache read what is in memory, as far as it comes in whole pieces of 16 bytes.
__device__ __forceinline__ void bring(const void* from, const void* to) {
    const size_t first = (size_t)from & ~(size_t)15;
    const u32 bytes = (u32)((size_t)to - first) & ~15u;
    if (to > from && bytes) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "r"(bytes) : "memory");
}

// What blocks of `tile` read first.
__device__ __forceinline__ void bring_tables(const Args& a) {
    bring(a.units, a.units + 2 * a.steps);
    bring(a.w.group_scales, a.w.group_scales + a.w.grids);
    bring(a.w.row_scales, a.w.row_scales + a.w.rows);
}

// A block has two rows of activations: what is not there is zero. A thread has AHEAD pieces of a row, all of which are on their way
// at once, and as many more as it takes.
template <int AHEAD>
__device__ __forceinline__ void arrange_rows(const Args& a) {
    extern __shared__ __align__(128) char shared[];  // of every channel, both rows
    wait_for_last();  // before the next one may start, which reads weights at once: whoever has written them is done
    let_next_start();
    if (blockIdx.x == 0 && threadIdx.x == 0) bring_tables(a);
    const int token = 2 * blockIdx.x, row = token % TOKENS, steps = a.steps;
    Entries entries[AHEAD][4];
    auto load_order = [&](int i) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
#pragma unroll
            for (int t = 0; t < 4; t++) entries[j][t] = load_entries(a, channel_of(i + j * ARRANGERS, t));
    };
    load_order(threadIdx.x);
    const Number* rows[2];
    u32 there[2];  // all bits, or none
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows[r] = (const Number*)a.x + (size_t)min(token + r, a.tokens - 1) * a.channels;
        there[r] = token + r < a.tokens ? ~0u : 0;
    }
    if (token == 0)
        for (int i = threadIdx.x; i < a.slots; i += ARRANGERS) a.arrived[i] = 0;
    if (a.channels % 8 == 0) {
        const int pieces = a.channels / 8;
#pragma unroll 1
        for (int first = threadIdx.x; first < pieces; first += AHEAD * ARRANGERS) {
            uint4 given[AHEAD][2];
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    if (first + j * ARRANGERS < pieces) given[j][r] = load_four(rows[r] + 8 * (first + j * ARRANGERS));
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (first + j * ARRANGERS < pieces) put_side_by_side(shared, 8 * (first + j * ARRANGERS), given[j][0], given[j][1]);
        }
    } else
        for (int i = threadIdx.x; i < a.channels; i += ARRANGERS)
            *(u32*)(shared + place_of(i)) = load_one(rows[0] + i) | load_one(rows[1] + i) << 16;
    __syncthreads();
    char* to = (char*)a.arranged + (size_t)(token / TOKENS) * steps * X_BYTES + row * 128;
#pragma unroll 1
    for (int first = threadIdx.x; first < steps * 8; first += AHEAD * ARRANGERS) {
        if (first != threadIdx.x) load_order(first);
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const int i = first + j * ARRANGERS;
            if (i >= steps * 8) break;
            u32 pair[2][4];
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const int c = channel_of(i, t);
                const u32 one = c < a.channels ? *(const u32*)(shared + place_of(first_of(entries[j][t]))) : 0;
                const u32 other = c + 1 < a.channels ? *(const u32*)(shared + place_of(second_of(entries[j][t]))) : 0;
                pair[0][t] = __byte_perm(one, other, 0x5410) & there[0], pair[1][t] = __byte_perm(one, other, 0x7632) & there[1];
            }
#pragma unroll
            for (int r = 0; r < 2; r++)
                *(uint4*)(to + (size_t)(i / 8) * X_BYTES + r * 128 + ((i % 8 ^ (row + r) % 8) << 4)) =
                    make_uint4(pair[r][0], pair[r][1], pair[r][2], pair[r][3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(ARRANGERS, 2) arrange_1(const __grid_constant__ Args a) { arrange_rows<1>(a); }
extern "C" __global__ void __launch_bounds__(ARRANGERS, 2) arrange_3(const __grid_constant__ Args a) { arrange_rows<3>(a); }

// ---------------------------------------------------------------------------------------------------- barriers, copies

__device__ __forceinline__ void init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_with(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// What other blocks have sent is in shared memory then, too: to acquire it from all of the cluster would only empty the L1 as well.
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void arrive_when_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---------------------------------------------------------------------------------------------------- products

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define EIGHT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

#define NAMES1 "%5,%6,%7,%8,%9,%10,%11,%12"
#define NAMES2 NAMES1 ",%13,%14,%15,%16,%17,%18,%19,%20"
#define NAMES3 NAMES2 ",%21,%22,%23,%24,%25,%26,%27,%28"
#define NAMES4 NAMES3 ",%29,%30,%31,%32,%33,%34,%35,%36"
#define NAMES5 NAMES4 ",%37,%38,%39,%40,%41,%42,%43,%44"
#define NAMES6 NAMES5 ",%45,%46,%47,%48,%49,%50,%51,%52"
#define NAMES7 NAMES6 ",%53,%54,%55,%56,%57,%58,%59,%60"
#define NAMES8 NAMES7 ",%61,%62,%63,%64,%65,%66,%67,%68"
#define NAMES9 NAMES8 ",%69,%70,%71,%72,%73,%74,%75,%76"
#define NAMES10 NAMES9 ",%77,%78,%79,%80,%81,%82,%83,%84"
#define NAMES11 NAMES10 ",%85,%86,%87,%88,%89,%90,%91,%92"
#define NAMES12 NAMES11 ",%93,%94,%95,%96,%97,%98,%99,%100"
#define NAMES13 NAMES12 ",%101,%102,%103,%104,%105,%106,%107,%108"
#define NAMES14 NAMES13 ",%109,%110,%111,%112,%113,%114,%115,%116"
#define NAMES15 NAMES14 ",%117,%118,%119,%120,%121,%122,%123,%124"
#define NAMES16 NAMES15 ",%125,%126,%127,%128,%129,%130,%131,%132"

#define PLACES1 EIGHT(0)
#define PLACES2 PLACES1, EIGHT(8)
#define PLACES3 PLACES2, EIGHT(16)
#define PLACES4 PLACES3, EIGHT(24)
#define PLACES5 PLACES4, EIGHT(32)
#define PLACES6 PLACES5, EIGHT(40)
#define PLACES7 PLACES6, EIGHT(48)
#define PLACES8 PLACES7, EIGHT(56)
#define PLACES9 PLACES8, EIGHT(64)
#define PLACES10 PLACES9, EIGHT(72)
#define PLACES11 PLACES10, EIGHT(80)
#define PLACES12 PLACES11, EIGHT(88)
#define PLACES13 PLACES12, EIGHT(96)
#define PLACES14 PLACES13, EIGHT(104)
#define PLACES15 PLACES14, EIGHT(112)
#define PLACES16 PLACES15, EIGHT(120)

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#if DTYPE == 0
#define KINDS "f32.bf16.bf16"
#else
#define KINDS "f32.f16.f16"
#endif

// 64 rows of the weight times TOKENS rows of activations, 16 channels: `x` says where these are, in units of 16 bytes, and that
// they are swizzled in 128 bytes, and have 1024 bytes from eight rows to the next ones.
__device__ __forceinline__ void multiply(float (&d)[TOKENS / 2], u32 (&a)[4], u32 x) {
    asm volatile("{\n.reg .b64 tile;\nmov.b64 tile, {%4, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) "k16." KINDS " {" JOIN(NAMES, EIGHTS) "}, {%0,%1,%2,%3}, tile, 1, 1, 1, 0;\n}"
                 : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]), "+r"(x), JOIN(PLACES, EIGHTS));
}

__device__ __forceinline__ void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void after_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LATER>
__device__ __forceinline__ void wait_for_all_but() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
}

// A tile of activations as `multiply` is told of it.
__device__ __forceinline__ u32 tile_at(u32 at) { return at >> 4 | 1 << 16; }

// ---------------------------------------------------------------------------------------------------- weights

typedef u32 Operand[2][4];  // the left one: a segment, 16 channels each

// Where a lane finds its two rows, and its channels, in word rows of planes of so many bits: bytes from where the planes start,
// and by how much to turn a word so that codes of its first channels come first.
struct Lane {
    int t;
    int row;   // the first one, of the 128 of the block
    int grid;  // where those of its rows are, as find_grids writes them
    int ones, twos, fours, eights;
    int one_turn, two_turn;

    __device__ explicit Lane(int thread) {
        t = thread % 4, row = thread / 32 % 4 * 32 + thread / 128 * 16 + thread % 32 / 4 * 2;
        grid = thread / 4 % 2 * 32 + row / 4;
        ones = row * 4, twos = ones + t / 2 * ROW_BYTES, fours = ones + t * ROW_BYTES, eights = ones + 2 * t * ROW_BYTES;
        one_turn = -2 * t, two_turn = -4 * (t % 2);
        // They stay in registers: whoever compiles would rather find them out anew for every segment.
        asm volatile("" : "+r"(row), "+r"(grid), "+r"(ones), "+r"(twos), "+r"(fours), "+r"(eights), "+r"(one_turn), "+r"(two_turn));
    }
};

template <int P>
__device__ __forceinline__ void add_plane(u32 (&c)[2][2], uint2 word, int turn, int low) {
    constexpr u32 field = ((1u << P) - 1) * 0x01010101u;
    const u32 w[2] = {word.x, word.y};
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) c[i][j] |= __funnelshift_l(w[j], w[j], turn + low - P * i) & (field << low);
}

// Codes as halves of registers: their values are what is added to this. Of 8 bits only float16 has the room.
constexpr u32 MAGIC = DTYPE == 0 ? 0x43004300 : 0x64006400;
template <int BITS>
constexpr bool IN_HALVES = BITS < 8 || (BITS == 8 && DTYPE == 1);

// float16 has few small numbers, so its weights are that much larger until they have been multiplied; but not if some of
// them are stored as float16, which may be as large as that gets.
constexpr float LARGER = DTYPE == 1 && MOST_BITS < 16 ? 64.0f : 1.0f;

__device__ __forceinline__ u32 dequantized(u32 codes, u32 zeros, u32 steps) {
    u32 v;
    if (DTYPE == 0) asm("{.reg .b32 d;\nsub.rn.bf16x2 d, %1, %2;\nmul.rn.bf16x2 %0, d, %3;}" : "=r"(v) : "r"(codes), "r"(zeros), "r"(steps));
    else asm("{.reg .b32 d;\nsub.rn.f16x2 d, %1, %2;\nmul.rn.f16x2 %0, d, %3;}" : "=r"(v) : "r"(codes), "r"(zeros), "r"(steps));
    return v;
}

// Find out what the codes of four rows of a segment need, a lane's: zero point plus MAGIC and step, both twice; or as floats, the
// zero point plus 2^23, if not IN_HALVES. As field_of says, values of four rows are a byte apart.
__device__ __forceinline__ void find_grids(int bits, const u32* tail, int lane, float scale, const float (&scales)[4], uint4* to) {
    if (bits == 0 || bits == 16) return;
    const u32* words = tail + lane / 8 * bits;
    const int four = lane % 8;  // of the eight fours of rows that have these words
    u32 zeros = 0x01010101u << (bits - 1);
    if (ZEROS && MOST_BITS >= 8 && bits == 8) zeros = words[four];
    else if (ZEROS) {
        zeros = bits & 4 ? words[four / 2] >> 4 * (four % 2) & 0x0F0F0F0F : 0;
        if (bits & 2) zeros |= (words[(bits & 4) + four / 4] >> 2 * (four % 4) & 0x03030303) << (bits & 4);
        if (bits & 1) zeros |= (words[bits & 6] >> four & 0x01010101) << (bits & 6);
    }
    const u32 codes = tail[32 + lane / 2] >> 4 * (lane % 2) & 0x0F0F0F0F;
    uint2 found[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float code = __uint_as_float(__byte_perm(codes, 0x4B000000, 0x7440 + j));  // plus 2^23
        float power;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fmaf(-0.25f, code, 0.25f * 8388608.0f)));
        const float step = scale * scales[j] * power;
        if (FLOATS && bits == 8) found[j] = make_uint2(__byte_perm(zeros, 0x4B000000, 0x7440 + j), __float_as_uint(step));
        else found[j] = make_uint2(__byte_perm(zeros, MAGIC, 0x5050 + 0x101 * j), two_numbers(step, step));
    }
    to[lane] = make_uint4(found[0].x, found[0].y, found[1].x, found[1].y);
    to[32 + lane] = make_uint4(found[2].x, found[2].y, found[3].x, found[3].y);
}

// Eight codes, or low or high bytes: of two rows, the channels of this lane.
struct Bytes {
    u32 chunk[2][2];  // [channels 8t+4i ...][row]
};

template <int BITS>
__device__ __forceinline__ Bytes bytes_at(const char* words, const Lane& l) {
    auto two = [&](int place, int row) { return *(const uint2*)(words + place + row * ROW_BYTES); };
    Bytes c = {};
    if constexpr (BITS == 8) {
        const uint2 first = two(l.eights, 0), second = two(l.eights, 1);
        return Bytes{{{first.x, first.y}, {second.x, second.y}}};
    }
    if constexpr (BITS & 4) add_plane<4>(c.chunk, two(l.fours, 0), 0, 0);
    if constexpr (BITS & 2) add_plane<2>(c.chunk, two(l.twos, BITS & 4), l.two_turn, BITS & 4);
    if constexpr (BITS & 1) add_plane<1>(c.chunk, two(l.ones, BITS & 6), l.one_turn, BITS & 6);
    return c;
}

// Two channels of a row, by its grid; `high` bytes are of 16 bits only.
template <int BITS>
__device__ __forceinline__ u32 two_channels(u32 four, u32 high, int half, u32 zero, u32 step) {
    if constexpr (IN_HALVES<BITS>) return dequantized(__byte_perm(four, MAGIC >> 8, half ? 0x4342 : 0x4140), zero, step);
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int k = 2 * half + e;
        if constexpr (BITS == 16) v[e] = half_to_float((u16)__byte_perm(four, high, k + (k + 4) * 16));
        else v[e] = (__uint_as_float(__byte_perm(four, 0x4B000000, 0x7440 + k)) - __uint_as_float(zero)) * __uint_as_float(step);
    }
    return two_numbers(v[0], v[1]);
}

// Unpack one segment, or two of one grid: two rows, the eight channels of this lane.
template <int BITS, int SEGMENTS>
__device__ __forceinline__ void unpack(const char* words, const uint4* grids, const Lane& l, Operand (&to)[SEGMENTS]) {
    const uint4 both = grids[l.grid];
    Bytes c[SEGMENTS], highs[SEGMENTS] = {};
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++) {
        c[s] = bytes_at<BITS == 16 ? 8 : BITS>(words + s * BITS * ROW_BYTES, l);
        if constexpr (BITS == 16) highs[s] = bytes_at<8>(words + (s * BITS + 8) * ROW_BYTES, l);
    }
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                to[s][i / 2][i % 2 * 2 + j] =
                    two_channels<BITS>(c[s].chunk[i / 2][j], highs[s].chunk[i / 2][j], i % 2, j ? both.z : both.x, j ? both.w : both.y);
}

template <int SEGMENTS>
__device__ __forceinline__ void unpack_segments(int bits, const char* words, const uint4* grids, const Lane& l, Operand (&to)[SEGMENTS]) {
#define WIDTH(BITS) \
    if constexpr (BITS <= MOST_BITS) \
        if (bits == BITS) return unpack<BITS, SEGMENTS>(words, grids, l, to);
    WIDTH(4) WIDTH(5) WIDTH(3) WIDTH(6) WIDTH(2) WIDTH(8) WIDTH(1) WIDTH(7) WIDTH(16)  // those first that are frequent
#undef WIDTH
#pragma unroll
    for (int i = 0; i < 8 * SEGMENTS; i++) to[i / 8][i / 4 % 2][i % 4] = 0;
}

// Whether two segments have the same grids.
__device__ __forceinline__ bool alike(const int4& one, const int4& other) { return one.x == other.x && one.z == other.z; }

// Unpack a step: both segments at once, if they have one grid.
__device__ __forceinline__ void unpack_step(const int4& even, const int4& odd, const char* words, const uint4* grids, const Lane& l,
                                            Operand (&to)[2]) {
    if (alike(even, odd)) {
        unpack_segments<2>(even.x, words, grids, l, to);
        return;
    }
#pragma unroll 1
    for (int s = 0; s < 2; s++) {
        Operand one[1];
        unpack_segments<1>(s ? odd.x : even.x, words + (s ? even.x * ROW_BYTES : 0), grids + s * 64, l, one);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (s == 0) to[0][i / 4][i % 4] = one[0][i / 4][i % 4];
            to[1][i / 4][i % 4] = one[0][i / 4][i % 4];  // of the even one, too, until the odd one takes its place
        }
    }
}

// A quotient, by the whole part of 2^32 / divisor, plus 1: exact as long as dividend times divisor is less than 2^32.
__device__ __forceinline__ u32 divided(u32 dividend, int divisor, u32 by) { return divisor == 1 ? dividend : __umulhi(dividend, by); }

// A share of a tile.
struct Share {
    int split, splits, slot;
    int tile, column;  // rows of the weight, rows of activations
    int first, steps;  // of the channels

    __device__ Share(const Args& a, int number) {
        Part part = a.parts[0];
#pragma unroll
        for (int i = 1; i < MOST_PARTS; i++)
            if (number >= a.parts[i].share) part = a.parts[i];
        const u32 own = divided(number - part.share, part.splits, part.by_splits);
        splits = part.splits, split = number - part.share - own * splits, slot = part.slot + own;
        column = divided(own, part.tiles, part.by_tiles), tile = part.tile + own - column * part.tiles;
        first = min(part.steps * split, a.steps), steps = min(part.steps, a.steps - first);
    }
};

// Where a step is in the ring, and which of the two phases its barriers are in.
struct Turn {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Shared memory.
struct Room {
    char* ring;      // STAGES times: a tile of activations, words, zero points and scales
    int4* units;     // of every segment: bits, first word row, grid, zero points
    float* scales;   // of every segment: what all rows have of the step
    u32 full, ready, empty;  // barriers of every stage: it is copied; its grids are known; it may be written again
    u32 received;            // barriers: either half of what the other block of the cluster sends is there
    u32 told;                // a barrier: what is `offered` is known
    volatile int* offered;   // the first one of two stages that the other block has for what this one sends
};

// ---------------------------------------------------------------------------------------------------- roles

// Copy the words of a step, whose segments follow each other in memory as well.
__device__ __forceinline__ void fetch_words(const Args& a, const int4& even, const int4& odd, int tile, u32 to, int lane) {
    const int row = tile * 128 + lane * 4, count = row < a.w.rows ? even.x + odd.x : 0;
    const u32* from = a.w.codes + ((size_t)even.y * a.w.rows + row);
    to += lane * 16;
#pragma unroll 1
    for (int r = 0; r < count; r += 4, to += 4 * ROW_BYTES)
#pragma unroll
        for (int j = 0; j < 4; j++, from += a.w.rows)
            if (r + j < count) copy16(to + j * ROW_BYTES, from);
}

// Copy zero points and scales of a segment.
__device__ __forceinline__ void fetch_tail(const Args& a, const int4& unit, int tile, u32 to, int lane) {
    const int tiles = (min(128, a.w.rows - tile * 128) + 31) / 32, bits = unit.x;
    if (bits == 0 || bits == 16) return;
    if (ZEROS && lane < tiles * bits) copy4(to + lane * 4, a.w.zeros + (unit.w + tile * 4 * bits + lane));
    if (lane < 4 * tiles) copy4(to + (32 + lane) * 4, a.w.scale_codes + (unit.z * a.w.scale_words + tile * 16 + lane));
}

// Copy the activations of a step, as they were arranged. `k`: of the steps of a share.
__device__ __forceinline__ void fetch_activations(const Args& a, const Room& room, const Share& share, int k, int stage) {
    const u32 full = room.full + stage * 8;
    arrive_with(full, X_BYTES);
    copy(address(room.ring + stage * STAGE_BYTES), (const char*)a.arranged + ((size_t)share.column * a.steps + share.first + k) * X_BYTES,
         X_BYTES, full);
}

// Those of all steps that the ring takes at once, as soon as `arrange` has come to its end; what weights need is on its way by then.
__device__ __forceinline__ void fetch_first_activations(const Args& a, const Room& room) {
    wait_for_last();
    int count = 0;
#pragma unroll 1
    for (int i = blockIdx.x; i < a.shares && count < STAGES; i += gridDim.x) {
        const Share share(a, i);
#pragma unroll 1
        for (int k = 0; k < share.steps && count < STAGES; k++, count++) fetch_activations(a, room, share, k, count);
    }
}

// One of the warps that copy: of all steps of the block, `first`, `first` + COPIERS ...
__device__ __forceinline__ void fetch_all(const Args& a, const Room& room, int first, int lane) {
    int count = 0;  // of steps
    Turn turn;
#pragma unroll 1
    for (int i = blockIdx.x; i < a.shares; i += gridDim.x) {
        const Share share(a, i);
#pragma unroll 1
        for (int k = 0; k < share.steps; k++, count++, turn.next()) {
            if (count % COPIERS != first) continue;
            const u32 full = room.full + turn.stage * 8, to = address(room.ring + turn.stage * STAGE_BYTES), tail = to + TAIL_AT;
            if (count >= STAGES) wait(room.empty + turn.stage * 8, turn.parity ^ 1);
            const int4 even = room.units[2 * (share.first + k)], odd = room.units[2 * (share.first + k) + 1];
            fetch_words(a, even, odd, share.tile, to + X_BYTES, lane);
            fetch_tail(a, even, share.tile, tail, lane);
            if (!alike(even, odd)) fetch_tail(a, odd, share.tile, tail + 48 * 4, lane);
            arrive_when_copied(full);
            if (count >= STAGES && lane == 0) fetch_activations(a, room, share, k, turn.stage);
        }
    }
}

// One of the warps that find out the grids: of steps `first`, `first` + PREPARERS ... It waits for the others' steps too: a wait
// tells a phase of a barrier from the next one only, and the last step in a stage is another warp's, if STAGES is odd.
__device__ __forceinline__ void prepare_all(const Args& a, const Room& room, int first, int lane) {
    int count = 0;
    Turn turn;
#pragma unroll 1
    for (int i = blockIdx.x; i < a.shares; i += gridDim.x) {
        const Share share(a, i);
        float scales[4];  // of its rows, without those of the channels
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = share.tile * 128 + lane * 4 + j;
            scales[j] = row < a.w.rows ? half_to_float(__ldg(a.w.row_scales + row)) * LARGER : 0.0f;
        }
#pragma unroll 1
        for (int k = 0; k < share.steps; k++, count++, turn.next()) {
            char* stage = room.ring + turn.stage * STAGE_BYTES;
            wait(room.full + turn.stage * 8, turn.parity);
            if (count % PREPARERS != first) continue;
            const int segment = 2 * (share.first + k);
            const int4 even = room.units[segment], odd = room.units[segment + 1];
            const u32* tail = (const u32*)(stage + TAIL_AT);
            uint4* to = (uint4*)(stage + GRIDS_AT);
            find_grids(even.x, tail, lane, room.scales[segment], scales, to);
            if (!alike(even, odd)) find_grids(odd.x, tail + 48, lane, room.scales[segment + 1], scales, to + 64);
            arrive(room.ready + turn.stage * 8);
        }
    }
}

// Multiply a step: four operands of 16 channels, of which a row of activations has 32 bytes.
__device__ __forceinline__ void multiply_step(u32 x, Operand (&a)[2], float (&d)[TOKENS / 2]) {
    before_products();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply(d, a[i / 2][i % 2], x + 2 * i);
    after_products();
}

// Products read their operands until they are waited for; whoever assigns registers does not know, and would have the next step
// unpacked in the same ones, were they not still written somewhere here: `never`.
__device__ __forceinline__ void have_been_read(const Operand (&a)[2], int never, u32 somewhere) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32(&four)[4] = a[i / 2][i % 2];
        asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.shared.v4.u32 [%1], {%2, %3, %4, %5};\n}" ::"r"(never),
                     "r"(somewhere + 16 * i), "r"(four[0]), "r"(four[1]), "r"(four[2]), "r"(four[3]));
    }
}

// Results are in their registers here: whoever reorders instructions knows nothing of products that are under way.
__device__ __forceinline__ void settle(float (&d)[TOKENS / 2]) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Tell the other block of the cluster where it may write, near the end of all this one does: the two stages that were copied first
// are written to no more, and products that read them are done, of which all warps' arrival tells. `stage`: the first one of
// them, or STAGES more.
__device__ __forceinline__ void offer_room(const Room& room, int stage) {
    const int other = cluster_rank() ^ 1;
    if (threadIdx.x == 0)
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                         in_block(address((const void*)room.offered), other)),
                     "r"(stage < STAGES ? stage : stage - STAGES), "r"(in_block(room.told, other))
                     : "memory");
    __syncwarp();
    cluster_arrive_relaxed();
}

// The warps that multiply: a step is unpacked while the other group multiplies. `last`: the stage of the step before, -1: there was
// none. It may be written again when its products are done, and the next step is ready, also beyond the end of a share: then all
// who prepare have seen that it was full. `paired`: whether the other block of the cluster has the tile's other share.
__device__ __forceinline__ void multiply_share(const Room& room, const Share& share, const Lane& l, Turn& turn, int& last,
                                               float (&d)[TOKENS / 2], bool paired) {
    int never = 0;  // which nobody knows
    asm volatile("" : "+r"(never));
    int speaks = threadIdx.x % 32 == 0;
    u32 ring = address(room.ring), ready = room.ready, empty = room.empty;
    asm volatile("" : "+r"(speaks), "+r"(ring), "+r"(ready), "+r"(empty));  // as in Lane: they stay in registers
    const int4* units = (const int4*)__cvta_shared_to_generic(ring + STAGES * STAGE_BYTES) + 2 * share.first;
    settle(d);
    int4 even = units[0], odd = units[1];
    auto step = [&](int k, Operand (&weights)[2], Operand (&before)[2]) {
        const char* at = (const char*)__cvta_shared_to_generic(ring + turn.stage * STAGE_BYTES);
        wait(ready + turn.stage * 8, turn.parity);  // who said so has waited for all that was copied
        unpack_step(even, odd, at + X_BYTES, (const uint4*)(at + GRIDS_AT), l, weights);
        const int next = 2 * min(k + 1, share.steps - 1);
        even = units[next], odd = units[next + 1];
        multiply_step(tile_at(ring + turn.stage * STAGE_BYTES), weights, d);
        wait_for_all_but<1>();
        have_been_read(before, never, ring);
        if (speaks && last >= 0) arrive(empty + last * 8);
        last = turn.stage;
        turn.next();
    };
    Operand one[2] = {}, other[2] = {};
    // Room is offered when the products with the first two of the last STAGES steps are done: those of the last step may not be. The
    // number is even, as there are two operands.
    int k = 0, stop = paired ? max(share.steps - STAGES + 3, 0) + 1 & ~1 : share.steps;
    while (true) {
#pragma unroll 1
        for (; k < stop; k += 2) {
            step(k, one, other);
            if (k + 1 < share.steps) step(k + 1, other, one);
        }
        if (!paired) break;
        offer_room(room, turn.stage + max(share.steps - k, 0));
        paired = false, stop = share.steps;
    }
    wait_for_all_but<0>();
    have_been_read(one, never, ring), have_been_read(other, never, ring);
    settle(d);
}

__device__ __forceinline__ void multipliers_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory"); }

// Say that this block has left something, and see what others have: how many had said so before.
__device__ __forceinline__ u32 arrive_after(u32* arrived) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    return before;
}

// Leave what was found of a tile for whoever comes last; that is who adds up all of it, always in the same order. The first two
// may change places, so who is one of them starts with what it has found itself.
__device__ __forceinline__ bool add_up(const Args& a, const Share& share, u32& before, float (&d)[TOKENS / 2]) {
    constexpr int TOGETHER = PIECES % 16 == 0 ? 16 : PIECES % 2 ? 1 : 2;  // loads under way: as many as there are registers for
    float4* found = a.found + (size_t)share.slot * a.most_splits * PIECES * MULTIPLIERS + threadIdx.x;
    float4* own = found + share.split * PIECES * MULTIPLIERS;
#pragma unroll
    for (int i = 0; i < PIECES; i++) own[i * MULTIPLIERS] = make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]);
    multipliers_barrier();
    if (threadIdx.x == 0) before = arrive_after(a.arrived + share.slot);
    multipliers_barrier();
    if (before != share.splits - 1) return false;
    const bool starts = share.split < 2;
    if (!starts)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i]));
#pragma unroll 1
    for (int r = 0; r < share.splits; r++) {
        if (starts && r == share.split) continue;
        const float4* from = found + r * PIECES * MULTIPLIERS;
#pragma unroll
        for (int i = 0; i < PIECES; i += TOGETHER) {
            float4 more[TOGETHER];
#pragma unroll
            for (int j = 0; j < TOGETHER; j++) more[j] = from[(i + j) * MULTIPLIERS];
#pragma unroll
            for (int j = 0; j < TOGETHER; j++) {
                float* to = d + 4 * (i + j);
                to[0] += more[j].x, to[1] += more[j].y, to[2] += more[j].z, to[3] += more[j].w;
            }
        }
    }
    return true;
}

// Where results go: a thread has two adjacent rows, so a warp 32 bytes of every row of activations.
struct Results {
    char* to;
    int stride, left;
    float bias[2];

    __device__ __forceinline__ Results(const Args& a, const Share& share, const Lane& l) : bias{} {
        const int row = share.tile * 128 + l.row, token = share.column * TOKENS + 2 * l.t;
        const bool there = row < a.w.rows;
        if (a.bias && there) bias[0] = to_float(((const Number*)a.bias)[row]), bias[1] = to_float(((const Number*)a.bias)[row + 1]);
        to = (char*)a.out + ((size_t)token * a.w.rows + row) * sizeof(Number);
        stride = a.w.rows * (int)sizeof(Number), left = there ? a.tokens - token : 0;
        asm volatile("" : "+l"(to));
    }

    // Write a piece. As it is written here, it takes few instructions, which have not been fetched yet.
    __device__ __forceinline__ void write(const float* piece, int i) const {
#pragma unroll
        for (int e = 0; e < 2; e++)
            asm volatile("{\n.reg .pred p;\n.reg .b64 at;\nsetp.lt.s32 p, %3, %4;\nmad.wide.s32 at, %1, %3, %0;\n"
                         "@p st.global.u32 [at], %2;\n}" ::"l"(to),
                         "r"(stride), "r"(two_numbers(piece[e] * (1 / LARGER) + bias[0], piece[2 + e] * (1 / LARGER) + bias[1])),
                         "r"(8 * i + e), "r"(left)
                         : "memory");
    }
};

// Two blocks of a cluster have multiplied the two shares of a tile, each at the end of its work: they send each other what half of
// the rows of activations still lacks, which goes where room was offered. `stage`: the first one of the two that this block
// offered; SENT, KEPT: where the halves are in `d`.
template <int SENT, int KEPT>
__device__ __forceinline__ void exchange(const Room& room, int stage, float (&d)[TOKENS / 2], const Results& results) {
    static_assert(STAGES >= 3 && OF_STAGE * MULTIPLIERS * 16 <= STAGE_BYTES, "room for half of the results in two stages");
    auto place = [&](int stage) { return address(room.ring) + threadIdx.x * 16 + (stage < STAGES ? stage : 0) * STAGE_BYTES; };
    wait(room.told, 0);
    const int theirs = *room.offered, others = cluster_rank() ^ 1;
    const u32 to[2] = {in_block(place(theirs), others), in_block(place(theirs + 1), others)};
    const u32 received[2] = {in_block(room.received, others), in_block(room.received + 8, others)};
#pragma unroll
    for (int i = 0; i < PIECES / 2; i++) {
        const float* sent = d + SENT + 4 * i;
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                         to[i / OF_STAGE] + i % OF_STAGE * MULTIPLIERS * 16),
                     "f"(sent[0]), "f"(sent[1]), "f"(sent[2]), "f"(sent[3]), "r"(received[i / OF_STAGE])
                     : "memory");
    }
    const u32 from[2] = {place(stage), place(stage + 1)};
#pragma unroll
    for (int i = 0; i < PIECES / 2; i++) {
        if (i % OF_STAGE == 0) wait(room.received + i / OF_STAGE * 8, 0);
        const float4 more = *(const float4*)__cvta_shared_to_generic(from[i / OF_STAGE] + i % OF_STAGE * MULTIPLIERS * 16);
        float* kept = d + KEPT + 4 * i;
        kept[0] += more.x, kept[1] += more.y, kept[2] += more.z, kept[3] += more.w;
        results.write(kept, KEPT / 4 + i);
    }
}

// The warps that multiply load the scales of all segments; those that find out grids wait for them.
__device__ __forceinline__ void wait_for_scales() { asm volatile("bar.sync 2, %0;" ::"n"(MULTIPLIERS + 32 * PREPARERS) : "memory"); }

__device__ __forceinline__ void load_scales(const Args& a, const Room& room) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * a.steps; i += MULTIPLIERS) {
        const int4 unit = room.units[i];
        room.scales[i] = unit.x > 0 && unit.x < 16 ? half_to_float(__ldg(a.w.group_scales + unit.z)) / ((1 << unit.x) - 1) : 0.0f;
    }
    wait_for_scales();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) tile(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) char shared[];  // more would be added to what the kernel declares itself
    __shared__ __align__(8) unsigned long long barriers[3 * STAGES + 3];
    __shared__ int offered;
    static_assert(sizeof(barriers) + sizeof(offered) + 4 <= 256, "tile.py leaves so much to what is declared here");
    __shared__ u32 before;  // shares of a tile that had arrived when this one did
    Room room;
    room.ring = shared + (1024 - (address(shared) & 1023) & 1023);
    room.units = (int4*)(room.ring + STAGES * STAGE_BYTES);
    room.scales = (float*)(room.units + 2 * a.steps);
    room.offered = &offered;
    room.full = address(barriers), room.ready = address(barriers + STAGES), room.empty = address(barriers + 2 * STAGES);
    room.received = address(barriers + 3 * STAGES), room.told = room.received + 16;
    // Few instructions, which nobody has fetched yet: loops are not unrolled, and the first units are on their way while barriers
    // are made.
    const int4 unit = __ldg(a.units + min((int)threadIdx.x, 2 * a.steps - 1));
    if (threadIdx.x % 32 == 0)  // a warp after the other would take several times as long
#pragma unroll 1
        for (int i = threadIdx.x / 32; i < 3 * STAGES + 3; i += THREADS / 32)
            init(room.full + i * 8, i < STAGES ? 33 : i < 2 * STAGES ? 32 : i < 3 * STAGES ? MULTIPLIERS / 32 : 1);
    if (threadIdx.x < 2 * a.steps) room.units[threadIdx.x] = unit;
#pragma unroll 1
    for (int i = threadIdx.x + THREADS; i < 2 * a.steps; i += THREADS) room.units[i] = __ldg(a.units + i);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    if (PAIRS) cluster_arrive_relaxed();  // nobody writes to a block whose barriers are not there yet; this one's are, by the fence
    if (threadIdx.x >= MULTIPLIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        const int warp = threadIdx.x / 32 - MULTIPLIERS / 32, lane = threadIdx.x % 32;
        if (warp < COPIERS) fetch_all(a, room, warp, lane);
        else {
            if (threadIdx.x == THREADS - 1) fetch_first_activations(a, room);
            __syncwarp();
            wait_for_scales();
            prepare_all(a, room, warp - COPIERS, lane);
        }
        if (PAIRS) cluster_wait();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        const Lane l(threadIdx.x);
        if (PAIRS && threadIdx.x == 0) {
            arrive_with(room.received, OF_STAGE * MULTIPLIERS * 16);
            arrive_with(room.received + 8, (PIECES / 2 - OF_STAGE) * MULTIPLIERS * 16);
            arrive_with(room.told, 4);
        }
        load_scales(a, room);
        if (PAIRS) cluster_wait();
        Turn turn;
        int last = -1;
#pragma unroll 1
        for (int i = blockIdx.x; i < a.shares; i += gridDim.x) {
            const Share share(a, i);
            const bool paired = PAIRS && share.splits == 2 && i + gridDim.x >= a.shares;
            float d[TOKENS / 2] = {};
            multiply_share(room, share, l, turn, last, d, paired);
            wait_for_last();  // `arrange` has cleared the counters
            if (paired) {
                cluster_wait();  // the other block reads no more of what it offers
                const Results results(a, share, l);
                if (share.split == 0) exchange<TOKENS / 4, 0>(room, turn.stage, d, results);
                else exchange<0, TOKENS / 4>(room, turn.stage, d, results);
            } else if (share.splits == 1 || add_up(a, share, before, d)) {
                const Results results(a, share, l);
#pragma unroll
                for (int i = 0; i < PIECES; i++) results.write(d + 4 * i, i);
            }
        }
    }
}
