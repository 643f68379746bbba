"""Reading problem files, and the command ``labinfer pack``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from labinfer.cli.pack import pack as command
from labinfer.compiler.packing import Buffer, csvfile, read_problem
from labinfer.errors import DoesNotFit, Errors, InvalidFile, LabinferError

ROWS = "id,lower,upper,size\na,0,3,4\nb,3,9,4\nc,0,9,4\n"


@pytest.fixture
def problem(tmp_path: Path) -> Path:
    path = tmp_path / "problem.csv"
    path.write_text(ROWS)
    return path


def test_columns_may_come_in_any_order_with_others_between(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b'\xef\xbb\xbfsize, note,upper,id,lower\r\n4,x,3,"a",0\r\n\r\n5,,2,b,2\r\n')
    assert read_problem(path) == [Buffer("a", 0, 3, 4), Buffer("b", 2, 2, 5)]


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ("", "pack.header", 1, 1),
        ("id,lower,uper,size\n", "pack.header", 1, 1),
        ("id,lower,upper,size,size\n", "pack.header", 1, 1),
        (ROWS + "d,1,2\n", "pack.row", 5, 1),
        (ROWS + "d,1,two,3\n", "pack.number", 5, 5),
        (ROWS + "d,1,2,3.5\n", "pack.number", 5, 7),
        (ROWS + "d,1,2,-3\n", "pack.number", 5, 7),
        (ROWS + "d,1,2," + "9" * 5000 + "\n", "pack.number", 5, 7),
        (ROWS + "d,1,2,²\n", "pack.number", 5, 7),
        (ROWS + "d,5,2,3\n", "pack.lifetime", 5, 5),
        (ROWS + "a,1,2,3\n", "pack.duplicate-id", 5, 1),
    ],
)
def test_bad_files_are_reported_with_their_place(tmp_path: Path, text: str, code: str, line: int, column: int) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LabinferError) as caught:
        read_problem(path)
    error = caught.value.errors[0] if isinstance(caught.value, Errors) else caught.value
    assert error.place is not None
    assert (error.code, error.place.line, error.place.column, error.exit_code) == (code, line, column, 3)


def test_all_errors_of_a_file_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(ROWS + "d,1,2\ne,x,2,3\n")
    with pytest.raises(Errors) as caught:
        read_problem(path)
    assert [error.code for error in caught.value.errors] == ["pack.row", "pack.number"]


def test_unreadable_and_oversized_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"id,lower\n\xff\xfe")
    for path in (tmp_path / "absent.csv", tmp_path, binary):
        with pytest.raises(InvalidFile) as caught:
            read_problem(path)
        assert caught.value.code == "pack.unreadable"
    large = tmp_path / "large.csv"
    large.write_text(ROWS)
    monkeypatch.setattr(csvfile, "MAX_ROWS", 3)
    with pytest.raises(InvalidFile, match="too large"):
        read_problem(large)


@given(st.binary(max_size=200) | st.text(alphabet='id,lowerupsz0123456789-"\r\n', max_size=200).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_buffers_or_a_coded_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(b"id,lower,upper,size\n" + data)
    try:
        buffers = read_problem(path)
    except InvalidFile:
        return
    except Errors as several:
        buffers = []
        assert all(isinstance(error, InvalidFile) for error in several.errors)  # noqa: PT017
    assert all(buffer.size >= 0 and buffer.lower <= buffer.upper for buffer in buffers)


def test_json_holds_the_packing(problem: Path) -> None:
    result = CliRunner().invoke(command, [str(problem), "--capacity", "8", "--json"])
    assert result.exit_code == 0
    packing = json.loads(result.stdout)
    assert set(packing) == {"peak", "lower_bound", "optimal", "algorithm", "seconds", "offsets"}
    assert (packing["peak"], packing["lower_bound"], packing["optimal"]) == (8, 8, True)
    assert set(packing["offsets"]) == {"a", "b", "c"}


def test_a_capacity_below_the_bound_does_not_fit(problem: Path) -> None:
    result = CliRunner().invoke(command, [str(problem), "--capacity", "7"])
    assert isinstance(result.exception, DoesNotFit)
    assert "at least 8" in str(result.exception)
    assert not result.stdout
    result = CliRunner().invoke(command, [str(problem), "--capacity", "7", "--json"])
    assert result.exit_code == 4
    assert "at least 8" in result.stderr
    assert json.loads(result.stdout)["peak"] == 8


def test_the_table_shows_peak_and_bound(problem: Path) -> None:
    result = CliRunner().invoke(command, [str(problem)])
    assert result.exit_code == 0
    assert "8 bytes" in result.stdout
    assert "yes, proved" in result.stdout
