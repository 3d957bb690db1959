"""The one exception whose text is meant for the user."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: the field, the value given, and what would be right. The command line
    prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a line of ours; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
