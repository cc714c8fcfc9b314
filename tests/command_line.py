"""`declip` as a user types it, in this process."""

from typer.testing import CliRunner

from declip_cli.__main__ import app


def declip(*words, stdin=""):
    """Run a command; what it raises beyond its way out is raised here."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
