from __future__ import annotations

import subprocess

import pytest

from workbench.io import commit, duration, one_of, write_text


def test_an_unknown_value_is_refused_with_the_known_ones():
    assert one_of("mode", "add", {"add": 1, "replace": 2}) == "add"
    with pytest.raises(ValueError, match="mode 'ad' .* add, replace"):
        one_of("mode", "ad", ("add", "replace"))


def test_durations_have_a_unit_that_suits_them():
    assert [duration(seconds) for seconds in (0.4, 119, 120, 3600, 7200)] == [
        *("0 s", "119 s", "2 min", "60 min", "2.0 hours")
    ]


def test_the_commit_is_that_of_the_clone_and_says_if_files_differ(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.io.home", lambda: tmp_path)
    assert commit() is None

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True)

    git("init")
    write_text(tmp_path / "file", "one")
    git("add", "file")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert commit() == head
    write_text(tmp_path / "file", "two")
    assert commit() == f"{head}-dirty"
