"""The one exception that means: the person gave something wrong, and here is the fix."""

_LONGEST = 1500  # characters


class UserError(Exception):
    """Wrong input; the message is one line that names the field or file and says how to fix it.

    Commands print it without a traceback and exit with code 2. Of a message that is very long, since it quotes what
    stands in a file, the middle is left out: the field and the fix stand at its ends.
    """

    def __init__(self, message: str) -> None:
        half = _LONGEST // 2
        super().__init__(message if len(message) <= _LONGEST else f"{message[:half]} ... {message[-half:]}")
