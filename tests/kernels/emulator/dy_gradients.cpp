// A C name for csrc/dy_gradients.cu: gives the bytes of the workspace, and runs where there is one.
#include "kernels.h"

using namespace lorapar;

extern "C" size_t emulated_dy_gradients(const DyProjection* of, int projections, int64_t M, int R,
                                        float scale, int type, const int32_t* bounds, int count,
                                        void* workspace) {
  Type t = static_cast<Type>(type);
  if (workspace)
    dy_gradients(of, projections, M, R, scale, t, {bounds, count}, workspace, nullptr);
  return dy_gradients_workspace(of, projections, M, R, t, {bounds, count});
}
