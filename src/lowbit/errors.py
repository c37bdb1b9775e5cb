"""Every error that lowbit raises on purpose; all derive from :class:`LowbitError`."""

from __future__ import annotations

_LONGEST = 1000  # characters of one value in a message


class LowbitError(Exception):
    """Base of lowbit's errors."""


class SpecError(LowbitError, ValueError):
    """A quantization spec, or a tensor's shape under it, that has no meaning."""


class FormatError(LowbitError, ValueError):
    """Bytes or a configuration that no wire can read; names what was found, what was expected, and where."""

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        tensor: str | None = None,
        found: object = None,
        expected: object = None,
    ) -> None:
        self.message, self.file, self.tensor, self.found, self.expected = message, file, tensor, found, expected
        super().__init__(self._compose())

    def _compose(self) -> str:
        where = " of ".join(part for part in (self.tensor, self.file) if part)
        details = [
            f"{label} {_shortened(str(value))}"
            for label, value in (("found", self.found), ("expected", self.expected))
            if value is not None
        ]
        text = f"{where}: {self.message}" if where else self.message
        return f"{text} ({', '.join(details)})" if details else text

    def inside(self, module: str, file: str | None = None) -> FormatError:
        """The same error of one of a module's tensors, under its full name."""
        tensor = f"{module}.{self.tensor}" if self.tensor else module
        return FormatError(
            self.message, file=self.file or file, tensor=tensor, found=self.found, expected=self.expected
        )

    def located(self, *, file: str | None = None, tensor: str | None = None) -> FormatError:
        """The same error with the file or tensor filled in by a caller that knows it."""
        return FormatError(
            self.message,
            file=self.file or file,
            tensor=self.tensor or tensor,
            found=self.found,
            expected=self.expected,
        )


def _shortened(text: str) -> str:
    """What stands in a file may be long; what is said of it is not."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text)} characters)"


class PlanError(LowbitError, ValueError):
    """A request that can't be carried out on this model; found before any work is done."""


class KernelUnavailable(LowbitError, RuntimeError):
    """No kernel fits a problem; the message holds every kernel's reason."""
