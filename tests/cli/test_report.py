"""`probekit report` as it is typed."""

from pathlib import Path

from running import Capture, printed, refused


def test_report_writes_both_files(copy: Path, capsys: Capture):
    shown = printed(capsys, "report", copy)
    assert shown == f"The report: {copy / 'report.html'}\nThe report: {copy / 'report.md'}\n"
    assert (copy / "report.html").is_file()
    assert (copy / "report.md").is_file()


def test_report_writes_what_is_asked_for(copy: Path, tmp_path: Path, capsys: Capture):
    file = tmp_path / "mine.html"
    assert printed(capsys, "report", copy, "-o", file) == f"The report: {file}\n"
    assert not (copy / "report.html").exists()


def test_report_refuses_bad_input(copy: Path, tmp_path: Path, capsys: Capture):
    assert "must end in .html or .md" in refused(capsys, "report", copy, "-o", tmp_path / "x.pdf")
    assert "holds no run" in refused(capsys, "report", tmp_path)
