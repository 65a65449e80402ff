// Intel's matrix unit (AMX): products of 16 rows by 16 columns, 32 bfloat16 deep, in one instruction; sums in float32.
//
// A process asks the system for it once; a thread sets the shapes of its eight tiles before a product and lets go of them after it, so
// other users of the unit (oneDNN) never meet ours. A tile of weights is 16 rows of 16 pairs: two inputs of 16 outputs, side by side.
#pragma once
#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define SWIFT_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Whether this process may use the unit.
inline bool amx_ready() {
    static const bool granted = [] {
        constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
    }();
    return granted;
}

// While it lives, tile i of this thread has rows[i] rows (0: it is not used) of bytes[i] bytes.
class Tiles {
   public:
    Tiles(const int (&rows)[8], const int (&bytes)[8]) {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; i++) shape.rows[i] = rows[i], shape.bytes[i] = rows[i] ? bytes[i] : 0;
        asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");  // GCC's own intrinsic reads but the first bytes of it
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

}  // namespace
#endif
