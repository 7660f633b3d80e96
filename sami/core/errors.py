"""The two kinds of error that are not bugs."""


class UserError(ValueError):
    """Bad input: one sentence that names the thing and the remedy. The process leaves with 2."""


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason that the summary counts it under."""
