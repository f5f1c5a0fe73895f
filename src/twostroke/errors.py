"""The one exception tree of the project.

Every error a user, client or file can cause is a `TwostrokeError` whose message names the thing
that is wrong and, where there is one, the fix. `assert` is kept for our own bugs. The HTTP layer
maps this tree to status codes in one place (`server/errors.py`); nothing here knows of HTTP.

    TwostrokeError
    ├── InvalidRequest          a request no engine could serve: the sender must change it
    │   ├── InvalidParameter    one named parameter is out of range or of the wrong type
    │   └── PromptTooLong       prompt (plus one token) exceeds the context or the whole KV pool
    ├── ModelError
    │   ├── UnknownModel        the name is no known model, file or folder
    │   ├── UnsupportedModel    an architecture, key or tensor type we refuse to guess at
    │   ├── CorruptModel        truncated or lying file; names the tensor or key and byte offset
    │   └── DownloadFailed      a model could not be fetched or its checksum is wrong
    ├── TemplateError           a chat template is missing, does not parse, or refuses the messages
    ├── EngineError
    │   ├── EngineClosed        the engine was shut down; the request was not accepted
    │   ├── Overloaded          more was asked than a limit allows now; says when to ask again
    │   ├── SlowReader          a client did not take its output, so its request was ended
    │   ├── ExecutorLost        an executor died or answered out of protocol; carries why
    │   │   └── BlamelessLoss   the same, for a reason that no request can have been
    │   └── RequestFailed       a request ended Failed; carries the reason
    └── DeviceError             the device asked for is unknown or not usable here, with what is
"""

from __future__ import annotations


class TwostrokeError(Exception):
    """Root of every error this project raises on purpose."""


class InvalidRequest(TwostrokeError, ValueError):
    """The request can never be served as it stands."""


class InvalidParameter(InvalidRequest):
    """One parameter is out of range or of the wrong type.

    `parameter` is its public name, for the `param` field of an OpenAI-shaped error.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(f"{parameter}: {message}")
        self.parameter = parameter


class PromptTooLong(InvalidRequest):
    """The prompt does not fit; `limit_tokens` is the longest prompt that would."""

    def __init__(self, message: str, limit_tokens: int) -> None:
        super().__init__(message)
        self.limit_tokens = limit_tokens


class ModelError(TwostrokeError):
    """A model could not be found, fetched, understood or loaded."""


class UnknownModel(ModelError):
    """The name is no known model, no file and no folder."""


class UnsupportedModel(ModelError):
    """The file is sound but asks for something this engine does not implement."""


class CorruptModel(ModelError):
    """The file is truncated, inconsistent or lies about its contents."""


class DownloadFailed(ModelError):
    """A model could not be fetched, or what arrived has the wrong checksum."""


class TemplateError(InvalidRequest):
    """A chat template is missing, does not parse, or refuses the messages given."""


class EngineError(TwostrokeError):
    """The engine cannot do what was asked, through no fault of the request."""


class EngineClosed(EngineError):
    """The engine has been shut down."""


class Overloaded(EngineError):
    """More was asked for than a limit allows at this moment.

    `limit` names it, for metrics and the `code` of an error; `retry_after_s` is when to ask again.
    """

    def __init__(self, limit: str, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after_s = retry_after_s


class SlowReader(EngineError):
    """A client did not take its output in time, so its request was ended."""


class ExecutorLost(EngineError):
    """An executor died, was closed, or answered out of protocol."""


class BlamelessLoss(ExecutorLost):
    """An executor was lost before it began a step, or stopped from outside: no row is to blame."""


class RequestFailed(EngineError):
    """A request ended as Failed; the message carries the reason."""


class DeviceError(TwostrokeError):
    """The device asked for is not known, or cannot be used on this machine."""
