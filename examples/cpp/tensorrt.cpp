// TensorRT 10 and later, with an engine that capt-build has built for this GPU.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "backend.hpp"
#include "errors.hpp"
#include "sha256.hpp"

namespace capt {
namespace {

constexpr int cache_format = 2;  // as capt_deploy.backends.tensorrt.cache
constexpr std::uintmax_t largest_engine = 1ull << 33;  // bytes

void check(cudaError_t result) {
    if (result != cudaSuccess) {
        throw BundleError(std::string("CUDA: ") + cudaGetErrorString(result));
    }
}

struct Free {
    void operator()(void* memory) const { cudaFree(memory); }
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};

/// Keeps the last error, which says why a call has failed.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kERROR) last_ = message;
    }
    [[noreturn]] void fail(const std::string& action) const {
        throw BundleError("TensorRT cannot " + action + ": " + last_);
    }

private:
    std::string last_ = "no reason given";
};

class TensorRT : public Backend {
public:
    TensorRT(const Bundle& bundle, const Engine& engine) : classes_(bundle.class_names.size()) {
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_) logger_.fail("start");
        runtime_->setEngineHostCodeAllowed(engine.with_code);
        engine_.reset(runtime_->deserializeCudaEngine(engine.plan.data(), engine.plan.size()));
        if (!engine_) logger_.fail("load the engine; build it again with capt-build");
        context_.reset(engine_->createExecutionContext());
        const nvinfer1::Dims4 shape(1, bundle.preprocess.height, bundle.preprocess.width, 3);
        if (!context_ || !context_->setInputShape("images", shape)) {
            logger_.fail("run one image; build the engine with --batch 1,8,32");
        }
        cudaStream_t stream = nullptr;
        check(cudaStreamCreate(&stream));
        stream_.reset(stream);
        for (int index = 0; index < engine_->getNbIOTensors(); ++index) {
            const std::string name = engine_->getIOTensorName(index);
            const nvinfer1::Dims dims = context_->getTensorShape(name.c_str());
            std::size_t bytes = name == "images" ? sizeof(std::uint8_t) : sizeof(float);
            for (int axis = 0; axis < dims.nbDims; ++axis) bytes *= dims.d[axis];
            if (name == "probabilities" && bytes != classes_ * sizeof(float)) {
                throw BundleError("the engine does not have the classes of the bundle");
            }
            void* memory = nullptr;
            check(cudaMalloc(&memory, bytes));
            buffers_[name].reset(memory);
            if (!context_->setTensorAddress(name.c_str(), memory)) logger_.fail("start");
        }
    }

    std::vector<float> run(const Bytes& pixels) override {
        std::vector<float> probabilities(classes_);
        cudaStream_t stream = stream_.get();
        check(cudaMemcpyAsync(buffers_.at("images").get(), pixels.data(), pixels.size(),
                              cudaMemcpyHostToDevice, stream));
        if (!context_->enqueueV3(stream)) logger_.fail("run the engine");
        check(cudaMemcpyAsync(probabilities.data(), buffers_.at("probabilities").get(),
                              classes_ * sizeof(float), cudaMemcpyDeviceToHost, stream));
        check(cudaStreamSynchronize(stream));
        return probabilities;
    }

private:
    // They are destroyed from the last to the first, as TensorRT asks: context, engine, runtime.
    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::map<std::string, std::unique_ptr<void, Free>> buffers_;
    std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Free> stream_;
    std::size_t classes_;
};

/// An entry of the cache is a line of JSON and the engine.
Engine parse_entry(const std::string& entry) {
    const std::size_t end = entry.find('\n');
    if (end == std::string::npos) throw BundleError("no engine of capt-build");
    const auto header = nlohmann::json::parse(entry.substr(0, end));
    const auto& key = header.at("key");
    Engine engine{entry.substr(end + 1), key.at("precision").get<std::string>(),
                  key.at("onnx").get<std::string>(), key.at("weights").get<std::string>(),
                  key.value("portable", "") == "version"};
    if (header.at("format") != cache_format || key.at("library") != "tensorrt") {
        throw BundleError("expected an engine of capt-build --backend tensorrt");
    }
    if (header.at("bytes") != engine.plan.size() || header.at("sha256") != sha256(engine.plan)) {
        throw BundleError("was changed; build it again");
    }
    return engine;
}

}  // namespace

Engine read_engine(const std::filesystem::path& path) {
    try {
        return parse_entry(read_file(path, largest_engine));
    } catch (const std::exception& error) {  // nlohmann::json throws types of its own
        throw BundleError(path.string() + ": " + error.what());
    }
}

std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle, const Engine& engine) {
    if (engine.graph_sha256 != bundle.graph_sha256 ||
        engine.weights_sha256 != bundle.weights_sha256) {
        throw BundleError("the engine was built from another bundle; build one with capt-build");
    }
    return std::make_unique<TensorRT>(bundle, engine);
}

}  // namespace capt
