"""Where a model computes."""

from __future__ import annotations

import torch

from quarterlight.errors import InputError


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; of none, a GPU if there is one.

    Raises InputError when there is no such device, or it does not work here.

    >>> find_device("cpu")
    device(type='cpu')
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"The device {str(device)!r} cannot be used here: {reason}. Give 'cpu', or 'cuda' where there is a GPU, or "
            "leave it out for the best there is."
        ) from error
    return place
