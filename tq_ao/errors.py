"""Errors a user can act on: commands print `error: <message>` and exit 1."""


class TurboQuantError(Exception):
    """Base class.  str() is one line: what was expected, what came, what to do."""


class ModelError(TurboQuantError):
    """A model name that does not resolve, is not reachable, or is not supported."""


class TextError(TurboQuantError):
    """Calibration or evaluation text that is missing, empty or too short."""


class HubError(TurboQuantError):
    """The Hub refused, was not reachable, or an upload broke off."""


def one_line(error: BaseException) -> str:
    """The message for a terminal; of torch's own errors without the C++ stack behind it."""
    return " ".join(str(error).partition("\nException raised from")[0].split())
