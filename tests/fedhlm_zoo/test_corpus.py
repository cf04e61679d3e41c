"""Reading AG News from folders, and saying clearly what is wrong with them."""

import gzip
from pathlib import Path

import pytest

from fedhlm.errors import DataMissing
from fedhlm_zoo.corpus import find_data, load_ag_news, load_news

ROWS = '"1","A title","Some, text"\n"4","","Chips ""n"" code"\n'


def folder(root: Path, content: str = ROWS, name: str = "train.csv") -> Path:
    (root / "ag_news").mkdir(parents=True)
    (root / "ag_news" / name).write_text(content)
    return root


def test_rows_become_articles_and_documents(tmp_path: Path) -> None:
    first, second = load_ag_news("train", folder(tmp_path))
    assert first.document == "A title\nSome, text\nTopic: World"
    assert second.document == 'Chips "n" code\nTopic: Technology'


def test_gzip_and_the_inner_folder_are_accepted(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "test.csv.gz", "wt") as file:
        file.write(ROWS)
    assert [a.topic for a in load_ag_news("test", tmp_path)] == ["World", "Technology"]


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHLM_DATA", str(folder(tmp_path / "here")))
    assert find_data(None) == tmp_path / "here"
    assert len(load_ag_news("train")) == 2


@pytest.mark.parametrize("row", ['"5","a","b"', '"1","a"', '"1","a","b","c"', '"World","a","b"'])
def test_a_bad_row_is_reported_by_file_and_line(tmp_path: Path, row: str) -> None:
    with pytest.raises(DataMissing, match=r"line 3 of train\.csv "):
        load_ag_news("train", folder(tmp_path, ROWS + row + "\n"))


def test_missing_data_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="has no ag_news/ folder"):
        load_ag_news("train", tmp_path)
    with pytest.raises(DataMissing, match=r"no test\.csv\.gz"):
        load_ag_news("test", folder(tmp_path / "data"))
    with pytest.raises(DataMissing, match="must be 'train' or 'test'"):
        load_ag_news("dev", tmp_path)


def test_news_documents_are_split_at_blank_lines(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "news_text").mkdir()
    with gzip.open(tmp_path / "news_text" / "bbc_news.txt.gz", "wt") as file:
        file.write("One\nmore\n\n\n\nTwo\n")
    assert load_news(tmp_path) == ["One\nmore", "Two"]
    assert load_news(tmp_path, ("abc_news_au",)) == []
