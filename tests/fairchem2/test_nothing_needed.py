"""`fairchem-scd export` and `import` on fairchem 2.x say that there is nothing to do, and write nothing."""

from __future__ import annotations

import pytest

from tests.fairchem2.command_line import fairchem_scd


@pytest.mark.parametrize("given", ["final", "final/inference_ckpt.pt"])
def test_export_names_the_file_that_is_plain_already(given, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "inference_ckpt.pt").write_bytes(b"weights")
    result = fairchem_scd("export", tmp_path / given, tmp_path / "out.pt", code=1)
    assert f"{tmp_path}/final/inference_ckpt.pt is plain as the run wrote it" in result.output
    assert not (tmp_path / "out.pt").exists()


def test_export_of_what_is_not_there_is_an_error(tmp_path):
    assert "No such file" in fairchem_scd("export", tmp_path / "none", tmp_path / "out.pt", code=1).output
    (tmp_path / "empty").mkdir()
    assert "save_inference_ckpt" in fairchem_scd("export", tmp_path / "empty", tmp_path / "out.pt", code=1).output


def test_import_says_why_there_is_nothing_to_import(tmp_path):
    result = fairchem_scd("import", tmp_path / "dens.pt", tmp_path / "out.pt", code=1)
    assert "nothing has to be imported" in result.output
