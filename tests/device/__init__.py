"""Tests that run on whatever device there is, with the same assertions: ``python -m pytest tests/device``.

``--device`` chooses it, as for main.py. On a CPU ``-m "not full"`` leaves out most cells of the table of kinds of run
and variants of each: what they compute there the other tests have seen. Nothing is needed but pytest and what main.py
needs. The files can run beside each other.
"""

import pytest

pytest.register_assert_rewrite("device.runs")
