"""What a workspace keeps for several commands at once: lines that are appended, and directories that one of them clears."""

import pytest

from fastq.errors import ConfigurationError
from fastq.workspace import Workspace, check_target, json_lines
from pipelines import turn


def test_a_line_that_a_crash_cut_off_does_not_take_the_next_one_with_it(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.record("ada", "promote", version="1")
    with workspace.audit.open("a") as log:
        log.write('{"at": "2026-03-01T03:0')
    workspace.record("ada", "rollback", version="2")
    workspace.record("ada", "pause", policy=None)
    assert [line["action"] for line in json_lines(workspace.audit)] == ["promote", "rollback", "pause"]


def test_a_retraining_clears_what_retrainings_left_and_no_batch_under_way(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.make(workspace.runs / "an old turn", workspace.batch)
    piece = workspace.batch / "piece.parquet"
    piece.write_bytes(b"decided")
    turn.forget(workspace)
    assert list(workspace.runs.iterdir()) == []
    assert piece.read_bytes() == b"decided"


def test_a_file_that_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.csv").mkdir()
    check_target("--out", tmp_path / "new" / "out.csv", [".csv"])
    for path, why in (("out.xlsx", "ends in .csv"), ("file/out.csv", "no directory"), ("directory.csv", "is a directory")):
        with pytest.raises(ConfigurationError, match=why):
            check_target("--out", tmp_path / path, [".csv"])
