"""Which constants plan for a device that is here? Those that its name fits, or those that were asked for."""

from __future__ import annotations

from os import PathLike

import torch

from patterndsl.diagnostics import input_error
from patterndsl.lower.devices import Machine
from patterndsl.lower.machine import Constants, constants_named, constants_of, cpu_name, device_type_of


def device_name(device: torch.device) -> str:
    """What a calibration of this device must be of."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def name_of_type(device_type: str) -> str | None:
    """The name of this machine's device of a kind; None where there is none."""
    if device_type == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return cpu_name()


def constants_for(device: torch.device) -> Constants:
    """The constants for a device that is here."""
    return constants_of(device.type, device_name(device))


def given_constants(given: Machine | str | PathLike[str], device: torch.device) -> Constants:
    """The constants that a caller names, or gives. Raises PatternError (E505) where they are of another kind of
    device, whose kernels are not here; E601 and E604 on a file."""
    if isinstance(given, Machine):
        found = Constants(given, "given")
    elif given in ("cpu", "cuda"):
        found = constants_of(given, name_of_type(given))
    elif isinstance(given, str | PathLike):
        found = constants_named(given)
    else:
        message = f"a machine is {type(given).__name__}"
        raise input_error("E505", message, "give its name, a calibration's file, or a Machine")
    if device_type_of(found.machine) != (kind := "cuda" if device.type == "cuda" else "cpu"):
        message = f"{found.machine.name} is no {kind} device, the program is for {device}"
        raise input_error("E505", message, "give a machine of that kind, or compile for another device")
    return found
