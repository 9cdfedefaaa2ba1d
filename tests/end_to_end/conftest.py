"""The command line as a user has it: one command at a time, in a folder of its own."""

import pytest

from editors.cli import main


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run one command inside tmp_path; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
