#include "kernels.h"

extern "C" size_t shrink_workspace(const lorapar::Shrink* call, int type) {
  return lorapar::shrink_workspace(*call, lorapar::Type(type));
}
extern "C" void shrink(const lorapar::Shrink* call, int type, void* workspace) {
  lorapar::shrink(*call, lorapar::Type(type), workspace, nullptr);
}
