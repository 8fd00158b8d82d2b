"""The one exception that is a user's to mend."""


class UserError(ValueError):
    """A mistake in the config, the data, a path, the environment or a checkpoint.

    Its message is one line: what was found, what was expected, what to do. A command shows that line and exits with 2
    (`command.py`); any other exception is a bug and keeps its traceback.
    """


class RunError(RuntimeError):
    """Something went wrong inside a run, such as a loss that is not a number.

    Its message is one line as well; a command shows it and exits with 1.
    """
