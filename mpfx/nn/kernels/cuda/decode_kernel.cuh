// Matrix times a few vectors on packed weights: the kernel, whatever its units are. It puts activations into order, has each
// warp multiply its units, and adds up what the warps found.
//
// The file before this one, decode.cu or decode_masked.cu, says
// - what units want of shared memory: TABLE_BYTES of a block, which `fill_table` fills, and ROOM_BYTES of each warp; `Planned`
//   for each unit of a warp, and EMPTY_UNITS more of these; `sum_as_read`, a sum of activations as it is to be found there;
// - what a lane has: `row_of`, the j-th of its rows; `Reader`, which is a Lane, in two steps: `reader_of` before it is known
//   where things are in shared memory, `reach` once it is;
// - what is done: `look_ahead` loads what `start_units` is to find in registers, which starts to copy for the first units;
//   `multiply_units` goes through all of them.

// ---------------------------------------------------------------------------------------------------- activations

constexpr int DIGITS = DTYPE == 2 ? 30 : 22;  // bits of the largest activation of a vector, as an integer

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
        if (octet % 4 == 0) sums[part] = sum_as_read(sum);
    }
}

// One more segment, of zeros, stands in where a unit has only one. Nothing is the largest so far.
__device__ __forceinline__ void add_zeros(const Room& room) {
    for (int i = threadIdx.x; i < COLUMNS * 4; i += THREADS)
        ((uint2*)(room.x + SEGMENTS_IN_ALL * SEGMENT_BYTES))[i] = make_uint2(0, 0);
    for (int i = threadIdx.x; i < COLUMNS; i += THREADS) room.sums[SEGMENTS_IN_ALL * COLUMNS + i] = 0;
    if (threadIdx.x < COUNT) room.largest[threadIdx.x] = 0;
}

// ---------------------------------------------------------------------------------------------------- results

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
    int r;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
    return r;
#else
    return 1;
#endif
}

__device__ __forceinline__ void cluster_barrier() {  // where there are clusters: earlier devices have nothing to wait for
    cluster_arrive();
    cluster_wait();
}

__device__ __forceinline__ void store(void* p, size_t i, float f) {
    if (DTYPE == 2) ((float*)p)[i] = f;
    else if (DTYPE == 0) asm volatile("{.reg .b16 h; cvt.rn.bf16.f32 h, %1; st.global.b16 [%0], h;}" ::"l"((u16*)p + i), "f"(f));
    else asm volatile("{.reg .b16 h; cvt.rn.f16.f32 h, %1; st.global.b16 [%0], h;}" ::"l"((u16*)p + i), "f"(f));
}

__device__ __forceinline__ float of_block(const float* p, int rank) {
#if __CUDA_ARCH__ >= 900
    float f;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(f) : "r"(in_block(address(p), rank)) : "memory");
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
__device__ __forceinline__ void finish(const Site& a, const Lane& l, int warp, const u32* largest, const Results& result, char* rooms,
                                       int stride) {
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
    if (splits == 1) return;
    cluster_arrive_relaxed();  // what was read of others has been stored
    cluster_wait();            // nobody leaves while others read
}

// ---------------------------------------------------------------------------------------------------- kernel

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
    Reader l = reader_of(a);
    const int ring_bytes = STAGES * a.stage_bytes;
    Room room;
    room.largest = (u32*)(shared + TABLE_BYTES);
    room.given = (char*)room.largest + bytes_of(COUNT * 4);
    room.x = room.given + bytes_of(AT_ONCE * IN * sizeof(Number));
    room.sums = (float*)(room.x + (SEGMENTS_IN_ALL + 1) * SEGMENT_BYTES);
    const int stride = max(ring_bytes + ROOM_BYTES + (a.most_units + EMPTY_UNITS) * (int)sizeof(Planned), COLUMNS * 128);
    char* rooms = (char*)room.sums + bytes_of((SEGMENTS_IN_ALL + 1) * COLUMNS * 4) + threadIdx.x / (WARPS * 32) * WARPS * stride;
    int own = rooms - shared + warp * stride;  // a number: a pointer that is kept forgets that this is shared memory
    keep(own);
    room.own = shared + own;
    reach(l, shared, address(shared + own), room);
    room.ring = shared + own + ROOM_BYTES;
    room.ring_at = address(room.ring);
    room.units = (Planned*)(room.ring + ring_bytes);
    let_next_start();
    // What is short and waited for is loaded before the memory is busy with words.
    const int4* units = a.units + (cluster_rank() * WARPS + warp) * a.most_units;
    const Ahead ahead = look_ahead(a, units, l);
    const int most = l.tile * 32 < a.w.rows ? a.most_units : 0;  // the last block may have groups without rows
    Places order[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) order[r] = places(args, (r * THREADS + (int)threadIdx.x) * 8);
    const int row = l.tile * 32 + l.lane;
    const float row_scale = CODED && row < a.w.rows ? half_to_float(__ldg(a.w.row_scales + row)) : 1.0f;
    add_zeros(room);
    fill_table(shared);
    Given given;
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++)
        if (turn == args.early) {
            wait_for_last();
            load_activations(args, 0, given);
        } else start_units(a, units, most, ahead, l, room);
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
    multiply_units(a, row_scale, most, l, room, result);
    wait_for_all_but<0>();
    __syncwarp();  // all lanes have read the last unit, whose place the results take
    finish(a, l, warp, room.largest, result, rooms, stride);
}
