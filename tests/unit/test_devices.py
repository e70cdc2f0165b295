"""Devices other than the CPU, without one: the emulated accelerator, and what is asked of torch."""

import device_cases
import emulated_device
import pytest
from conftest import fork_server

emulated = pytest.mark.skipif(not emulated_device.POSSIBLE, reason="this torch emulates no device without C++")


@pytest.fixture(scope="module")
def problems() -> dict[str, str]:
    """What went wrong in each of `device_cases.CASES`: nothing, or a traceback."""
    reader, writer = fork_server().Pipe(duplex=False)
    process = fork_server().Process(target=device_cases.run_cases, args=(writer,))
    process.start()
    writer.close()
    try:
        return dict(iter(reader.recv, None))
    finally:
        process.join()


@emulated
@pytest.mark.parametrize("case", device_cases.CASES)
def test_on_another_device(problems, case):
    assert not problems[case], problems[case]
