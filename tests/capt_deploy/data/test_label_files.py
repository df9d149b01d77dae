"""Files that list images: what is read, and which line is blamed."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.core.errors import DataError
from capt_deploy.data.label_files import Listing, Row, read_csv, read_jsonl, read_pairs, read_zhou


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_rows_keep_their_order_and_labels_are_sorted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'label,path\nzebra,b.jpg\n"cat, big",dir/a.jpg\n')
    assert read_csv(path) == Listing(
        ("cat, big", "zebra"),
        (Row("b.jpg", "zebra", None), Row("dir/a.jpg", "cat, big", None)),
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_and_line_ends_of_windows_are_taken(
    tmp_path: Path, start: bytes, newline: str
) -> None:
    table = newline.join(["path,label", "a.jpg,Käse", "", "b.jpg,dog", ""])
    lines = newline.join(
        ['{"path": "a.jpg", "label": "Käse"}', "", '{"path": "b.jpg", "label": "dog"}', ""]
    )
    expected = Listing(("Käse", "dog"), (Row("a.jpg", "Käse", None), Row("b.jpg", "dog", None)))
    assert read_csv(write(tmp_path, "a.csv", start + table.encode())) == expected
    assert read_jsonl(write(tmp_path, "a.jsonl", start + lines.encode())) == expected


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *(("train", "train"), ("Training", "train"), ("VAL", "val"), ("valid", "val")),
        *(("validation", "val"), ("Test", "test"), ("testing ", "test")),
    ],
)
def test_split_names_are_understood(tmp_path: Path, given: str, meant: str) -> None:
    table = write(tmp_path, "a.csv", f"path,label,split\na.jpg,cat,{given}\n")
    assert read_csv(table).rows == (Row("a.jpg", "cat", meant),)
    lines = write(
        tmp_path, "a.jsonl", json.dumps({"path": "a.jpg", "label": "cat", "split": given})
    )
    assert read_jsonl(lines).rows == (Row("a.jpg", "cat", meant),)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("path,label,split\na.jpg,cat,train\nb.jpg,cat,dev\n", "line 3: expected split.*'dev'"),
        ("path,label\n\n\na.jpg,\n", "line 4: expected the columns path and label"),
        ("path,label\n,cat\n", "line 2: expected the columns path and label"),
        ("file,class\na.jpg,cat\n", "line 2: expected the columns path and label.*'file'"),
        ("path,label,split\na.jpg,cat,train\nb.jpg,cat,\n", "some rows have a split and some have"),
        ("path,label\n../a.jpg,cat\n", r"line 2: '\.\./a\.jpg' leads out of"),
        ("path,label\n/etc/a.jpg,cat\n", "line 2: '/etc/a.jpg' leads out of"),
        ("path,label\n//etc/a.jpg,cat\n", "line 2: '//etc/a.jpg' leads out of"),
        ("path,label\nC:\\a.jpg,cat\n", "line 2: .*leads out of"),
        (b"path,label\na.jpg,K\xe4se\n", "not a readable UTF-8 file"),
    ],
)
def test_a_bad_csv_names_the_line_and_what_is_wrong(
    tmp_path: Path, content: str | bytes, named: str
) -> None:
    with pytest.raises(DataError, match=f"a\\.csv.*{named}"):
        read_csv(write(tmp_path, "a.csv", content))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"path": "a.jpg", "label": "cat"}\n\n{"path": \n', "line 3: not JSON"),
        ('{"path": ' + "1" * 5000 + "}", "line 1: not JSON"),
        ("[" * 200_000, "line 1: not JSON"),
        ('{"path": "a.jpg", "label": 1e999}', "line 1: not JSON"),
        ('\n\n["a.jpg", "cat"]\n', "line 3: expected"),
        ('\n\n{"path": "a.jpg"}\n', "line 3: expected the columns path and label"),
        ('\n{"path": "a.jpg", "label": null}\n', "line 2: expected the columns"),
        ('{"path": "a.jpg", "label": "cat", "split": "dev"}', "line 1: expected split.*'dev'"),
        ('\n{"path": "x/../../a.jpg", "label": "cat"}', "line 2: .*leads out of"),
        (b'{"path": "a.jpg", "label": "K\xe4se"}', "not a readable UTF-8 file"),
    ],
)
def test_a_bad_jsonl_names_the_line_and_what_is_wrong(
    tmp_path: Path, content: str | bytes, named: str
) -> None:
    with pytest.raises(DataError, match=f"a\\.jsonl.*{named}"):
        read_jsonl(write(tmp_path, "a.jsonl", content))


texts = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\\/:.\r", exclude_categories=["Cs"]),
    min_size=1,
).filter(str.strip)


@settings(deadline=None, max_examples=80)
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_jsonl_reads_any_text_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    lines = [json.dumps({"path": p, "label": n}, ensure_ascii=False) for p, n in rows]
    path = write(tmp_path_factory.mktemp("jsonl"), "a.jsonl", "\n".join(lines))
    # One class has one name, whichever of Unicode's forms a list is written in.
    expected = [(p, unicodedata.normalize("NFC", n)) for p, n in rows]
    assert [(row.path, row.label) for row in read_jsonl(path).rows] == expected


def test_a_number_is_a_label_too_even_zero(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"path": "a.jpg", "label": 0}')
    assert read_jsonl(path).labels == ("0",)


def test_paths_are_brought_to_one_form(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "path,label\n./x//a.jpg,cat\n")
    assert read_csv(path).rows[0].path == "x/a.jpg"


def test_pairs_are_read_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path, "names.csv", '\ufeffcat,Felis catus\n\n dog ,"Canis, big"\n')
    assert read_pairs(path) == {"cat": "Felis catus", "dog": "Canis, big"}


@pytest.mark.parametrize("content", ["cat\n", "cat,a\ndog,b,c\n"])
def test_a_row_that_is_no_pair_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"row \d: expected label,name"):
        read_pairs(write(tmp_path, "names.csv", content))


def test_a_label_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 2: 'cat' is named twice"):
        read_pairs(write(tmp_path, "names.csv", "cat,a\ncat,b\n"))


def test_a_list_made_on_windows_finds_its_files(tmp_path: Path) -> None:
    listing = read_csv(write(tmp_path, "list.csv", "path,label\nimages\\cat.jpg,cat\n"))
    assert [row.path for row in listing.rows] == ["images/cat.jpg"]
    with pytest.raises(DataError, match="leads out"):
        read_csv(write(tmp_path, "bad.csv", "path,label\n..\\cat.jpg,cat\n"))


def test_a_list_that_cannot_be_opened_is_a_data_error(tmp_path: Path) -> None:
    for read in (read_csv, read_jsonl):
        with pytest.raises(DataError, match="not a readable"):
            read(tmp_path)  # a folder


def test_pairs_of_a_missing_file_are_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv"):
        list(read_pairs(tmp_path / "gone.csv"))


def zhou(folder: Path, content: object) -> Path:
    return write(folder, "split_zhou_Pets.json", json.dumps(content))


def test_coop_labels_follow_their_numbers_and_images_lie_in_a_sibling(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images" / "z.jpg").touch()
    path = zhou(
        tmp_path,
        {"train": [["z.jpg", 1, "ape"]], "val": [], "test": [["a.jpg", 0, "zebra"]]},
    )
    (tmp_path / "images" / "a.jpg").touch()
    assert read_zhou(path) == Listing(
        ("zebra", "ape"),
        (Row("images/z.jpg", "ape", "train"), Row("images/a.jpg", "zebra", "test")),
    )


def test_coop_images_may_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    path = zhou(tmp_path, {"train": [["a.jpg", 0, "ape"]]})
    assert read_zhou(path).rows == (Row("a.jpg", "ape", "train"),)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([], "keys train, val and test"),
        ({"train": [], "dev": []}, "keys train, val and test"),
        ({"train": 5}, "list of images for 'train'"),
        ({"train": "a0b"}, "list of images for 'train'"),
        ({"train": [["a.jpg", 0]]}, "expected .path, label, class name., came .'a.jpg', 0."),
        ({"train": [["a.jpg", "x", "ape"]]}, "expected .path, label, class name."),
        ({"train": [["a.jpg", 0, "ape"], ["a.jpg", 0, "bee"]]}, "label 0 is both 'ape' and 'bee'"),
        (
            {"train": [["gone.jpg", 0, "ape"]]},
            "none of its 1 image lies beside the file or in .*first for .*/gone.jpg",
        ),
        ({"train": [["a.jpg", 0, "ape"], ["../b.jpg", 0, "ape"]]}, "'../b.jpg' leads out of"),
        ({"train": [["a.jpg", 0, "ape"], ["//etc/b", 0, "ape"]]}, "'/etc/b' leads out of"),
    ],
)
def test_a_bad_coop_split_is_told_what_is_wrong(
    tmp_path: Path, content: object, named: str
) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=f"split_zhou_Pets.json.*{named}"):
        read_zhou(zhou(tmp_path, content))


def windows_zhou(folder: Path, separator: str, lead: str = "", encoding: str = "utf-8") -> Path:
    """Write a split with an image of each class, and the images; return the file."""
    for name in ("apple", "bear"):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / "1.png").touch()
    rows = [[f"{lead}{name}{separator}1.png", i, name] for i, name in enumerate(("apple", "bear"))]
    path = folder / "split_zhou_A.json"
    path.write_text(json.dumps({"train": rows, "test": []}), encoding=encoding)
    return path


@pytest.mark.parametrize(("separator", "lead"), [("/", ""), ("\\", ""), ("\\", "\\"), ("/", "/")])
def test_a_split_of_coop_may_come_from_windows(tmp_path: Path, separator: str, lead: str) -> None:
    listing = read_zhou(windows_zhou(tmp_path, separator, lead))
    assert [row.path for row in listing.rows] == ["images/apple/1.png", "images/bear/1.png"]


def test_the_folder_of_a_split_of_coop_is_that_of_any_image(tmp_path: Path) -> None:
    path = windows_zhou(tmp_path, "/")
    (tmp_path / "images" / "apple" / "1.png").unlink()
    assert [row.path for row in read_zhou(path).rows][1] == "images/bear/1.png"
    (tmp_path / "images" / "bear" / "1.png").unlink()
    with pytest.raises(DataError, match=r"none of its 2 images lies .* looked first for .*/apple"):
        read_zhou(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_a_list_from_powershell_is_read(tmp_path: Path, encoding: str) -> None:
    text = '#TYPE System.Management\r\n"path","label"\r\n"a.jpg","Käse"\r\n'
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = write(tmp_path, "a.csv", (mark + text).encode(encoding))
    assert read_csv(path).rows == (Row("a.jpg", "Käse", None),)
