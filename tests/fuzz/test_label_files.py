"""Lists of photos and names of classes, mutated: a data set of real files, or a DataError."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capt_deploy.core.errors import DataError
from capt_deploy.data.datasets import read_dataset

_ROWS = [("ape/1.png", "ape", "train"), ("bee/é.png", "bee", "test"), ("1.png", "cow", "val")]
_LISTS = {
    "a.csv": "\n".join(["path,label,split", *(",".join(row) for row in _ROWS)]),
    "a.jsonl": "\n".join(
        json.dumps({"path": p, "label": name, "split": split}) for p, name, split in _ROWS
    ),
    "split_zhou_a.json": json.dumps(
        {
            split: [[p, i, name] for i, (p, name, own) in enumerate(_ROWS) if own == split]
            for split in ("train", "val", "test")
        }
    ),
    "names.json": json.dumps({"ape": "great ape", "bee": "honey bee"}),
    "names.csv": "ape,great ape\nbee,honey bee\n",
}
_PIECES = [
    *(b"\0", b"\n", b'"', b",", b"\\", b"../", b"/", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b"["),
    *(b"{", b"1" * 5000, b"1e999", b"NaN", b"-1", b"null", b"[" * 3000, b"a" * 5000, b'"\\ud800"'),
    *(b"#TYPE x\n", b"ape/1.png", b"\xcc\x81", b"\r", b"\x1a", "\u2028".encode()),
]
edits = st.lists(
    st.tuples(
        st.floats(0, 1), st.integers(0, 12), st.sampled_from(_PIECES) | st.binary(max_size=6)
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for path, *_ in _ROWS:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).touch()
    (root.parent / "outside.png").touch()
    return root


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(_LISTS)), changes=edits)
def test_a_mutated_list_gives_files_of_its_folder_or_a_data_error(
    photos: Path, name: str, changes: list[tuple[float, int, bytes]]
) -> None:
    content = _LISTS[name].encode()
    for place, removed, inserted in changes:
        start = round(place * len(content))
        content = content[:start] + inserted + content[start + removed :]
    file = photos / name
    file.write_bytes(content)
    try:
        names = name.startswith("names")
        dataset = read_dataset(photos, file) if names else read_dataset(file)
    except DataError as error:
        assert name in str(error) or str(photos) in str(error)
        return
    finally:
        file.unlink()
    labels = range(len(dataset.class_names))
    assert len(set(dataset.class_names)) == len(labels) and all(dataset.class_names)
    "".join(dataset.class_names).encode()
    for items in dataset.splits.values():
        for item in items:
            assert item.label in labels
            assert dataset.path(item).resolve().is_relative_to(photos.resolve())
            item.path.encode()
