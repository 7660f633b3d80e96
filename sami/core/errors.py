"""The one kind of error that a user can mend."""


class UserError(ValueError):
    """Bad input: one sentence that names the thing and the remedy. The process leaves with 2."""
