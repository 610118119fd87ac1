"""What kvc raises. Every message is one line: who, what was expected, what came, how to mend it."""


class KVCError(ValueError):
    """The base of all errors that a user's input can cause."""


class ConfigError(KVCError):
    """A method, a parameter or a combination that cannot be."""


class ShapeError(KVCError):
    """Tensors whose shapes do not fit the store or each other."""


class ArtifactError(KVCError):
    """A map or a set of kernels that is damaged, cannot be had, or was made for another model."""


class CacheFileError(ArtifactError):
    """A cache file that is damaged, cannot be had or written, or does not fit a model."""


class BackendError(KVCError):
    """A backend, a device or a model that is not there."""


class KernelUnavailable(RuntimeError):  # noqa: N818 - reads as a state, as in torch and MLX
    """Fused mode was asked for, and no kernel can take these arguments."""
