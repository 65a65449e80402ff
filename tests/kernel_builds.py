"""The kernels as machines with fewer instructions build them: name -> compiler flags. What this machine cannot run is not in RUN."""

from __future__ import annotations

import platform

from swiftlite.kernels.build import cpu_name

X86 = platform.machine() == "x86_64"
AVX2: tuple[str, ...] = ("-mavx2", "-mfma") if X86 else ()
RUN = {"avx2": AVX2}
if "amx_bf16" in cpu_name():
    RUN["no matrix unit"] = ("-march=native", "-mno-amx-bf16")
COMPILE = {"skylake": ("-march=skylake-avx512",), "cooper lake": ("-march=cooperlake",), "sapphire rapids": ("-march=sapphirerapids",)}
