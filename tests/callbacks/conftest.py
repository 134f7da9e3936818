"""Lets the tests of this folder import `callback_toys`: importlib mode does not look beside the test file."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def accelerator_with() -> Iterator[Any]:
    """Makes an Accelerator on the CPU and forgets accelerate's global state afterwards."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield lambda **settings: Accelerator(cpu=True, **settings)
    forget()
