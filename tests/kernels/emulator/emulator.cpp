// Fibers, their scheduler, and what a warp does together. See emulator.h.
#include "cluster.h"

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// ---- Fibers. lorapar_switch keeps the registers that a function must keep, and its stack.
#ifdef __x86_64__
extern "C" void lorapar_switch(void** from, void* to);
asm(R"(
.text
.globl lorapar_switch
.hidden lorapar_switch
.type lorapar_switch, @function
lorapar_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

namespace lorapar::emulator {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;  // after shared memory

struct Copy {
  void* shared;
  const void* global;
  int bytes;
};

struct Fiber {
#ifdef __x86_64__
  void* context = nullptr;
#else
  ucontext_t context;
#endif
  bool done = false;
  int64_t barriers = 0, operations = 0;  // passed or waiting for
  bool waits_for_block = false, waits_for_warp = false;
  std::vector<Copy> open;               // not yet committed
  std::deque<std::vector<Copy>> groups;  // on their way
};

struct Warp {
  int arrived = 0;
  Operation operation = nullptr;
  void* arguments[kLanes];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<char> memory;
char* shared_begin;
size_t shared_size;
char* stacks = nullptr;
size_t stack_count = 0;
int current, arrived, threads_of_block;
const std::function<void()>* body;
#ifdef __x86_64__
void* scheduler;
#else
ucontext_t scheduler;
#endif

void pause() {
#ifdef __x86_64__
  lorapar_switch(&fibers[current].context, scheduler);
#else
  swapcontext(&fibers[current].context, &scheduler);
#endif
}

void begin() {
  (*body)();
  fibers[current].done = true;
  pause();
}

void resume(int thread) {
  current = thread;
  threadIdx = {unsigned(thread), 0, 0};
#ifdef __x86_64__
  lorapar_switch(&scheduler, fibers[thread].context);
#else
  swapcontext(&scheduler, &fibers[thread].context);
#endif
}

void prepare(int thread) {
  Fiber& f = fibers[thread];
  f.done = f.waits_for_block = f.waits_for_warp = false;
  f.open.clear();
  f.groups.clear();
  char* stack = stacks + thread * kStack;
#ifdef __x86_64__
  auto** top = reinterpret_cast<void**>(stack + kStack - 72);
  *top = nullptr;  // where `begin` would return to; 8 past a multiple of 16, as after a call
  *--top = reinterpret_cast<void*>(&begin);
  f.context = top - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, begin, 0);
#endif
}

// Runs a warp until all its lanes wait for the block or are done.
void run_warp(int warp, bool backwards) {
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < kLanes; ++i) {
      int thread = warp * kLanes + (backwards ? kLanes - 1 - i : i);
      Fiber& f = fibers[thread];
      if (f.done || f.waits_for_block || f.waits_for_warp) continue;
      resume(thread);
      moved = true;
    }
    backwards = !backwards;
  }
  check(warps[warp].arrived == 0, "some lanes of a warp never reach what the others wait for");
}

void run_block(bool backwards) {
  int count = threads_of_block / kLanes;
  std::memset(shared_begin, 0xff, shared_size + kGuard);
  for (int t = 0; t < threads_of_block; ++t) prepare(t);
  for (Warp& w : warps) w.arrived = 0;
  arrived = 0;
  for (int done = 0; done < threads_of_block;) {
    for (int i = 0; i < count; ++i) run_warp(backwards ? count - 1 - i : i, backwards);
    done = 0;
    for (int t = 0; t < threads_of_block; ++t) done += fibers[t].done;
    check(done == 0 || arrived == 0, "some threads end, others wait for them at a barrier");
    check(done == threads_of_block || arrived == threads_of_block, "a block that cannot go on");
    arrived = 0;
    for (int t = 0; t < threads_of_block; ++t) fibers[t].waits_for_block = false;
  }
  for (size_t i = 0; i < kGuard; ++i)
    check(shared_begin[shared_size + i] == char(0xff), "a write past the end of shared memory");
}

void check_shared(const void* p, const char* what) {
  auto* c = static_cast<const char*>(p);
  check(c >= shared_begin && c + 16 <= shared_begin + shared_size, what);
  check(reinterpret_cast<uintptr_t>(p) % 16 == 0, what);
}

float number(uint16_t bits, __half) {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; ++i) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(i);
      t[i] = __half2float(__half(raw));
    }
    return t;
  }();
  return table[bits];
}
float number(uint16_t bits, __nv_bfloat16) { return __uint_as_float(uint32_t(bits) << 16); }

template <typename T>
void mma(void* const* lanes) {
  float a[16][16], b[16][8], d[16][8];
  auto lane = [&](int l) { return static_cast<Mma*>(lanes[l]); };
  auto half = [](const uint32_t& word, int i) { return number(uint16_t(word >> 16 * i), T()); };
  for (int l = 0; l < kLanes; ++l) {
    int g = l / 4, t = 2 * (l % 4);
    for (int i = 0; i < 2; ++i) {
      a[g][t + i] = half(lane(l)->a[0], i);
      a[g + 8][t + i] = half(lane(l)->a[1], i);
      a[g][t + i + 8] = half(lane(l)->a[2], i);
      a[g + 8][t + i + 8] = half(lane(l)->a[3], i);
      b[t + i][g] = half(lane(l)->b[0], i);
      b[t + i + 8][g] = half(lane(l)->b[1], i);
      d[g][t + i] = lane(l)->d[i];
      d[g + 8][t + i] = lane(l)->d[2 + i];
    }
  }
  for (int m = 0; m < 16; ++m) {
    float sum[8] = {};
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) sum[n] += a[m][k] * b[k][n];
    for (int n = 0; n < 8; ++n) d[m][n] += sum[n];
  }
  for (int l = 0; l < kLanes; ++l) {
    int g = l / 4, t = 2 * (l % 4);
    for (int i = 0; i < 2; ++i) {
      lane(l)->d[i] = d[g][t + i];
      lane(l)->d[2 + i] = d[g + 8][t + i];
    }
  }
}

template <bool transposed>
void load_matrices(void* const* lanes) {
  uint16_t matrix[4][8][8];
  for (int l = 0; l < kLanes; ++l) {
    const void* row = static_cast<Ldmatrix*>(lanes[l])->row;
    check_shared(row, "ldmatrix from an odd place");
    std::memcpy(matrix[l / 8][l % 8], row, 16);
  }
  for (int l = 0; l < kLanes; ++l) {
    int g = l / 4, t = 2 * (l % 4);
    for (int i = 0; i < 4; ++i) {
      uint16_t low = transposed ? matrix[i][t][g] : matrix[i][g][t];
      uint16_t high = transposed ? matrix[i][t + 1][g] : matrix[i][g][t + 1];
      static_cast<Ldmatrix*>(lanes[l])->r[i] = low | uint32_t(high) << 16;
    }
  }
}

}  // namespace

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "emulated kernel: %s (block %u %u %u, thread %u)\n", what, blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x);
  std::abort();
}

char* shared_memory() { return shared_begin; }

void mma_f16(void* const* lanes) { mma<__half>(lanes); }
void mma_bf16(void* const* lanes) { mma<__nv_bfloat16>(lanes); }
void ldmatrix(void* const* lanes) { load_matrices<false>(lanes); }
void ldmatrix_transposed(void* const* lanes) { load_matrices<true>(lanes); }

void together(Operation operation, void* argument) {
  int thread = current, first = thread / kLanes * kLanes;
  Warp& warp = warps[thread / kLanes];
  check(warp.arrived == 0 || warp.operation == operation,
        "lanes of a warp at different operations");
  warp.operation = operation;
  warp.arguments[thread - first] = argument;
  if (++warp.arrived < kLanes) {
    fibers[thread].waits_for_warp = true;
    pause();
    return;
  }
  operation(warp.arguments);
  warp.arrived = 0;
  for (int l = 0; l < kLanes; ++l) fibers[first + l].waits_for_warp = false;
}

void barrier() {
  ++arrived;
  fibers[current].waits_for_block = true;
  pause();
}

void run(dim3 grid, int threads, size_t shared, const std::function<void()>& kernel) {
  check(grid.x > 0 && grid.y > 0 && grid.z > 0, "an empty grid");
  check(grid.x < 1u << 31 && grid.y < 65536 && grid.z < 65536, "a grid that no card takes");
  check(threads > 0 && threads <= 1024 && threads % kLanes == 0, "threads that are no warps");
  check(shared <= kMostShared * emulated_size, "more shared memory than every card has");
  if (stack_count < size_t(threads)) {
    if (stacks) munmap(stacks, stack_count * kStack);
    stack_count = threads;
    stacks = static_cast<char*>(mmap(nullptr, stack_count * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    check(stacks != MAP_FAILED, "no memory for the fibers");
  }
  threads_of_block = threads;
  fibers.resize(threads);
  warps.assign(threads / kLanes, Warp());
  memory.resize(shared + kGuard + 1024);
  shared_size = shared;
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  shared_begin = memory.data() + (1024 - address % 1024) % 1024;
  body = &kernel;
  gridDim = grid;
  blockDim = dim3(threads);
  unsigned number = 0;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(number++ % 2 != 0);
      }
}

}  // namespace lorapar::emulator

static int multiprocessor_count = 132;
extern "C" void set_multiprocessors(int count) { multiprocessor_count = count; }

namespace lorapar {

using emulator::check;

int multiprocessors() { return multiprocessor_count; }

void cp_async(void* shared, const void* global, int bytes) {
  emulator::check_shared(shared, "cp.async to an odd place");
  check(reinterpret_cast<uintptr_t>(global) % 16 == 0, "cp.async from an odd address");
  check(bytes >= 0 && bytes <= 16, "cp.async of an odd size");
  std::memset(shared, 0xff, 16);
  emulator::fibers[emulator::current].open.push_back({shared, global, bytes});
}

void cp_async_commit() {
  emulator::Fiber& f = emulator::fibers[emulator::current];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void cp_async_wait_until(int left) {
  emulator::Fiber& f = emulator::fibers[emulator::current];
  while (f.groups.size() > size_t(left)) {
    for (const emulator::Copy& copy : f.groups.front()) {
      std::memset(copy.shared, 0, 16);
      if (copy.bytes) std::memcpy(copy.shared, copy.global, copy.bytes);
    }
    f.groups.pop_front();
  }
}

namespace {
template <typename T>
uint32_t times(uint32_t pair, uint32_t keep) {
  uint32_t out = 0;
  for (int i = 0; i < 2; ++i) {
    T one;
    uint16_t bits = uint16_t(pair >> 16 * i);
    std::memcpy(static_cast<void*>(&one), &bits, 2);
    one = T(float(one) * float((keep >> 16 * i) & 1));
    std::memcpy(&bits, &one, 2);
    out |= uint32_t(bits) << 16 * i;
  }
  return out;
}
}  // namespace
uint32_t times_keep(uint32_t pair, uint32_t keep, __half) { return times<__half>(pair, keep); }
uint32_t times_keep(uint32_t pair, uint32_t keep, __nv_bfloat16) {
  return times<__nv_bfloat16>(pair, keep);
}

}  // namespace lorapar
