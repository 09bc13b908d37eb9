// nlohmann/json for files that must load on JetPack 6.2, whose glibc is 2.35: include it first. From 2.38 on glibc's
// headers put functions that only it has in the place of strtoull and its like, unless this is 0.
#pragma once

#include <features.h>

#undef __GLIBC_USE_C2X_STRTOL
#define __GLIBC_USE_C2X_STRTOL 0
#undef __GLIBC_USE_C23_STRTOL
#define __GLIBC_USE_C23_STRTOL 0

#define JSON_NO_IO
#include <nlohmann/json.hpp>

namespace cpm_tensorrt {

using Json = nlohmann::json;

}  // namespace cpm_tensorrt
