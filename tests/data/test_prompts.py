"""Prompts in files as people have them: lines, tables, JSON of several shapes."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffdistill.data.prompts import all_prompts
from diffdistill.errors import UserError


def written(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.TXT", "one\n\ntwo\n\n"),
        ("a.csv", "id,caption\n1,one\n2,two\n"),
        ("a.tsv", "Prompt\tCategory\tNote\none\tA, b\t\ntwo\tC\t\n"),
        ("a.tsv", '\ufeffprompt\n"one"\ntwo\n'),
        ("a.jsonl", '{"prompt": ["one", "uno"]}\n{"Caption": "two"}\n'),
        ("a.jsonl", '"one"\n\n"two"\n'),
        ("a.ndjson", '{"text": "one"}\n{"text": "two"}'),
        ("a.json", ["one", "two"]),
        ("a.json", [{"prompt": "one"}, {"caption": "two"}]),
        ("a.JSON", {"prompts": ["one", "two"]}),
        ("a.json", {"info": {"year": 2014}, "prompts": ["one", "two"]}),
        ("a.json", {"0a": {"prompt": "one", "category": "x"}, "0b": {"prompt": "two", "category": "x"}}),
        ("a.json", {"000": "one", "001": "two"}),
        ("a.json", {"info": {}, "images": [{"id": 1}], "annotations": [{"caption": "one"}, {"caption": "two"}]}),
    ],
)
def test_they_are_read(name: str, content: object, tmp_path: Path) -> None:
    assert all_prompts(written(tmp_path / name, content)) == ["one", "two"]


def test_an_object_with_a_prompt_is_one_prompt(tmp_path: Path) -> None:
    assert all_prompts(written(tmp_path / "a.json", {"prompt": "one", "negative_prompt": "two"})) == ["one"]


def test_blank_lines_are_kept_where_line_i_is_image_i(tmp_path: Path) -> None:
    assert all_prompts(written(tmp_path / "a.txt", "one\n\ntwo\n\n"), keep_blank=True) == ["one", "", "two"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "holds no prompt"),
        ({}, "holds no prompt"),
        ("3", "holds 3; give a list of prompts"),
        (["one", None], "entry 2 of .*a.json is no text"),
        (["one", 2], "entry 2 of .*a.json is no text"),
        ([["one"]], "entry 1 of .*a.json is no text"),
        ({"a": {"prompt": "one"}, "b": {"other": "two"}}, "entry 'b' of .*a.json is no text"),
        ({"prompts": ["one"], "captions": ["two"]}, "holds several lists; give one list of prompts"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(content: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as error:
        all_prompts(written(tmp_path / "a.json", content))
    assert str(error.value).startswith("prompts: ") and len(str(error.value)) < 280


def test_other_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"of no known kind; give a .csv .json .jsonl .ndjson .tsv .txt or .parquet file"
    ):
        all_prompts("prompts.docx")
