"""The one error of a compiled file that does not hold what it should."""


class CompiledFileError(ValueError):
    """A compiled file is damaged, or its weights or scales are not those of the original."""


class NotVerifiedError(ValueError):
    """The compiler did something that the verification does not follow; nothing is shown wrong."""
