"""Partial sums in a narrower dtype on their way: what rounding loses is measured, and with feedback sent the next time.

Error feedback (Seide et al., "1-bit stochastic gradient descent and its application to data-parallel distributed
training of speech DNNs", 2014, section 2.1; Karimireddy et al., "Error feedback fixes SignSGD", 2019, algorithm 2):
what was lost of a partial sum is kept where it was lost, and added before the same elements are sent in the next step.
A rank of a ring sends every chunk but its own once, so it keeps one fp32 number per element.
"""

from __future__ import annotations

import torch

from mpitrain.comm.buffers import CPU


class Wire:
    """The wire of one rank for one flat tensor.

    Attributes:
        dtype: on the way.
        residual: fp32 [size], what is still to be sent; None without feedback.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        size: int = 0,
        *,
        start: int = 0,
        feedback: bool = False,
        device: torch.device = CPU,
    ) -> None:
        """Send parts of a tensor of `size` elements in `dtype`."""
        self.dtype, self.start = dtype, start
        self.residual = torch.zeros(size, device=device) if feedback else None
        self._squared_error: torch.Tensor | float = 0.0

    def round(self, flat: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """A part of `flat` as it is sent; with feedback the part itself is changed, too.

        Infinities are seen by all in the sum, and their step is skipped; they do not stay in the residual, but what was
        held before has gone with that step.
        """
        if part.dtype == self.dtype:
            return part
        if self.residual is None:
            return self._round(part)[0]
        start = part.storage_offset() - flat.storage_offset()
        held = self.residual[start : start + part.numel()]
        wired, error = self._round(part.add_(held))
        torch.nan_to_num(error, 0.0, 0.0, 0.0, out=held)
        return wired

    def round_rows(self, values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The same for rows [n, width] with these numbers, which may be changed."""
        if values.dtype == self.dtype:
            return values
        if self.residual is None:
            return self._round(values)[0]
        held = self.residual.view(-1, values.shape[1])
        wired, error = self._round(values.add_(held.index_select(0, numbers)))
        held.index_copy_(0, numbers, error.nan_to_num_(0.0, 0.0, 0.0))
        return wired

    def take_squared_error(self) -> float:
        """The sum of squares of all that rounding has lost since the last call."""
        found, self._squared_error = float(self._squared_error), 0.0
        return found

    def _round(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wired = values.to(self.dtype)
        error = values - wired
        self._squared_error += torch.dot(error.view(-1), error.view(-1))
        return wired, error
