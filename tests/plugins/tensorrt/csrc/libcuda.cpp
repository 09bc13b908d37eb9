// A CUDA driver without a GPU, as libcuda.so.1: it reads real cubins and records what would be launched.
//
// CPM_STUB_RECORD names the file that gets a line of JSON for each call. CPM_STUB_SM is the device's compute
// capability (87), CPM_STUB_CONTEXT the current context's id or 0 for none (1), CPM_STUB_FAIL a function that fails.
#include <cuda.h>
#include <elf.h>

#undef cuLaunchKernel

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

struct Function {
    std::string name;
    std::string module;             // hash of the cubin
    std::vector<unsigned> offsets;  // of parameters, by ordinal
    std::vector<unsigned> sizes;
    int largest_shared = 48 << 10;
};

struct Module {
    const unsigned char* image;
    std::string hash;
};

const char* setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value ? value : otherwise;
}

bool fails(const char* name) { return !std::strcmp(setting("CPM_STUB_FAIL", ""), name); }

int sm() { return std::atoi(setting("CPM_STUB_SM", "87")); }

void record(const std::string& line) {
    if (std::FILE* file = std::fopen(setting("CPM_STUB_RECORD", "/dev/null"), "a")) {
        std::fprintf(file, "{%s}\n", line.c_str());
        std::fclose(file);
    }
}

const Elf64_Shdr* sections(const unsigned char* image, unsigned& count) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header);
    count = header.e_shnum;
    return reinterpret_cast<const Elf64_Shdr*>(image + header.e_shoff);
}

const char* section_name(const unsigned char* image, const Elf64_Shdr* all, const Elf64_Shdr& section) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header);
    return reinterpret_cast<const char*>(image + all[header.e_shstrndx].sh_offset + section.sh_name);
}

// Of all bytes up to the end of the last section or table: FNV-1a, 64 bits.
std::string hash_of(const unsigned char* image) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header);
    std::size_t end = header.e_shoff + std::size_t{header.e_shnum} * header.e_shentsize;
    end = std::max(end, header.e_phoff + std::size_t{header.e_phnum} * header.e_phentsize);
    unsigned long long hash = 14695981039346656037ull;
    for (std::size_t i = 0; i < end; ++i) hash = (hash ^ image[i]) * 1099511628211ull;
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", hash);
    return text;
}

// Parameters as ptxas states them in .nv.info.NAME: attribute 0x17 (KPARAM_INFO) is index, ordinal, offset and, from
// bit 18 of the last word, the size.
bool read_parameters(const unsigned char* image, Function& function) {
    unsigned count = 0;
    const Elf64_Shdr* all = sections(image, count);
    for (unsigned i = 0; i < count; ++i) {
        if (section_name(image, all, all[i]) != ".nv.info." + function.name) continue;
        const unsigned char* at = image + all[i].sh_offset;
        const unsigned char* end = at + all[i].sh_size;
        while (at + 4 <= end) {
            const unsigned format = at[0], attribute = at[1];
            unsigned short size = 0;
            std::memcpy(&size, at + 2, sizeof size);
            if (format == 4 && attribute == 0x17) {
                unsigned short ordinal = 0, offset = 0;
                unsigned flags = 0;
                std::memcpy(&ordinal, at + 8, sizeof ordinal);
                std::memcpy(&offset, at + 10, sizeof offset);
                std::memcpy(&flags, at + 12, sizeof flags);
                if (function.sizes.size() <= ordinal) {
                    function.sizes.resize(ordinal + 1u);
                    function.offsets.resize(ordinal + 1u);
                }
                function.sizes[ordinal] = flags >> 18;
                function.offsets[ordinal] = offset;
            }
            at += format == 4 ? 4u + size : 4u;
        }
        return true;
    }
    return false;
}

CUresult launch(Function& function, const unsigned* grid, const unsigned* block, unsigned shared, CUstream stream,
                void** arguments) {
    if (fails("cuLaunchKernel")) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    if (shared > static_cast<unsigned>(function.largest_shared)) return CUDA_ERROR_INVALID_VALUE;
    char text[256];
    std::snprintf(text, sizeof text,
                  "\"call\":\"launch\",\"kernel\":\"%s\",\"module\":\"%s\",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],"
                  "\"shared\":%u,\"stream\":%llu,\"arguments\":[",
                  function.name.c_str(), function.module.c_str(), grid[0], grid[1], grid[2], block[0], block[1],
                  block[2], shared, static_cast<unsigned long long>(reinterpret_cast<std::uintptr_t>(stream)));
    std::string line = text;
    for (std::size_t i = 0; i < function.sizes.size(); ++i) {
        line += i ? ",\"" : "\"";
        const auto* bytes = static_cast<const unsigned char*>(arguments[i]);
        for (unsigned byte = 0; byte < function.sizes[i]; ++byte) {
            std::snprintf(text, sizeof text, "%02x", bytes[byte]);
            line += text;
        }
        line += "\"";
    }
    record(line + "]");
    return CUDA_SUCCESS;
}

int context = 0;  // its address is the context

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 12060, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* found, CUdevice) {
    return *found = reinterpret_cast<CUcontext>(&context), CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* found) {
    const bool none = !std::strcmp(setting("CPM_STUB_CONTEXT", "1"), "0");
    return *found = none ? nullptr : reinterpret_cast<CUcontext>(&context), CUDA_SUCCESS;
}
CUresult cuCtxGetId(CUcontext, unsigned long long* id) {
    return *id = std::strtoull(setting("CPM_STUB_CONTEXT", "1"), nullptr, 10), CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
    return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void*, CUpointer_attribute, CUdeviceptr) { return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = sm() / 10; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = sm() % 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 163 << 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 164 << 10; break;
        default: *value = 32;
    }
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    if (fails("cuModuleLoadData")) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    const auto* bytes = static_cast<const unsigned char*>(image);
    if (std::memcmp(bytes, ELFMAG, SELFMAG) != 0) return CUDA_ERROR_INVALID_IMAGE;
    // A function's parameters are read later, when the caller may have dropped the image: keep a copy.
    unsigned count = 0;
    const Elf64_Shdr* all = sections(bytes, count);
    std::size_t end = static_cast<std::size_t>(reinterpret_cast<const unsigned char*>(all + count) - bytes);
    for (unsigned i = 0; i < count; ++i) {
        if (all[i].sh_type != SHT_NOBITS) end = std::max<std::size_t>(end, all[i].sh_offset + all[i].sh_size);
    }
    auto* copy = new unsigned char[end];
    std::memcpy(copy, bytes, end);
    const std::string hash = hash_of(bytes);
    *module = reinterpret_cast<CUmodule>(new Module{copy, hash});
    record("\"call\":\"load\",\"module\":\"" + hash + "\"");
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* found, CUmodule module, const char* name) {
    const auto* loaded = reinterpret_cast<const Module*>(module);
    auto* function = new Function{name, loaded->hash, {}, {}};
    if (!read_parameters(loaded->image, *function)) return CUDA_ERROR_NOT_FOUND;
    *found = reinterpret_cast<CUfunction>(function);
    return CUDA_SUCCESS;
}
CUresult cuFuncLoad(CUfunction) { return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        reinterpret_cast<Function*>(function)->largest_shared = value;
    }
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void** arguments, void**) {
    const unsigned grid[]{x, y, z}, block[]{block_x, block_y, block_z};
    return launch(*reinterpret_cast<Function*>(function), grid, block, shared, stream, arguments);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
    const unsigned grid[]{config->gridDimX, config->gridDimY, config->gridDimZ};
    const unsigned block[]{config->blockDimX, config->blockDimY, config->blockDimZ};
    if (config->numAttrs) return CUDA_ERROR_NOT_SUPPORTED;
    return launch(*reinterpret_cast<Function*>(function), grid, block, config->sharedMemBytes, config->hStream,
                  arguments);
}
CUresult cuOccupancyMaxActiveClusters(int*, CUfunction, const CUlaunchConfig*) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuGetErrorName(CUresult result, const char** name) {
    static const std::map<int, const char*> names{{CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
                                                  {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                                                  {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
                                                   "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"}};
    const auto found = names.find(result);
    *name = found == names.end() ? nullptr : found->second;
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult result, const char** text) { return cuGetErrorName(result, text); }

}  // extern "C"
