#include "kernels.h"

extern "C" void pack(const lorapar::PackProjection* of, int projections, int64_t K, int R, int type,
                     void* a_pack, void* b_pack, int64_t stride_b_pack, int8_t* valid,
                     const lorapar::Draw* draw) {
  lorapar::pack(of, projections, K, R, lorapar::Type(type), a_pack, b_pack, stride_b_pack, valid,
                *draw, nullptr);
}
