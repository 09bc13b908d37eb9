// What IPluginRegistry::loadLibrary of TensorRT 10 looks up in a library by name.
#include <NvInferRuntime.h>

#include <memory>
#include <vector>

#include "tensorrt/creator.h"
#include "tensorrt/error.h"

#define CPM_EXPORT extern "C" __attribute__((visibility("default")))

CPM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { cpm_tensorrt::set_logger_finder(finder); }

CPM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    using Creators = std::vector<nvinfer1::IPluginCreatorInterface*>;
    count = 0;
    return cpm_tensorrt::guarded<nvinfer1::IPluginCreatorInterface* const*>("cpm-edge", nullptr, [&] {
        // They live as long as the process: registries that outlast static objects hold them.
        static const Creators& creators = *[] {
            auto made = std::make_unique<Creators>();
            for (const cpm_tensorrt::Op& op : cpm_tensorrt::ops()) made->push_back(new cpm_tensorrt::Creator(op));
            return made.release();
        }();
        count = static_cast<std::int32_t>(creators.size());
        return creators.data();
    });
}
