from types import SimpleNamespace

import pytest

from tunedlens import progress


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def lines_of_a_run(clock, capsys, seconds):
    """Times and lines of a run of 1,000 tokens a second, which says something every 5 seconds."""
    said = []
    with progress.progress_bar(0, "evaluating") as bar:
        bar.reset(1000 * seconds)
        for second in range(5, seconds + 1, 5):
            clock.now += 5
            bar.update(5000)
            if line := capsys.readouterr().err:
                said.append((second, line))
    return said


def test_progress_is_said_in_lines_where_there_is_no_terminal(clock, capsys):
    first, second, *_ = lines_of_a_run(clock, capsys, 200)
    assert first == (10, "evaluating: 10,000 of 200,000 tokens, about 3 more minutes\n")
    assert second == (20, "evaluating: 20,000 of 200,000 tokens, about 3 more minutes\n")


def test_lines_of_progress_become_rarer_but_never_stop(clock, capsys):
    times = [second for second, _ in lines_of_a_run(clock, capsys, 1500)]
    assert times == [10, 20, 40, 80, 160, 320, 620, 920, 1220]


def test_continued_progress_is_timed_from_where_it_continues(clock, capsys):
    with progress.progress_bar(100_000, "training", done=40_000) as bar:
        clock.now += 60
        bar.update(12_000)
    said = capsys.readouterr().err
    assert said == "training: 52,000 of 100,000 tokens, about 4 more minutes\n"


def test_progress_that_is_not_shown_says_nothing(clock, capsys):
    with progress.progress_bar(100_000, "training", show=False) as bar:
        clock.now += 60
        bar.update(12_000)
    assert capsys.readouterr() == ("", "")
