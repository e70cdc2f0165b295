"""Devices other than the CPU, without one: the emulated accelerator, and what is asked of torch."""

import emulated_device
import pytest
from conftest import fork_server
from device_cases import CASES, SLOW, run_cases

emulated = pytest.mark.skipif(not emulated_device.POSSIBLE, reason="this torch emulates no device without C++")


@pytest.fixture(scope="module")
def problems(all_tests) -> dict[str, str]:
    """What went wrong in each of `CASES`: nothing, or a traceback."""
    names = [name for name in CASES if all_tests or name not in SLOW]
    reader, writer = fork_server().Pipe(duplex=False)
    process = fork_server().Process(target=run_cases, args=(names, writer))
    process.start()
    writer.close()
    try:
        return dict(iter(reader.recv, None))
    finally:
        process.join()


@emulated
@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.full if n in SLOW else ()) for n in CASES])
def test_on_another_device(problems, case):
    assert not problems[case], problems[case]
