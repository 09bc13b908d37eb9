// Messages to the logger that TensorRT gives the library, or to stderr while it gives none.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace cpm_tensorrt {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

void log_error(const char* message) noexcept;
inline void log_error(const std::string& message) noexcept { log_error(message.c_str()); }

}  // namespace cpm_tensorrt
