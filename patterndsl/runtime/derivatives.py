"""Which derivatives does sparse attention refuse, and what else is there? First ones in reverse mode are all it has."""

from __future__ import annotations

from patterndsl.diagnostics import InputError, input_error

_DENSE_CURE = "use backend='oracle', which is dense and for small sizes"


def no_second_derivatives(backend: str) -> InputError:
    """For who differentiates gradients (E505)."""
    return input_error("E505", f"second derivatives of {backend} attention", _DENSE_CURE)


def no_forward_mode(backend: str) -> InputError:
    """For who asks for Jacobian-vector products (E505)."""
    return input_error("E505", f"forward-mode derivatives of {backend} attention", _DENSE_CURE)


def no_vmap() -> InputError:
    """For who maps attention over a dimension of its own (E505)."""
    return input_error("E505", "attention under torch.vmap", "put the mapped dimension into the batch dimension")
