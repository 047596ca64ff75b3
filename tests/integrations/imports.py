"""Fresh interpreters in which packages are missing."""

import subprocess
import sys
import textwrap


def without(packages, code):
    """What `code` prints where these packages cannot be found."""
    block = f"import sys; sys.modules.update(dict.fromkeys({list(packages)!r}))\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
