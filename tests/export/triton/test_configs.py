from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig

from export.triton.configs import to_pbtxt


def parsed(message):
    return text_format.Parse(to_pbtxt(message), ModelConfig())


@given(st.text())
def test_any_string_is_read_back(text):
    assert parsed({"name": text}).name == text


@given(st.dictionaries(st.text(), st.text()), st.lists(st.integers(-1, 2**31 - 1)), st.booleans())
def test_maps_lists_and_flags_are_read_back(mapping, numbers, flag):
    parameters = [{"key": key, "value": {"string_value": v}} for key, v in mapping.items()]
    inputs = [{"name": "a", "dims": numbers}, {"name": "b", "optional": flag}]
    config = parsed({"input": inputs, "parameters": parameters})
    assert {key: value.string_value for key, value in config.parameters.items()} == mapping
    assert [entry.name for entry in config.input] == ["a", "b"]
    assert list(config.input[0].dims) == numbers
    assert config.input[1].optional is flag


def test_enumerations_have_no_quotes_and_strings_of_the_same_letters_do():
    printed = to_pbtxt({"name": "KIND_GPU", "instance_group": {"kind": "KIND_GPU"}})
    assert printed == 'name: "KIND_GPU"\ninstance_group {\n  kind: KIND_GPU\n}\n'


def test_an_empty_list_prints_nothing():
    assert to_pbtxt({"input": [], "max_batch_size": 0}) == "max_batch_size: 0\n"
