"""The exception tree; catch ``HfQuantError`` to catch everything this package raises on purpose.

HfQuantError
├── ConfigError (ValueError)        a field of a configuration is unknown, of the wrong type, or in conflict
│   └── SchemeError                 a scheme does not fit a tensor: group size, bits, shape
├── CalibrationError (ValueError)   calibration data is missing, empty or unusable
├── FormatError (ValueError)        a checkpoint is damaged, incomplete, torn or not understood
└── KernelError (RuntimeError)      an operation was called with tensors it cannot take

Every message says what was given, what is allowed, and what to do.
"""


class HfQuantError(Exception):
    """Base of all errors raised by hfquant."""


class ConfigError(HfQuantError, ValueError):
    """A configuration field is unknown, has the wrong type, or conflicts with another one."""


class SchemeError(ConfigError):
    """A quantization scheme does not fit the tensor it was asked for."""


class CalibrationError(HfQuantError, ValueError):
    """Calibration data is missing, empty or unusable."""


class FormatError(HfQuantError, ValueError):
    """A checkpoint is damaged, incomplete, torn, or of a format this version does not understand."""


class KernelError(HfQuantError, RuntimeError):
    """An operation was called with tensors it cannot take."""
