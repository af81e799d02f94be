"""Does every kernel compile for a GPU? Asked without one: the interpreter runs what the compiler refuses."""

from __future__ import annotations

import os

import pytest
import torch

import patterndsl

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
