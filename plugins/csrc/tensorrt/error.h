// Errors inside the library. None crosses its boundary: guarded() turns them into messages for TensorRT's logger.
#pragma once

#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensorrt/log.h"

namespace cpm_tensorrt {

// The parts of a message, one behind the other.
template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

// Says what, what was expected and what was found, and where there is one the next step.
class Error : public std::runtime_error {
public:
    template <class... Parts>
    explicit Error(const Parts&... parts) : std::runtime_error(text(parts...)) {}
};

// What body returns, or `failed` after a message that begins with `where`.
template <class Result, class Body>
Result guarded(const char* where, Result failed, const Body& body) noexcept {
    try {
        try {
            return body();
        } catch (const std::exception& error) {
            log_error(text(where, ": ", error.what()));
        }
    } catch (...) {  // the message itself did not fit into memory
        log_error("cpm-edge: out of memory");
    }
    return failed;
}

}  // namespace cpm_tensorrt
