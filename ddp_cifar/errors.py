"""The one exception that is a user's to mend."""


class UserError(ValueError):
    """A mistake in the config, the data, a path, the environment or a checkpoint.

    Its message is one line: what was found, what was expected, what to do. A command shows that line and exits with 2
    (`command.py`); any other exception is a bug and keeps its traceback.
    """
