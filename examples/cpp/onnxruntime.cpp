#include <onnxruntime_cxx_api.h>

#include <cstdlib>

#include "backend.hpp"
#include "errors.hpp"

namespace capt {
namespace {

Ort::SessionOptions session_options(const Bundle& bundle) {
    Ort::SessionOptions options;
    // Half-precision graphs crash ONNX Runtime 1.31 with all optimisations.
    const bool float32 = bundle.precision == "fp32" || bundle.precision == "int8-cpu";
    options.SetGraphOptimizationLevel(float32 ? ORT_ENABLE_ALL : ORT_ENABLE_BASIC);
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
    // Without this, external weights would be read from the current folder.
    const std::string weights = bundle.weights.empty() ? "/dev/null/none" : bundle.weights.string();
    options.AddConfigEntry("session.model_external_initializers_file_folder_path", weights.c_str());
    return options;
}

class OnnxRuntime : public Backend {
public:
    explicit OnnxRuntime(const Bundle& bundle)
        : environment_(ORT_LOGGING_LEVEL_ERROR, "capt"),
          session_(environment_, bundle.graph.data(), bundle.graph.size(), session_options(bundle)),
          shape_{1, bundle.preprocess.height, bundle.preprocess.width, 3},
          classes_(bundle.class_names.size()) {
        const auto type = session_.GetInputTypeInfo(0);
        const auto input = type.GetTensorTypeAndShapeInfo().GetShape();
        if (input.size() != 4 || !std::equal(input.begin() + 1, input.end(), shape_.begin() + 1)) {
            throw BundleError("the graph does not take the size of its manifest; export it again");
        }
    }

    std::vector<float> run(const Bytes& pixels) override {
        static const char* const inputs[] = {"images"};
        static const char* const outputs[] = {"probabilities"};
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        // ONNX Runtime does not write to an input.
        const auto images = Ort::Value::CreateTensor<std::uint8_t>(
            memory, const_cast<std::uint8_t*>(pixels.data()), pixels.size(), shape_.data(),
            shape_.size());
        const auto results =
            session_.Run(Ort::RunOptions{nullptr}, inputs, &images, 1, outputs, 1);
        const float* values = results[0].GetTensorData<float>();
        if (results[0].GetTensorTypeAndShapeInfo().GetElementCount() != classes_) {
            throw BundleError("the graph does not have the classes of its manifest");
        }
        return std::vector<float>(values, values + classes_);
    }

private:
    Ort::Env environment_;
    Ort::Session session_;
    std::vector<std::int64_t> shape_;
    std::size_t classes_;
};

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const Bundle& bundle) {
    // Since 1.29 ONNX Runtime reports its use to its maker, unless the environment forbids it.
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    return std::make_unique<OnnxRuntime>(bundle);
}

}  // namespace capt
