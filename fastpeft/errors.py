"""Every refusal fastpeft makes. All are `ValueError`s, so a caller can catch the root, one kind, or the builtin."""


class FastpeftError(ValueError):
    """Root of every refusal. The message names the value, where it stood and what to do."""


class ConfigError(FastpeftError):
    """A configuration field has a value, a type or a combination that cannot be honoured."""


class TargetError(FastpeftError):
    """The modules a configuration asks for are not in the model, or cannot carry the adapter."""


class PatchError(FastpeftError):
    """The model cannot be patched, or an adapter operation does not fit its present state."""


class BackendError(FastpeftError):
    """The backend that was demanded cannot serve the call; the message says why."""


class OpError(FastpeftError):
    """An argument of an op has a type, shape, device, dtype or value that it cannot take."""


class AdapterFileError(FastpeftError):
    """An adapter directory or one of its files is missing, damaged, hostile, or does not fit the model."""
