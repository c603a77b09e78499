"""The error tree. Every mistake a caller can make raises one of these, and its text names what was expected.

FastqError                     anything fastq refuses to do
├── ConfigurationError         fastq.yaml, a flag or an environment variable is wrong            exit 2
│   └── LogsError              a log cannot be read: file, column and expected type are named    exit 2
├── WorkspaceError             the workspace is busy, damaged or of another version              exit 2
├── RequestError               states, limits or actions that no answer can satisfy              exit 2
│   └── UnknownPlayerError     nothing is known of a player, decision or model that was asked    exit 2
├── BundleError                a model bundle is damaged or was made for other features          exit 1
├── TrainingError              training diverged or had nothing to learn from                    exit 1
└── GateRefused                data or model did not pass a gate; `reasons` says why             exit 1
"""


class FastqError(Exception):
    """Base of every error that fastq raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 2


class ConfigurationError(FastqError):
    """A setting is missing, unknown or out of range; the text names file, key path and what was expected."""


class LogsError(ConfigurationError):
    """A log table cannot be read at all: the text names the file, the column and the mend."""


class WorkspaceError(FastqError):
    """The workspace cannot be used as it is: locked by another process, damaged, or written by a newer version."""


class RequestError(FastqError):
    """A request that no recommendation can satisfy: a wrong shape, an unknown name, limits that leave no action."""


class UnknownPlayerError(RequestError):
    """Nothing is known under the id that was asked for."""


class BundleError(FastqError):
    """A model bundle whose checksum or fingerprint is not what this platform needs."""

    exit_code = 1


class TrainingError(FastqError):
    """Training could not go on: the loss diverged, or the logs hold nothing to learn from."""

    exit_code = 1


class GateRefused(FastqError):
    """A gate said no. `reasons` holds one sentence per reason, ready to be shown."""

    exit_code = 1

    def __init__(self, what: str, reasons: list[str]) -> None:
        super().__init__(f"{what}: " + "; ".join(reasons))
        self.reasons = reasons
