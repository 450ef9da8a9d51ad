#include "cluster.h"
#include "kernels.h"

// Most blocks of a cluster, as on sm_90; 1 as on older cards.
extern "C" void set_cluster(int blocks) { lorapar::emulated_cluster = blocks; }

extern "C" size_t shrink_workspace(const lorapar::Shrink* call, int type) {
  return lorapar::shrink_workspace(*call, lorapar::Type(type));
}
extern "C" void shrink(const lorapar::Shrink* call, int type, void* workspace) {
  lorapar::shrink(*call, lorapar::Type(type), workspace, nullptr);
}
