// A C name for csrc/x_gradients.cu: gives the bytes of the workspace, and runs where there is one.
#include "kernels.h"

using namespace lorapar;

extern "C" size_t emulated_x_gradients(const XProjection* of, int projections, const void* x,
                                       int64_t stride_x, int64_t words, int64_t M, int64_t K, int R,
                                       int type, const int32_t* bounds, int count,
                                       void* workspace) {
  Type t = static_cast<Type>(type);
  if (workspace)
    x_gradients(of, projections, {x, stride_x}, words, M, K, R, t, {bounds, count}, workspace,
                nullptr);
  return x_gradients_workspace(of, projections, M, K, R, t, {bounds, count});
}
