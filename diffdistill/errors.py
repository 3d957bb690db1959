"""The one exception whose text is meant for the user."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: the field, the value given, and what would be right. The command line
    prints it without a traceback and exits with code 2.
    """
