#include "kernels.h"

extern "C" void expand(const lorapar::ExpandProjection* of, int projections, int64_t M, int R,
                       int type) {
  lorapar::expand(of, projections, M, R, lorapar::Type(type), nullptr);
}
extern "C" void expand_dx(const lorapar::ExpandDx* call, int type) {
  lorapar::expand_dx(*call, lorapar::Type(type), nullptr);
}
