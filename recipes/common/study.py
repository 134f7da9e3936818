"""What recipes that are made of many trials share: resuming them, and stopping them."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

from leaven.recipes.common.flags import ImageSettings, UserError, to_yaml
from leaven.recipes.common.run_folder import RunFolder
from leaven.recipes.common.signals import exit_code


@contextmanager
def stopping(what: str, run: RunFolder) -> Iterator[None]:
    """SIGTERM and Ctrl-C end a study and its processes with one line; the journal has what was finished."""
    received: list[int] = []

    def stop(signum: int, frame: object) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    previous = {wanted: signal.signal(wanted, stop) for wanted in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        signum = received[0] if received else int(signal.SIGINT)
        print(
            f"{what} stopped by signal {signum}: what was trained is kept; go on with --output-dir {run.path} "
            "--resume auto"
        )
        sys.exit(exit_code(signum))
    finally:
        for wanted, handler in previous.items():
            signal.signal(wanted, handler)


def refuse_changes(run: RunFolder, settings: ImageSettings) -> None:
    """The journal knows trials by name, and not what they were tried with: that must be what it was.

    Raises:
        UserError: a setting that decides the numbers differs from the folder's.
    """
    if not run.config.is_file():
        return
    before, now = (yaml.safe_load(text) for text in (run.config.read_text(), to_yaml(settings)))
    changed = [
        f"{name} {before.get(name)} -> {value}"
        for name, value in now.items()
        if name not in ("resume", "output_dir", "jobs", "dask", "time_limit") and before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"cannot resume {run.path} exactly: {', '.join(changed)}; go back to the old values, or take another "
            "--output-dir"
        )
