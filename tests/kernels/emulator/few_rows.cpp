// A C name for csrc/few_rows.cu: runs where it takes the call, and tells whether. `cluster`: blocks
// of one.
#include "cluster.h"
#include "kernels.h"

using namespace lorapar;

extern "C" int emulated_few_rows(const DyProjection* dy, int dys, const XProjection* of_x, int xs,
                                 const void* x, int64_t stride_x, int64_t words, int64_t M,
                                 int64_t K, int R, float scale, int type, int cluster) {
  emulated_cluster = cluster;
  FewRows call{dy, dys, of_x, xs, {x, stride_x}, words, M, K, R, scale};
  bool takes = takes_few_rows(call, static_cast<Type>(type));
  if (takes) few_rows(call, static_cast<Type>(type), nullptr);
  return takes;
}
