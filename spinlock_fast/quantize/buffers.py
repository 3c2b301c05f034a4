"""Non-persistent buffers that survive `to_empty` and loading on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

# Qualified name of the function that `to_empty` applies to all tensors.
_TO_EMPTY = "Module.to_empty.<locals>.<lambda>"


class TransientBuffers(nn.Module):
    """A module whose non-persistent buffers are restored when it leaves the meta device.

    In torch, `to_empty` leaves such buffers undefined, `load_state_dict` does not set them, and with `assign=True` they
    stay on the meta device. Here both set them to their initial values. `to_empty` also resets buffers that had values,
    because it visits a shared module once per parent.
    """

    def transient_buffers(self) -> dict[str, Tensor]:
        """Initial values by name, on the CPU."""
        raise NotImplementedError

    def register_transient_buffers(self) -> None:
        """Registers the buffers on the default device; call at the end of the constructor."""
        for name, value in self.transient_buffers().items():
            self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def _restore(self, names: list[str], device: torch.device | None = None) -> None:
        values = self.transient_buffers() if names else {}
        for name in names:
            buffer = self._buffers[name]
            if buffer is not None and (device is not None or not buffer.is_meta):
                with torch.no_grad(), torch.inference_mode(False):
                    self._buffers[name] = values[name].to(buffer.device if device is None else device, buffer.dtype)

    def _meta_buffers(self) -> list[str]:
        return [name for name in self._non_persistent_buffers_set if _is_meta(self._buffers[name])]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        emptied = getattr(fn, "__qualname__", "") == _TO_EMPTY
        undefined = list(self._non_persistent_buffers_set) if emptied else self._meta_buffers()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._restore(undefined)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        own = [*self._parameters.items(), *self._buffers.items()]
        device = next((value.device for _, value in own if value is not None and not value.is_meta), None)
        if device is None:  # no own tensors: the device that its submodules will be on
            device = next((value.device for key, value in state_dict.items() if key.startswith(prefix)), None)
            device = device if bool(args) and args[0].get("assign_to_params_buffers", False) else None
        if device is not None:
            self._restore(self._meta_buffers(), device)


def _is_meta(value: Tensor | None) -> bool:
    return value is not None and value.is_meta
