"""The one exception that is the user's to fix."""


class UserError(Exception):
    """A mistake of the user. The message is one line: what is wrong, where, and what to do about it."""
