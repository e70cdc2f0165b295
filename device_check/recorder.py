"""A plug-in of pytest that writes down every test as it ends, so that nothing is lost when its process is ended.

A line of the file that the variable `WHERE` names is a JSON object: how many tests there are, the name of a test that
starts, or its outcome with what it said.
"""

import json
import os

import pytest

WHERE = "CHECK_DEVICE_RECORD"


def record(**line: object) -> None:
    with open(os.environ[WHERE], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    record(tests=len(session.items))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        record(name="collection", outcome="failed", text=report.longreprtext)


def pytest_runtest_logstart(nodeid: str) -> None:
    record(started=nodeid.partition("::")[2])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of the three phases of a test, the call counts, and the others where they fail or skip it."""
    if report.when == "call" or report.outcome != "passed":
        text = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else report.longreprtext
        outcome = "failed" if report.failed else report.outcome
        record(name=report.nodeid.partition("::")[2], outcome=outcome, text=text, seconds=report.duration)
