// The CUDA driver's functions that launch kernels, found in libcuda.so.1 when they are first needed: the library has
// no undefined CUDA symbol, so it loads on machines without a GPU.
#pragma once

#include <cuda.h>

#include "tensorrt/error.h"

namespace cpm_tensorrt {

struct CudaDriver {
    decltype(&cuCtxGetCurrent) ctx_get_current = nullptr;
    decltype(&cuCtxGetDevice) ctx_get_device = nullptr;
    decltype(&cuCtxGetId) ctx_get_id = nullptr;
    decltype(&cuDeviceGetAttribute) device_get_attribute = nullptr;
    decltype(&cuModuleLoadData) module_load_data = nullptr;
    decltype(&cuModuleGetFunction) module_get_function = nullptr;
    decltype(&cuFuncSetAttribute) func_set_attribute = nullptr;
    decltype(&cuLaunchKernel) launch_kernel = nullptr;
    decltype(&cuGetErrorName) get_error_name = nullptr;
    // CUDA 12.4 and later: loads a function at once, which lazy loading would put off to the first launch.
    decltype(&cuFuncLoad) func_load = nullptr;

    // Throws Error when there is no driver or it lacks a function; the next call tries again.
    static const CudaDriver& get();

    // Throws Error unless the result is success.
    template <class... Parts>
    void check(CUresult result, const Parts&... what) const {
        if (result != CUDA_SUCCESS) throw Error(what..., ": the CUDA driver says ", name_of(result));
    }

    // Of the calling thread, like 87.
    int sm() const;

    // The current context's id, which unlike its address no later context gets.
    unsigned long long context() const;

private:
    std::string name_of(CUresult result) const;
};

}  // namespace cpm_tensorrt
