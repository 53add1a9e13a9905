"""The one exception for everything a user can mend: recipes print it as a single line and leave with exit code 2."""


class InputError(ValueError):
    """Bad option, missing folder, malformed annotation. The message says what, where (file:line) and how to mend it."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names of files may hold line breaks
