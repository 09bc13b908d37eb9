// Drives a plugin library as TensorRT does: a command a line on stdin, one line of answer each, after a line
// `error "MESSAGE"` for everything that the library logged meanwhile.
//
// Tensors are words TYPE:SIZExSIZE, TYPE the number of a nvinfer1::DataType, a size -1 when a profile decides it.
// Fields are words NAME=i:INTEGER or NAME=s:FILE, the file's content being the string.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>

#include "fakes.h"

using namespace nvinfer1;

namespace {

using Words = std::vector<std::string>;

// Fields that own their names and data.
class Fields {
public:
    void add(const std::string& name, PluginFieldType type, const void* data, std::int32_t length, std::size_t bytes) {
        names_.push_back(name);
        const auto* begin = static_cast<const char*>(data);
        contents_.emplace_back(begin, begin + bytes);
        fields_.emplace_back(names_.back().c_str(), contents_.back().data(), type, length);
    }
    PluginFieldCollection collection() const { return {static_cast<std::int32_t>(fields_.size()), fields_.data()}; }

private:
    std::deque<std::string> names_;
    std::deque<std::vector<char>> contents_;
    std::vector<PluginField> fields_;
};

struct Tensor {
    DataType type;
    Dims dims;
};

Tensor tensor_of(const std::string& word) {
    std::istringstream stream(word);
    int type = 0;
    char separator = 0;
    stream >> type;
    Tensor made{static_cast<DataType>(type), {}};
    while (stream >> separator) stream >> made.dims.d[made.dims.nbDims++];
    return made;
}

Fields fields_of(const Words& words, std::size_t first) {
    Fields made;
    for (std::size_t i = first; i < words.size(); ++i) {
        const std::size_t equals = words[i].find('=');
        const std::string name = words[i].substr(0, equals), value = words[i].substr(equals + 3);
        if (words[i][equals + 1] == 'i') {
            const std::int32_t number = std::stoi(value);
            made.add(name, PluginFieldType::kINT32, &number, 1, sizeof number);
        } else {
            std::ifstream file(value, std::ios::binary);
            const std::string content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
            made.add(name, PluginFieldType::kCHAR, content.data(), static_cast<std::int32_t>(content.size()),
                     content.size());
        }
    }
    return made;
}

// Number of a word: decimal or 0x.
std::uintptr_t number_of(const std::string& word) { return std::stoull(word, nullptr, 0); }

class Harness {
public:
    explicit Harness(const char* path) {
        library_ = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library_) throw std::runtime_error(dlerror());
        reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library_, "setLoggerFinder"))(&finder);
        using GetCreators = IPluginCreatorInterface* const* (*)(std::int32_t&);
        std::int32_t count = 0;
        IPluginCreatorInterface* const* all = reinterpret_cast<GetCreators>(dlsym(library_, "getCreators"))(count);
        for (std::int32_t i = 0; i < count; ++i) creators_.push_back(static_cast<IPluginCreatorV3One*>(all[i]));
    }

    std::string answer(const Words& words) {
        const std::string& command = words.at(0);
        const Words rest(words.begin() + 1, words.end());
        if (command == "creators") return creators();
        if (command == "context") return setenv("CPM_STUB_CONTEXT", rest.at(0).c_str(), 1) ? "failed" : "ok";
        if (command == "create") return create(rest, TensorRTPhase::kBUILD);
        if (!plugin_) return "nothing";
        if (command == "clone") return replace(plugin_->clone());
        if (command == "attach") return replace(runtime().attachToContext(nullptr));
        if (command == "serialize") return serialize();
        if (command == "identity") return identity();
        if (command == "types") return types(rest);
        if (command == "shapes") return shapes(rest);
        if (command == "formats") return formats(rest);
        if (command == "aliases") return aliases();
        if (command == "configure") return std::to_string(configure(rest));
        if (command == "workspace") return workspace(rest);
        if (command == "change") return std::to_string(change(rest));
        if (command == "enqueue") return enqueue(rest);
        throw std::runtime_error("unknown command " + command);
    }

    LoggerFinder finder;

private:
    std::string creators() {
        std::ostringstream out;
        for (IPluginCreatorV3One* each : creators_) {
            out << each->getPluginName() << ' ' << each->getPluginVersion() << ' ' << each->getPluginNamespace();
            const PluginFieldCollection* fields = each->getFieldNames();
            for (std::int32_t i = 0; i < fields->nbFields; ++i) {
                out << ' ' << fields->fields[i].name << ':' << static_cast<int>(fields->fields[i].type);
            }
            out << " ; ";
        }
        return out.str();
    }

    std::string replace(IPluginV3* made) {
        plugin_.reset(made);
        return made ? "ok" : "null";
    }

    std::string create(const Words& words, TensorRTPhase phase) {
        creator_ = nullptr;
        for (IPluginCreatorV3One* each : creators_) {
            if (words.at(0) == each->getPluginName()) creator_ = each;
        }
        const Fields fields = fields_of(words, 2);
        const PluginFieldCollection collection = fields.collection();
        return replace(creator_->createPlugin(words.at(1).c_str(), &collection, phase));
    }

    // Through bytes of its own, as an engine does; the plugin that wrote them is gone when they are read.
    std::string serialize() {
        const PluginFieldCollection* from = runtime().getFieldsToSerialize();
        Fields stored;
        std::ostringstream out;
        for (std::int32_t i = 0; i < from->nbFields; ++i) {
            const PluginField& field = from->fields[i];
            const bool text = field.type == PluginFieldType::kCHAR;
            const std::size_t bytes = static_cast<std::size_t>(field.length) * (text ? 1 : sizeof(std::int32_t));
            stored.add(field.name, field.type, field.data, field.length, bytes);
            out << field.name << ' ';
            if (text) out << std::quoted(std::string(static_cast<const char*>(field.data), bytes)) << ' ';
            else out << *static_cast<const std::int32_t*>(field.data) << ' ';
        }
        plugin_.reset();
        const PluginFieldCollection collection = stored.collection();
        plugin_.reset(creator_->createPlugin("stored", &collection, TensorRTPhase::kRUNTIME));
        return out.str() + (plugin_ ? "ok" : "null");
    }

    std::string identity() {
        auto& core = *static_cast<IPluginV3OneCore*>(plugin_->getCapabilityInterface(PluginCapabilityType::kCORE));
        const InterfaceInfo info = build().getInterfaceInfo();
        std::ostringstream out;
        out << core.getPluginName() << ' ' << core.getPluginVersion() << ' ' << core.getPluginNamespace() << ' '
            << info.kind << ' ' << info.major << ' ' << build().getNbOutputs();
        return out.str();
    }

    std::string types(const Words& words) {
        std::vector<DataType> in, out(static_cast<std::size_t>(build().getNbOutputs()));
        for (const std::string& word : words) in.push_back(tensor_of(word).type);
        const auto inputs = static_cast<std::int32_t>(in.size());
        if (build().getOutputDataTypes(out.data(), build().getNbOutputs(), in.data(), inputs)) return "failed";
        std::string line;
        for (const DataType each : out) line += std::to_string(static_cast<int>(each)) + " ";
        return line;
    }

    // A size of an output as I.J: the one of input I, dimension J.
    std::string shapes(const Words& words) {
        std::deque<Size> sizes;
        std::vector<DimsExprs> in, out(static_cast<std::size_t>(build().getNbOutputs()));
        std::map<const IDimensionExpr*, std::string> names;
        for (const std::string& word : words) {
            const Dims dims = tensor_of(word).dims;
            DimsExprs made{dims.nbDims, {}};
            for (int axis = 0; axis < dims.nbDims; ++axis) {
                made.d[axis] = &sizes.emplace_back(dims.d[axis]);
                names[made.d[axis]] = std::to_string(in.size()) + "." + std::to_string(axis);
            }
            in.push_back(made);
        }
        Builder builder;
        if (build().getOutputShapes(in.data(), static_cast<std::int32_t>(in.size()), nullptr, 0, out.data(),
                                    build().getNbOutputs(), builder)) {
            return "failed";
        }
        std::string line;
        for (const DimsExprs& each : out) {
            for (int axis = 0; axis < each.nbDims; ++axis) line += (axis ? "x" : "") + names.at(each.d[axis]);
            line += " ";
        }
        return line;
    }

    std::vector<DynamicPluginTensorDesc> described(const Words& words) const {
        std::vector<DynamicPluginTensorDesc> made;
        for (const std::string& word : words) {
            const Tensor tensor = tensor_of(word);
            made.push_back({{tensor.dims, tensor.type, TensorFormat::kLINEAR, 1}, tensor.dims, tensor.dims, tensor.dims});
        }
        return made;
    }

    // For each tensor what it may be, as TYPE/FORMAT.
    std::string formats(const Words& words) {
        const auto inputs = static_cast<std::int32_t>(words.size());
        std::vector<DynamicPluginTensorDesc> all = described(words);
        all.resize(all.size() + static_cast<std::size_t>(build().getNbOutputs()));
        std::string line;
        for (std::int32_t position = 0; position < static_cast<std::int32_t>(all.size()); ++position) {
            for (int type = 0; type <= static_cast<int>(DataType::kINT4); ++type) {
                for (int format = 0; format <= static_cast<int>(TensorFormat::kHWC16); ++format) {
                    PluginTensorDesc& desc = all[static_cast<std::size_t>(position)].desc;
                    desc.type = static_cast<DataType>(type);
                    desc.format = static_cast<TensorFormat>(format);
                    if (build().supportsFormatCombination(position, all.data(), inputs, build().getNbOutputs())) {
                        line += std::to_string(type) + "/" + std::to_string(format) + ",";
                    }
                }
            }
            line += " ";
        }
        return line;
    }

    std::string aliases() {
        std::string line;
        for (std::int32_t i = 0; i < build().getNbOutputs(); ++i) {
            line += std::to_string(build().getAliasedInput(i)) + " ";
        }
        return line;
    }

    std::int32_t configure(const Words& words) {
        const auto in = described(words);
        return build().configurePlugin(in.data(), static_cast<std::int32_t>(in.size()), nullptr, 0);
    }

    std::string workspace(const Words& words) {
        const auto in = described(words);
        return std::to_string(build().getWorkspaceSize(in.data(), static_cast<std::int32_t>(in.size()), nullptr, 0));
    }

    std::int32_t change(const Words& words) {
        shapes_.clear();
        for (const auto& each : described(words)) shapes_.push_back(each.desc);
        return runtime().onShapeChange(shapes_.data(), static_cast<std::int32_t>(shapes_.size()), nullptr, 0);
    }

    // STREAM WORKSPACE, addresses of inputs, then of outputs.
    std::string enqueue(const Words& words) {
        std::vector<const void*> inputs;
        std::vector<void*> outputs;
        for (std::size_t i = 2; i < words.size(); ++i) {
            void* address = reinterpret_cast<void*>(number_of(words[i]));
            if (inputs.size() < shapes_.size()) inputs.push_back(address);
            else outputs.push_back(address);
        }
        return std::to_string(runtime().enqueue(shapes_.data(), nullptr, inputs.data(), outputs.data(),
                                                reinterpret_cast<void*>(number_of(words[1])),
                                                reinterpret_cast<cudaStream_t>(number_of(words[0]))));
    }

    IPluginV3OneBuildV2& build() {
        return *static_cast<IPluginV3OneBuildV2*>(plugin_->getCapabilityInterface(PluginCapabilityType::kBUILD));
    }
    IPluginV3OneRuntime& runtime() {
        return *static_cast<IPluginV3OneRuntime*>(plugin_->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    }

    void* library_;
    std::vector<IPluginCreatorV3One*> creators_;
    IPluginCreatorV3One* creator_ = nullptr;
    std::unique_ptr<IPluginV3> plugin_;
    std::vector<PluginTensorDesc> shapes_;
};

}  // namespace

int main(int, char** arguments) {
    Harness harness(arguments[1]);
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream stream(line);
        const Words words{std::istream_iterator<std::string>(stream), std::istream_iterator<std::string>()};
        const std::string answer = harness.answer(words);
        for (const std::string& each : harness.finder.logger.errors) std::cout << "error " << std::quoted(each) << '\n';
        harness.finder.logger.errors.clear();
        std::cout << "= " << answer << std::endl;
    }
}
