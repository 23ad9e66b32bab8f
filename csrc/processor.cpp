#include "processor.h"

#include <ATen/Version.h>

namespace vlmfast {
namespace {

std::string forced_schedule;

}  // namespace

std::string cpu_isa() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return "avx512";
  if (capability == "AVX2") return "avx2";
#endif
  return "baseline";
}

bool has_vnni() {
#if defined(__x86_64__)
  static const bool available = cpu_isa() == "avx512" && __builtin_cpu_supports("avx512vnni");
  return available;
#else
  return false;
#endif
}

bool has_bf16_products() {
#if defined(__x86_64__)
  static const bool available = cpu_isa() == "avx512" && __builtin_cpu_supports("avx512bf16");
  return available;
#else
  return false;
#endif
}

bool wants_bf16_schedule() { return forced_schedule.empty() ? has_bf16_products() : forced_schedule != "int16"; }

bool wants_int16_schedule() {
  return forced_schedule.empty() ? has_vnni() || cpu_isa() == "avx2" : forced_schedule == "int16";
}

// AMX is oneDNN's: it sets up what AMX needs of the system and of each thread.
bool wants_brgemm() {
#if defined(__x86_64__)
  static const bool amx = cpu_isa() == "avx512" && __builtin_cpu_supports("amx-bf16");
  return amx || forced_schedule == "brgemm";
#else
  return false;
#endif
}

void force_schedule(const std::string& name) { forced_schedule = name; }

}  // namespace vlmfast
