#include "tensorrt/cuda_driver.h"

#include <dlfcn.h>

namespace cpm_tensorrt {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

template <class Function>
void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
}

template <class Function>
void require(void* library, const char* name, Function& function) {
    find(library, name, function);
    if (!function) {
        throw Error(kLibrary, ": expected ", name, " (CUDA 12.0 or later), which it lacks; update the driver");
    }
}

CudaDriver load() {
    void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (!library) throw Error("expected the CUDA driver, got: ", dlerror());
    CudaDriver found;
    require(library, "cuCtxGetCurrent", found.ctx_get_current);
    require(library, "cuCtxGetDevice", found.ctx_get_device);
    require(library, "cuCtxGetId", found.ctx_get_id);
    require(library, "cuDeviceGetAttribute", found.device_get_attribute);
    require(library, "cuModuleLoadData", found.module_load_data);
    require(library, "cuModuleGetFunction", found.module_get_function);
    require(library, "cuFuncSetAttribute", found.func_set_attribute);
    require(library, "cuLaunchKernel", found.launch_kernel);
    require(library, "cuGetErrorName", found.get_error_name);
    find(library, "cuFuncLoad", found.func_load);
    return found;
}

}  // namespace

const CudaDriver& CudaDriver::get() {
    static const CudaDriver driver = load();
    return driver;
}

int CudaDriver::sm() const {
    CUdevice device = 0;
    int major = 0, minor = 0;
    check(ctx_get_device(&device), "device");
    check(device_get_attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "compute capability");
    check(device_get_attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "compute capability");
    return 10 * major + minor;
}

unsigned long long CudaDriver::context() const {
    CUcontext current = nullptr;
    check(ctx_get_current(&current), "context");
    if (!current) throw Error("expected a current CUDA context on this thread, got none");
    unsigned long long id = 0;
    check(ctx_get_id(current, &id), "context");
    return id;
}

std::string CudaDriver::name_of(CUresult result) const {
    const char* name = nullptr;
    if (get_error_name(result, &name) != CUDA_SUCCESS || !name) return text("error ", static_cast<int>(result));
    return name;
}

}  // namespace cpm_tensorrt
