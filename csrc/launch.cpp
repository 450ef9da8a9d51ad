// What `launch` and the kernels' configurations ask about the card, once for each.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace lorapar {
namespace {

constexpr int kDevices = 64;

// The attribute of the current device, kept in `known`, which holds one more than it, or 0.
int attribute(cudaDeviceAttr which, std::atomic<int> (&known)[kDevices]) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  bool kept = device < kDevices;
  if (kept) value = known[device].load(std::memory_order_relaxed);
  if (value > 0) return value - 1;
  cudaDeviceGetAttribute(&value, which, device);
  if (kept) known[device].store(value + 1, std::memory_order_relaxed);
  return value;
}

}  // namespace

// Whether the current device has programmatic dependent launch.
bool starts_early() {
  static std::atomic<int> known[kDevices] = {};
  return attribute(cudaDevAttrComputeCapabilityMajor, known) >= 9;
}

int multiprocessors() {
  static std::atomic<int> known[kDevices] = {};
  return attribute(cudaDevAttrMultiProcessorCount, known);
}

// Lets a kernel have this much shared memory, the same for all; asks the driver once for a kernel
// and a device.
void allow_shared(const void* kernel, int bytes) {
  constexpr int kPlaces = 1024;  // far more than there are kernels; a full table asks every time
  static std::atomic<uint64_t> known[kPlaces] = {};
  int device = 0;
  cudaGetDevice(&device);
  uint64_t key = reinterpret_cast<uint64_t>(kernel) ^ static_cast<uint64_t>(device + 1) << 48;
  for (int i = 0; i < kPlaces; ++i) {
    std::atomic<uint64_t>& place = known[(key / 16 + key / 65536 + i) % kPlaces];
    uint64_t found = place.load(std::memory_order_relaxed);
    if (found == key) return;
    if (found != 0) continue;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    place.compare_exchange_strong(found, key, std::memory_order_relaxed);
    return;
  }
}

}  // namespace lorapar
