"""The reader of MATLAB files, against files that SciPy wrote."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from declip_cli.data.benchmarks.matlab import read_mat, to_int
from declip_cli.errors import EvaluateError


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_numbers_of_every_type_come_back(tmp_path: Path, kind: str, is_compressed: bool):
    values = np.array([[1, 2, 100], [7, 0, 5]], dtype=kind)
    path = tmp_path / "x.mat"
    scipy.io.savemat(path, {"one": values, "two": np.array([[3]])}, do_compression=is_compressed)
    found = read_mat(path)
    np.testing.assert_array_equal(found["one"], values.flatten(order="F"))
    assert to_int(found["two"]) == 3


@pytest.mark.parametrize("is_compressed", [False, True])
def test_text_cells_and_structs_come_back(tmp_path: Path, is_compressed: bool):
    rows = np.zeros((1, 2), dtype=[("name", "O"), ("class", "O"), ("nested", "O")])
    rows[0, 0] = ("a.jpg", 5, {"inner": 1})
    rows[0, 1] = ("coupé.jpg", 300, {"inner": 2})
    cells = np.array(["AM General", "BMW ü", "x"], dtype=object)[None]
    path = tmp_path / "x.mat"
    scipy.io.savemat(path, {"rows": rows, "cells": cells, "text": "abc"}, do_compression=is_compressed)
    found = read_mat(path)
    assert found["cells"] == ["AM General", "BMW ü", "x"]
    assert found["text"] == "abc"
    assert found["rows"]["name"] == ["a.jpg", "coupé.jpg"]
    assert [to_int(value) for value in found["rows"]["class"]] == [5, 300]
    assert [to_int(value["inner"][0]) for value in found["rows"]["nested"]] == [1, 2]


def test_other_and_damaged_files_are_refused(tmp_path: Path):
    path = tmp_path / "x.mat"
    with pytest.raises(EvaluateError, match="cannot read"):
        read_mat(path)
    path.write_bytes(b"\x89HDF" + bytes(300))
    with pytest.raises(EvaluateError, match="not a MATLAB 5 file"):
        read_mat(path)
    scipy.io.savemat(path, {"x": np.arange(1000)}, do_compression=True)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(EvaluateError, match="is damaged"):
        read_mat(path)
    scipy.io.savemat(path, {"x": "text"})
    with pytest.raises(ValueError, match="a number was expected"):
        to_int(read_mat(path)["x"])
