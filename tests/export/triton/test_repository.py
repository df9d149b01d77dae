"""The repository is checked against Triton's own schema and against what Triton checks on loading.

No Triton runs here. What its rules are is read from its sources: triton-inference-server/core,
`ensemble_utils.cc`, `model_config_utils.cc`, `label_provider.cc`.
"""

import hashlib
import json
import shutil
from pathlib import Path

import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from capt_deploy.bundle.manifest import METADATA_KEY
from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.errors import BundleError
from export.triton.repository import write_triton

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny.capt"
KINDS = {TensorProto.UINT8: "TYPE_UINT8", TensorProto.FLOAT: "TYPE_FP32"}


def read_config(path):
    return text_format.Parse(path.read_text(), ModelConfig())


def configs(repository):
    """All configurations by model, read by Triton's own schema, as its server reads them."""
    found = {file.parent.name: read_config(file) for file in repository.glob("*/config.pbtxt")}
    assert found.keys() == {folder.name for folder in repository.iterdir() if folder.is_dir()}
    return found


def described(tensors):
    return {t.name: (DataType.Name(t.data_type), tuple(t.dims)) for t in tensors}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    shutil.copytree(GOLDEN, folder / "pets.capt")
    return write_triton(open_bundle(folder / "pets.capt"), folder / "models")


@pytest.fixture
def altered(tmp_path):
    """Return a function that copies the golden bundle with another manifest and more files."""

    def alter(precisions=("fp32",), files=None, weights=None, **changes):
        folder = tmp_path / "pets.capt"
        shutil.copytree(GOLDEN, folder)
        manifest = json.loads((folder / "manifest.json").read_text()) | changes
        for precision in precisions:
            name = "model.onnx" if precision == "fp32" else f"model_{precision}.onnx"
            if not (folder / name).exists():
                model = onnx.load(GOLDEN / "model.onnx")
                model.graph.name = precision  # a graph of its own, for what it is worth here
                onnx.save(model, folder / name)
            own = {"file": name, "weights": weights}
            manifest["graphs"][precision] = manifest["graphs"]["fp32"] | own
            manifest["calibration"][precision] = manifest["calibration"]["fp32"]
        manifest["graphs"] = {name: manifest["graphs"][name] for name in precisions}
        for name, data in (files or {}).items():
            (folder / name).write_bytes(data)
        manifest["files"] = {
            file.name: {
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "bytes": file.stat().st_size,
            }
            for file in folder.iterdir()
            if file.name != "manifest.json"
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return open_bundle(folder)

    return alter


def test_every_model_has_the_name_of_its_folder_and_a_version(repository):
    found = configs(repository)
    assert set(found) == {"pets", "pets_onnx", "pets_tensorrt", "pets_preprocess"}
    for folder, config in found.items():
        assert config.name == folder
        assert list((repository / folder / "1").iterdir())  # git and object stores drop empty ones
    assert {name: config.platform for name, config in found.items()} == {
        "pets": "ensemble",
        "pets_onnx": "onnxruntime_onnx",
        "pets_tensorrt": "onnxruntime_onnx",
        "pets_preprocess": "",
    }
    assert found["pets_preprocess"].backend == "python"


@pytest.mark.parametrize("model", ["pets_onnx", "pets_tensorrt", "plan"])
def test_tensors_are_those_of_the_onnx_file(repository, model):
    if model == "plan":
        config = read_config(repository / "pets_tensorrt" / "configs" / "plan.pbtxt")
    else:
        config = configs(repository)[model]
        assert (repository / model / "1" / "model.onnx").read_bytes() == (
            GOLDEN / "model.onnx"
        ).read_bytes()
    graph = onnx.load(GOLDEN / "model.onnx").graph
    for tensors, values in ((config.input, graph.input), (config.output, graph.output)):
        shapes = {value.name: value.type.tensor_type for value in values}
        assert all(shape.shape.dim[0].dim_param for shape in shapes.values())
        assert described(tensors) == {
            name: (KINDS[kind.elem_type], tuple(dim.dim_value for dim in kind.shape.dim[1:]))
            for name, kind in shapes.items()
        }


def test_the_ensemble_connects_what_exists_with_the_same_types(repository):
    found = configs(repository)
    ensemble = found["pets"]
    known = described(ensemble.input)
    assert known == {"image": ("TYPE_STRING", (1,))}
    for step in ensemble.ensemble_scheduling.step:
        config = found[step.model_name]
        takes, gives = described(config.input), described(config.output)
        assert set(step.input_map) == set(takes)  # every input is fed
        assert set(step.output_map) <= set(gives)
        for own, tensor in step.input_map.items():
            assert known[tensor] == takes[own]
        known |= {tensor: gives[own] for own, tensor in step.output_map.items()}
        assert config.max_batch_size >= ensemble.max_batch_size
    for name, description in described(ensemble.output).items():
        assert known[name] == description
    assert set(described(ensemble.output)) == {"logits", "probabilities", "embedding"}
    assert not ensemble.instance_group
    assert not ensemble.HasField("dynamic_batching")


def test_class_names_are_in_the_order_of_the_columns(repository):
    names = open_bundle(GOLDEN).manifest.class_names
    labelled = 0
    for folder, config in configs(repository).items():
        for output in config.output:
            if output.label_filename:
                assert output.name == "probabilities"
                lines = (repository / folder / output.label_filename).read_bytes().split(b"\n")
                assert lines == [*(name.encode() for name in names), b""]
                assert len(names) == output.dims[0]
                labelled += 1
    assert labelled == 3


def test_batches_queue_and_instances(repository):
    found = configs(repository)
    for model in ("pets_onnx", "pets_tensorrt"):
        config = found[model]
        batching = config.dynamic_batching
        assert list(batching.preferred_batch_size) == [8, 32]
        assert max(batching.preferred_batch_size) <= config.max_batch_size == 32
        assert 0 < batching.max_queue_delay_microseconds < 10_000
    kinds = {
        name: [ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group]
        for name, config in found.items()
    }
    assert kinds == {
        "pets": [],
        "pets_onnx": ["KIND_AUTO"],  # on a GPU where there is one
        "pets_tensorrt": ["KIND_GPU"],
        "pets_preprocess": ["KIND_CPU"],
    }
    assert found["pets_preprocess"].instance_group[0].count > 1


def test_every_size_that_is_preferred_is_warmed_up_with_zeros(repository):
    for model in ("pets_onnx", "pets_tensorrt"):
        config = configs(repository)[model]
        sizes = [warmup.batch_size for warmup in config.model_warmup]
        assert sizes == [1, 8, 32]
        assert len({warmup.name for warmup in config.model_warmup}) == 3
        for warmup in config.model_warmup:
            assert set(warmup.inputs) == {"images"}
            given = warmup.inputs["images"]
            assert given.zero_data
            assert {"images": (DataType.Name(given.data_type), tuple(given.dims))} == described(
                config.input
            )


def test_tensorrt_gets_a_profile_and_keeps_the_types_of_the_graph(repository):
    config = configs(repository)["pets_tensorrt"]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    parameters = dict(accelerator.parameters)
    assert parameters.pop("trt_engine_cache_enable") == "1"
    assert parameters.pop("trt_engine_cache_path").startswith("/tmp/pets_")
    assert parameters == {
        "trt_profile_min_shapes": "images:1x16x16x3",
        "trt_profile_opt_shapes": "images:8x16x16x3",
        "trt_profile_max_shapes": "images:32x16x16x3",
    }


def cache_of(repository, model):
    config = read_config(repository / model / "config.pbtxt")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    return accelerator.parameters["trt_engine_cache_path"]


def test_other_weights_never_meet_the_engine_of_these(repository, altered, tmp_path):
    model = onnx.load(GOLDEN / "model.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = bytes(len(weight.raw_data))
    other = altered(files={"model.onnx": model.SerializeToString()})
    folder = write_triton(other, tmp_path / "models")
    assert cache_of(folder, "pets_tensorrt") != cache_of(repository, "pets_tensorrt")


def test_the_guide_names_every_model_and_builds_each_plan(repository):
    guide = (repository / "README.md").read_text()
    assert all(f"| {name} |" in guide for name in configs(repository))
    loaded = {word.split("=")[1] for word in guide.split() if word.startswith("--load-model=")}
    assert loaded == {"pets", "pets_preprocess", "pets_onnx"}  # all that runs without a GPU
    (command,) = [line.split() for line in guide.splitlines() if "trtexec" in line]
    options = dict(word.split("=") for word in command if "=" in word)
    assert (repository / options.pop("--onnx")).is_file()
    plan = repository / options.pop("--saveEngine")
    assert plan.parent.is_dir()
    assert read_config(plan.parents[1] / "configs" / "plan.pbtxt").platform == "tensorrt_plan"
    assert options == {
        "--minShapes": "images:1x16x16x3",
        "--optShapes": "images:8x16x16x3",
        "--maxShapes": "images:32x16x16x3",
    }


def test_further_precisions_are_served_beside_the_first(altered, tmp_path):
    folder = write_triton(altered(("fp16", "int8")), tmp_path / "models")
    found = configs(folder)
    assert set(found) == {
        *("pets", "pets_preprocess", "pets_onnx", "pets_tensorrt"),
        *("pets_int8_onnx", "pets_int8_tensorrt"),
    }
    graphs = {
        file.parents[1].name: onnx.load(file).graph.name for file in folder.glob("*/1/model.onnx")
    }
    assert graphs == {
        **dict.fromkeys(["pets_onnx", "pets_tensorrt"], "fp16"),
        **dict.fromkeys(["pets_int8_onnx", "pets_int8_tensorrt"], "int8"),
    }
    assert found["pets"].ensemble_scheduling.step[1].model_name == "pets_onnx"
    # all of ONNX Runtime's optimizations crash on half-precision ViTs
    assert found["pets_onnx"].optimization.graph.level == -1
    caches = {cache_of(folder, name) for name in ("pets_tensorrt", "pets_int8_tensorrt")}
    assert len(caches) == 2


def test_bfloat16_goes_to_tensorrt_alone(altered, tmp_path):
    folder = write_triton(altered(("bf16",)), tmp_path / "models")
    found = configs(folder)
    assert set(found) == {"pets", "pets_preprocess", "pets_tensorrt"}
    assert found["pets"].ensemble_scheduling.step[1].model_name == "pets_tensorrt"
    assert "pets_onnx" not in (folder / "README.md").read_text()


def test_int8_for_cpus_goes_to_onnx_runtime_alone_fully_optimised(altered, tmp_path):
    folder = write_triton(altered(("fp16", "int8-cpu")), tmp_path / "models")
    found = configs(folder)
    assert {name for name in found if "int8" in name} == {"pets_int8_cpu_onnx"}
    assert not found["pets_int8_cpu_onnx"].HasField("optimization")
    assert "int8_cpu_tensorrt" not in (folder / "README.md").read_text()


@pytest.fixture
def split(tmp_path):
    """The golden graph with its weights in `weights.bin`: the content of both files."""
    onnx.save_model(
        *(onnx.load(GOLDEN / "model.onnx"), tmp_path / "model.onnx"),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return [(tmp_path / name).read_bytes() for name in ("model.onnx", "weights.bin")]


def test_weights_outside_the_onnx_file_come_along(altered, split, tmp_path):
    graph, weights = split
    files = {"model.onnx": graph, "weights.bin": weights}
    bundle = altered(files=files, weights="weights.bin")
    folder = write_triton(bundle, tmp_path / "models")
    for name in ("pets_onnx", "pets_tensorrt"):
        assert (folder / name / "1" / "weights.bin").read_bytes() == weights
        onnx.checker.check_model(folder / name / "1" / "model.onnx")
    changed = tmp_path / "changed"
    shutil.rmtree(bundle.path)
    other = altered(files=files | {"weights.bin": bytes(len(weights))}, weights="weights.bin")
    write_triton(other, changed)
    assert cache_of(changed, "pets_tensorrt") != cache_of(folder, "pets_tensorrt")


def test_changed_weights_are_refused(altered, split, tmp_path):
    files = {"model.onnx": split[0], "weights.bin": split[1]}
    bundle = altered(files=files, weights="weights.bin")
    (bundle.path / "weights.bin").write_bytes(bytes(len(split[1])))
    with pytest.raises(BundleError, match=r"weights\.bin was changed"):
        write_triton(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(BundleError, match="already exists"):
        write_triton(open_bundle(GOLDEN), tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_class_name_with_a_line_break_is_refused(altered, tmp_path):
    names = ["blue sky", "green\nleaf", "grey stone", "red ball"]
    bundle = altered(class_names=names, confusion_pairs=[])
    with pytest.raises(BundleError, match=r"line by line, but 'green\\nleaf'"):
        write_triton(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_damaged_bundle_leaves_nothing_behind(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "x.capt")
    with (tmp_path / "x.capt" / "model.onnx").open("r+b") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(BundleError, match="not the file that was exported"):
        write_triton(open_bundle(tmp_path / "x.capt"), tmp_path / "models")
    assert [file.name for file in tmp_path.iterdir()] == ["x.capt"]


def test_a_zip_of_a_bundle_is_served_too(tmp_path):
    archive = shutil.make_archive(str(tmp_path / "pets"), "zip", GOLDEN)
    folder = write_triton(open_bundle(archive), tmp_path / "models")
    data = (folder / "pets_onnx" / "1" / "model.onnx").read_bytes()
    assert METADATA_KEY.encode() in data
