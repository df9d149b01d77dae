"""What clients do does not fill the server's log."""

import logging

from examples.server.logs import FewOfAKind


def record(line: int, created: float) -> logging.LogRecord:
    one = logging.LogRecord("a", logging.WARNING, "a.py", line, "request %d", (line,), None)
    one.created = created
    return one


def test_ten_records_a_minute_from_each_line_and_the_number_of_the_others() -> None:
    few = FewOfAKind()
    assert [few.filter(record(1, number / 1000)) for number in range(5000)].count(True) == 10
    assert few.filter(record(2, 5.0)), "another line has its own"
    later = record(1, 61.0)
    assert few.filter(later)
    assert later.getMessage() == "request 1 [and 4990 more like it before]"
    assert [few.filter(record(1, 62.0)) for _ in range(20)].count(True) == 9
    quiet = record(2, 200.0)
    assert few.filter(quiet)
    assert quiet.getMessage() == "request 2"
