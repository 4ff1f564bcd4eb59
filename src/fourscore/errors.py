"""The one error type that users of fourscore see for bad input."""


class FourscoreError(ValueError):
    """Bad input: the message names the flag or the file, and the way out.

    It is a `ValueError`, so that code which catches what TRL raised still does.
    """
