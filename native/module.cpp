// The Python module `twostroke._native`: every family of kernels binds itself here.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_program(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_limits(nb::module_& m);

NB_MODULE(_native, m) {
#if defined(TWOSTROKE_X86)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    throw nb::import_error("twostroke was built for x86-64-v3 and this processor lacks AVX2, FMA or "
                           "F16C");
  }
#endif
  bind_program(m);
  bind_sampling(m);
  bind_limits(m);
}
