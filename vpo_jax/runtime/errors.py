"""The one exception that means: the person gave something wrong, and here is the fix."""


class UserError(Exception):
    """Wrong input; the message is one line that names the field or file and says how to mend it.

    Commands print it without a traceback and exit with code 2.
    """
