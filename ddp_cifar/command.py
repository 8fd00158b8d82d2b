"""What every command does around its `main`: a user's mistake is one line, a bug keeps its traceback, both are recorded."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ddp_cifar.distributed import place_from_environment
from ddp_cifar.errors import UserError
from ddp_cifar.log import log, set_up_logging

EXIT_FAILED, EXIT_USER_ERROR, EXIT_SAVE_FAILED = 1, 2, 3


def run_command(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main(argv)` and exit: its status, 2 after a `UserError`, 1 after any other exception.

    The exception is also left where torchrun looks for it, so that its report, and launch/*.sh, repeat the line.
    """
    set_up_logging(0, 1)
    try:
        set_up_logging(*place_from_environment())
        status = main(sys.argv[1:])
    except UserError as error:
        log.error(error)
        status = EXIT_USER_ERROR
        _record(str(error), str(error))
    except KeyboardInterrupt:
        log.error("interrupted")
        status = EXIT_FAILED
    except Exception as error:
        details = "".join(traceback.format_exception(error)).rstrip()
        log.error(details)
        status = EXIT_FAILED
        _record(f"{type(error).__name__}: {error}", details)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # past the interpreter's own end, which could wait for peers that are gone
        os._exit(status)


def _record(message: str, details: str) -> None:
    """Leave the error where torchrun looks for it, in the form that torch's `@record` writes.

    (`@record` itself would print a traceback, and put one into torchrun's report, for a user's mistake too.) Beside it
    goes `error.txt`, the one line that launch/*.sh repeat.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        extra = {"py_callstack": details, "timestamp": str(int(time.time()))}
        path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        line = f"[rank {os.environ.get('RANK')}] error: {message}\n"
        path.with_suffix(".txt").write_text(line, errors="backslashreplace")
