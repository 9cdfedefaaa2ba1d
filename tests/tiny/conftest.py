"""Views of the zoo, built once each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import zoo

from memloc.view import ModelView


@pytest.fixture(scope="session")
def view_of() -> Callable[..., ModelView]:
    """A proved view of a family's tiny model; shared, so look and leave it as it was."""

    @cache
    def view_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> ModelView:
        return ModelView.open(zoo.build(family, dtype=dtype, **changes))

    return view_of
