"""Buffers outside the state dict, which keep their values where a module leaves the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

# What `to_empty` applies to all tensors.
_TO_EMPTY = "Module.to_empty.<locals>.<lambda>"


class TransientBuffers(nn.Module):
    """A module with non-persistent buffers.

    Under `torch.device("meta")` they have no values. `to_empty` leaves theirs undefined, `load_state_dict` does not set
    them, and with `assign=True` they stay on the meta device. Here both set them as the constructor does: `to_empty`
    also where they had values, since it meets a module that several others share once for each of them.
    """

    def transient_buffers(self) -> dict[str, Tensor]:
        """The values of a new module, on the CPU, by name."""
        raise NotImplementedError

    def register_transient_buffers(self) -> None:
        """For the end of a constructor: on the default device, as other buffers are."""
        for name, value in self.transient_buffers().items():
            self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def _restore(self, names: list[str], device: torch.device | None = None) -> None:
        values = self.transient_buffers() if names else {}
        for name in names:
            place = self._buffers[name]
            if place is not None and (device is not None or not place.is_meta):
                with torch.no_grad(), torch.inference_mode(False):
                    self._buffers[name] = values[name].to(place.device if device is None else device, place.dtype)

    def _without_values(self) -> list[str]:
        return [name for name in self._non_persistent_buffers_set if _is_meta(self._buffers[name])]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        emptied = getattr(fn, "__qualname__", "") == _TO_EMPTY
        hidden = list(self._non_persistent_buffers_set) if emptied else self._without_values()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._restore(hidden)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        own = [*self._parameters.items(), *self._buffers.items()]
        device = next((value.device for _, value in own if value is not None and not value.is_meta), None)
        if device is None:  # a module without entries of its own: where its parts will be
            device = next((value.device for key, value in state_dict.items() if key.startswith(prefix)), None)
            device = device if bool(args) and args[0].get("assign_to_params_buffers", False) else None
        if device is not None:
            self._restore(self._without_values(), device)


def _is_meta(value: Tensor | None) -> bool:
    return value is not None and value.is_meta
